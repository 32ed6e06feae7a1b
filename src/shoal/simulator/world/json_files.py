"""Files that users name: read as JSON, checked, and refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from shoal.errors import UserError

MAX_BYTES = 64 << 20
"""The size of the largest file that is read."""
HINT = "docs/scale.md describes the formats of traces and clusters"

Model = TypeVar("Model", bound=BaseModel)


def read_json(path: Path, kind: type[Model]) -> Model:
    """A file as an object of this kind. Raises `UserError` with what is wrong."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB", hint=HINT)
        return kind.model_validate_json(path.read_bytes())
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}", hint="name an existing file") from failure
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']}", hint=HINT) from failure
