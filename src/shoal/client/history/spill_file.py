"""Room for bytes in a file that has no name: it is gone with the process, however that ends."""

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
    """Bytes are written where there is room, and their room is given back; the file ends where the last of them does.

    `folder` is that of the system for temporary files, unless one is given. Raises `UserError` if no file can be there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 - closed with this object
        except OSError as error:
            raise UserError(
                f"no file can be made in {folder or tempfile.gettempdir()}: {error.strerror}",
                hint="history_folder= is a folder that you may write to",
            ) from None
        weakref.finalize(self, self._file.close)
        self._free: list[FileRegion] = []  # sorted; between any two of them is something that is in use
        self.num_bytes = 0
        """How long the file is."""

    def write(self, data: bytearray) -> FileRegion:
        """Put bytes somewhere. Raises `OSError`, and has put them nowhere then."""
        region = self._take(len(data))
        try:
            self._file.seek(region.start)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self.give_back(region)
            raise
        return region

    def read(self, region: FileRegion) -> bytearray:
        """The bytes that were written there."""
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

    def give_back(self, region: FileRegion) -> None:
        """What was written there is needed no more."""
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
