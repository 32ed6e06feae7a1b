"""Which attention backend a server uses: the first candidate of its device that passes the self-check."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal.model.body import Body
from shoal.model.families import text_config
from shoal.server.attention_backends.feature_fallback import FeatureFallback
from shoal.server.attention_backends.self_check import check
from shoal.server.attention_backends.varlen_attention import default_implementation, gathering, reading_pages
from shoal.server.kv.attention import AttentionBackend, PartialBackend
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.sdpa_attention import SdpaAttention

log = logging.getLogger(__name__)

REFERENCE = "sdpa"
"""The name of the reference: PyTorch's scaled dot products over gathered pages."""
MAX_REASON = 80
"""Characters of why one candidate is not used: kernels explain at length."""


@dataclass(frozen=True)
class Candidate:
    """A backend that a device may have. `undo` is called if it is not used: what `build` changed for the process."""

    name: str
    build: Callable[[PagedCache], PartialBackend[Any]]
    undo: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class AttentionChoice:
    """What is used, its name, and the names of the candidates before it, each with why it is not used."""

    name: str
    backend: AttentionBackend[Any]
    rejected: tuple[tuple[str, str], ...] = ()

    @property
    def described(self) -> str:
        """The choice in words."""
        return "; ".join([self.name, *(f"not {name}: {reason}" for name, reason in self.rejected)])


@dataclass(frozen=True)
class OwnAttention:
    """Families that compute their attention themselves, as Transformers does: there is no choice."""

    backend: None = None
    described: str = ""


def candidates_of(device: torch.device) -> Sequence[Candidate]:
    """What a device may have besides the reference, the fastest first."""
    if device.type != "cuda":
        return ()
    return (
        _that_reads_pages("varlen-fa4", "FA4", "flash_attn.cute"),
        _that_reads_pages("varlen-fa3", "FA3", "flash_attn_interface"),
        Candidate("varlen", gathering),
    )


def _that_reads_pages(name: str, implementation: str, package: str) -> Candidate:
    build = functools.partial(reading_pages, implementation=implementation, package=package)
    return Candidate(name, build, undo=default_implementation)


def attention_of(body: Body, cache: PagedCache) -> AttentionChoice | OwnAttention:
    """The attention of a body, chosen and logged. It is called on the compute thread."""
    if not body.family.packable:
        return OwnAttention()
    choice = choose_attention(body, cache, candidates_of(body.backbone.device))
    log.info("attention: %s", choice.described)
    return choice


def choose_attention(body: Body, cache: PagedCache, candidates: Sequence[Candidate]) -> AttentionChoice:
    """The first of the `candidates` that gives the reference's numbers on a packed family's cache, or the reference.

    A candidate that raises is not used, whatever the reason: the server works without it.
    """
    reference = SdpaAttention(cache)
    num_heads = getattr(text_config(body.backbone.config), "num_attention_heads", 1)
    rejected: list[tuple[str, str]] = []
    for candidate in candidates:
        try:
            backend = candidate.build(cache)
            check(candidate.build, body, cache, num_heads=num_heads)
        except Exception as error:
            log.debug("the attention backend %s is not used", candidate.name, exc_info=True)
            rejected.append((candidate.name, _in_words(error)))
            candidate.undo()
        else:
            return AttentionChoice(candidate.name, FeatureFallback(backend, reference), tuple(rejected))
    return AttentionChoice(REFERENCE, reference, tuple(rejected))


def _in_words(error: Exception) -> str:
    text = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
    text = "".join(each for each in text if each.isprintable())
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 1]}…"
