"""Files of a ledger: a small JSON document of a known form, replaced as a whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from shoal.host.whole_files import replacing

log = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)

MAX_FILE_BYTES = 8 << 20
"""No ledger is larger: its rows are limited."""


class TableFile(Generic[M]):
    """A file of a form, whose default is the empty table. What fails first is a warning, the rest is not."""

    def __init__(self, path: Path, form: type[M]) -> None:
        self._path = path
        self._form = form
        self._has_failed = False
        self._known: tuple[tuple[int, int, int], M] | None = None  # what was read, and of which state of the file

    def read(self) -> M:
        """What the file holds. A missing one is empty, and so is one that is damaged or too large."""
        try:
            status = self._path.stat()
            state = status.st_ino, status.st_mtime_ns, status.st_size  # it is only ever replaced by another file
            if self._known is not None and self._known[0] == state:
                return self._known[1]
            if status.st_size > MAX_FILE_BYTES:
                raise ValueError("it is too large")
            table = self._form.model_validate_json(self._path.read_bytes())
            self._known = state, table
            return table
        except FileNotFoundError:
            return self._form()
        except (OSError, ValueError) as error:
            why = f"{error.error_count()} wrong fields" if isinstance(error, ValidationError) else error
            self._warn(f"cannot be read, and counts as empty: {why}")
            return self._form()

    def write(self, table: M) -> None:
        """Replace the file. If the disk cannot be written, the old file stays."""
        try:
            with replacing(self._path) as draft:
                draft.write_text(table.model_dump_json())
        except OSError as error:
            self._warn(f"cannot be written: {error}")

    def _warn(self, what: str) -> None:
        level, self._has_failed = logging.DEBUG if self._has_failed else logging.WARNING, True
        log.log(level, "the ledger %s %s", self._path, what)
