"""What the answers of OpenAI's older endpoints, chat completions and completions, have in common."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from shoal.gateway.error_objects import Refused


class OpenAIAnswer:
    """An answer whose id begins with `prefix`. In a stream, its events have no names."""

    events_are_named: ClassVar[bool] = False

    def __init__(self, prefix: str, model: str) -> None:
        self._id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def failure(self, error: Refused) -> dict[str, Any]:
        """The last event of a stream that fails."""
        return error.body()

    def _object(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
            "choices": choices,
        }
