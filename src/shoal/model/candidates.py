"""Assisted decoding: candidate tokens are never proposed beyond the end of the session."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator


class _LengthLimited:
    """Mixed into a candidate generator of Transformers, which may propose more tokens than the session may hold."""

    max_candidate_length: int  # of the whole sequence, in tokens

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        ids, logits = super().get_candidates(input_ids, *args, **kwargs)  # type: ignore[misc]
        num_tokens = input_ids.shape[1]
        num_candidates = max(0, self.max_candidate_length - num_tokens)
        return ids[:, : num_tokens + num_candidates], None if logits is None else logits[:, :num_candidates]


def limit_candidates(generator: CandidateGenerator, max_length: int) -> CandidateGenerator:
    """Change `generator` so that a sequence with its candidates has at most `max_length` tokens; returns it."""
    limited: Any = generator
    limited.__class__ = _limited_class(type(generator))  # type: ignore[arg-type]
    limited.max_candidate_length = max_length
    return generator


@functools.cache
def _limited_class(cls: type) -> type:
    return type(cls.__name__, (_LengthLimited, cls), {"__module__": cls.__module__})
