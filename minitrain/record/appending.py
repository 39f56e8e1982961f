"""A file of rows, appended past the page cache where the system lets us.

Through the page cache, half a gigabyte a second costs the kernel more time than all the rest of recording: it finds,
fills and writes back a page for every 4 KiB. Direct writes (O_DIRECT) take the bytes from our memory; they want whole
blocks of it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


class RowFile:
    """Appends to a file, which is cut to its first ``size`` bytes."""

    def __init__(self, path: Path, size: int) -> None:
        """Raises OSError."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, size)
        self._end = size
        self._direct = False

    def append(self, *rows: memoryview, direct: bool) -> None:
        """``direct`` asks for a direct write, for whole blocks at whole blocks in file and memory.

        All rows are written or none: raises OSError, and the file is as it was.
        """
        self._set_direct(direct)
        parts, end = list(rows), self._end
        while parts:
            try:
                written = os.pwritev(self._file, parts, end)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    os.ftruncate(self._file, self._end)
                    raise
                written = 0  # blocks of another size, or a file system without
            end += written
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if parts:  # also: cut by a signal, or by a disk that is about to be full
                self._set_direct(False)
                parts[0] = parts[0][written:]
        self._end = end

    def _set_direct(self, direct: bool) -> None:
        """As far as system and file system can."""
        if direct == self._direct or not hasattr(os, "O_DIRECT"):
            return
        import fcntl

        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags)
            self._direct = direct
        except OSError:  # tmpfs, for one
            pass

    def close(self) -> None:
        """Once. Raises OSError."""
        file, self._file = self._file, -1
        if file < 0:
            return
        try:
            if hasattr(os, "posix_fadvise"):  # have it go to the disk now: the next sync would wait for all at once
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
