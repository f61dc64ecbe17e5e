"""What all ops of one backend share: its configuration, its worker, its caches; a folder each.

Frameworks are imported here and in the ops' backend files, nowhere else. What belongs to one op
only stays in that op's folder.
"""
