"""The record of a run: what every step read and left, on disk. FORMAT.md specifies the bytes.

Each part of the format is written and read in one module: the journal in ``journal``, the arrays in ``arrays``. The
listener that writes is ``recorder``, the reader for everybody else is ``recorded``.
"""
