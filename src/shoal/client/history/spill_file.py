"""Bytes in a file without a name, which vanishes with the process, however that ends."""

from __future__ import annotations

import bisect
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import UserError


@dataclass(frozen=True, order=True)
class FileRegion:
    """The bytes `[start, end)` of a file."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


class SpillFile:
    """A file of regions that are written, read and freed. It is never longer than up to the end of its last region.

    It is in `folder`, by default in the system's folder for temporary files. Raises `UserError` if it cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 - closed with this object
        except OSError as error:
            raise UserError(
                f"no file can be made in {folder or tempfile.gettempdir()}: {error.strerror}",
                hint="history_folder= has to be a folder that you may write to",
            ) from None
        weakref.finalize(self, self._file.close)
        self._free: list[FileRegion] = []  # sorted; any two of them have a used region between them
        self.num_bytes = 0
        """The length of the file."""

    def write(self, data: bytearray) -> FileRegion:
        """Write bytes to a free region. Raises `OSError`; the region is free again then."""
        region = self._take(len(data))
        try:
            self._file.seek(region.start)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self.free(region)
            raise
        return region

    def read(self, region: FileRegion) -> bytearray:
        """The bytes of a region."""
        data = bytearray(len(region))
        self._file.seek(region.start)
        rest = memoryview(data)
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise EOFError("a file of histories was cut short")
            rest = rest[count:]
        return data

    def _take(self, num_bytes: int) -> FileRegion:
        for index, free in enumerate(self._free):
            if len(free) >= num_bytes:
                region = FileRegion(free.start, free.start + num_bytes)
                self._free[index : index + 1] = [FileRegion(region.end, free.end)] if region.end < free.end else []
                return region
        region = FileRegion(self.num_bytes, self.num_bytes + num_bytes)
        self.num_bytes = region.end
        return region

    def free(self, region: FileRegion) -> None:
        """The bytes of a region are not needed any more."""
        index = bisect.bisect(self._free, region)
        if index < len(self._free) and self._free[index].start == region.end:
            region = FileRegion(region.start, self._free.pop(index).end)
        if index and self._free[index - 1].end == region.start:
            index -= 1
            region = FileRegion(self._free.pop(index).start, region.end)
        if region.end == self.num_bytes:
            self._file.truncate(region.start)
            self.num_bytes = region.start
        else:
            self._free.insert(index, region)
