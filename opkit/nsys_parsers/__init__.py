"""WHAT WAS LAUNCHED: an nsys export becomes one kernel table with launches, steps and modules.

``tool`` finds and calls nsys, ``trace`` opens an export, ``kernels`` and ``ranges`` are the SQL
that joins it, ``names`` classifies kernel names by data (``families.toml``), ``slim`` makes
recordings one may share. Knows nsys's files; knows no op and no verdict, and never imports
``layers`` or ``align``.
"""
