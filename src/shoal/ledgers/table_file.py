"""Files of a ledger: a small JSON document of a known form, replaced as a whole."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

log = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)

MAX_FILE_BYTES = 8 << 20
"""No ledger is larger: its rows are limited."""


def read_table(path: Path, form: type[M]) -> M:
    """What a file holds. A missing one is empty, and so is one that is damaged or too large, with a warning."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("it is too large")
        return form.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return form()
    except (OSError, ValueError) as error:
        why = f"{error.error_count()} wrong fields" if isinstance(error, ValidationError) else error
        log.warning("the ledger %s cannot be read, and counts as empty: %s", path, why)
        return form()


def write_table(path: Path, table: BaseModel) -> None:
    """Replace a file. If the disk cannot be written, a warning says so, and the old file stays."""
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "w") as out:
            out.write(table.model_dump_json())
        os.replace(draft, path)
    except OSError as error:
        log.warning("the ledger %s cannot be written: %s", path, error)
        if draft is not None:
            with contextlib.suppress(OSError):
                os.unlink(draft)
