"""What one may ask of a kernel table: each file here is one question of ``opkit trace``.

A question is a ``View``: SQL over the tables of ``table.KernelTable``, one row a listed thing, and
what goes with it. Nothing here draws or prints; ``reports.trace`` does.
"""
