"""What the answers of OpenAI's older endpoints, chat completions and completions, have in common."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from shoal.gateway.bodies import SamplingBody
from shoal.gateway.error_objects import Refused


class OpenAIAnswer(ABC):
    """The answer to a request, whose id begins with `prefix`. In a stream, its events have no names."""

    events_are_named: ClassVar[bool] = False

    def __init__(self, prefix: str, request: SamplingBody) -> None:
        self._id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = request.model
        self._tells_usage = request.includes_usage
        self._tells_usage_so_far = request.includes_usage_so_far

    def failure(self, error: Refused) -> dict[str, Any]:
        """The last event of a stream that fails."""
        return error.body()

    @abstractmethod
    def _usage(self) -> dict[str, Any]:
        """OpenAI's object of the tokens that were read and generated until now."""

    def _usage_so_far(self) -> dict[str, Any]:
        """What a chunk of a stream says of it."""
        if not self._tells_usage:
            return {}
        return {"usage": self._usage() if self._tells_usage_so_far else None}

    def _object(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
            "choices": choices,
        }
