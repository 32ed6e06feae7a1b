"""What an attention backend is: two methods, called by every packed pass.

`metadata` describes a pass once, before its first block. `attend` runs in every block: it writes the new keys and
values into the cache and attends to all that the cache then holds of each sequence. `shoal.server.kv.sdpa_attention`
is the reference; another backend has to give its numbers (`shoal.server.attention_backends`).

A pass holds the new tokens of many sequences in a row. A sequence's tokens are at three places at once:

    in the sequence   0 ............ num_computed_tokens ............ num_tokens
                      |   in the cache    |        new in this pass        |
    in the pass                         start ......................... end
    in the cache      pages[i // PAGE_TOKENS], token i % PAGE_TOKENS, for each i from 0 to num_tokens
"""

# T new tokens of a pass, S all tokens of a sequence, H heads of queries, J heads of keys, K size of a key, V of a value

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, Self, TypeVar

from torch import Tensor

from shoal.errors import UnsupportedOperation

M = TypeVar("M")

WITHOUT_EFFECT = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"})
"""Options that Transformers' layers pass and that have no effect on a packed pass."""


class Feature(StrEnum):
    """What the reference computes, and a faster backend perhaps not."""

    WINDOWS = "sliding windows"
    SOFT_CAPS = "soft caps"
    SINKS = "sinks"
    PADDING = "padding"


@dataclass(frozen=True)
class PackedSequence:
    """One sequence of a pass: its pages in the cache, and the range `start` to `end` of its new tokens in the pass.

    `mask_S` is false where a token is padding, both of the cached tokens and of the new ones; `None` means no padding.
    """

    pages: tuple[int, ...]
    num_computed_tokens: int
    start: int
    end: int
    mask_S: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens the sequence has with the new ones."""
        return self.num_computed_tokens + self.end - self.start

    @property
    def decodes(self) -> bool:
        """Whether it has one new token and no padding."""
        return self.end - self.start == 1 and self.mask_S is None


@dataclass(frozen=True)
class PackedBatch:
    """The sequences of a pass, and the slot of each new token: its page times `PAGE_TOKENS`, plus its place in it."""

    sequences: tuple[PackedSequence, ...]
    slot_mapping_T: Tensor

    @property
    def features(self) -> frozenset[Feature]:
        """What a backend has to support for this pass, whatever the layers want."""
        return frozenset({Feature.PADDING} if any(each.mask_S is not None for each in self.sequences) else ())


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer says about its attention.

    `scaling` multiplies the scores, `K ** -0.5` by default. `sliding_window` is how many tokens a token sees, itself
    included; `None` is all of them. `softcap` bounds the scores. `sinks_H` are scores of nothing: they take weight, and
    add no value.
    """

    scaling: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None

    @property
    def features(self) -> frozenset[Feature]:
        """What a backend has to support for this layer."""
        wanted = {
            Feature.WINDOWS: self.sliding_window,
            Feature.SOFT_CAPS: self.softcap,
            Feature.SINKS: self.sinks_H,
        }
        return frozenset(feature for feature, value in wanted.items() if value is not None)

    @classmethod
    def from_layer(cls, options: Mapping[str, Any]) -> Self:
        """The keywords with which Transformers' layers call their attention.

        Raises `UnsupportedOperation` for a keyword that no backend computes.
        """
        names = {"scaling": "scaling", "sliding_window": "sliding_window", "softcap": "softcap", "s_aux": "sinks_H"}
        unknown = sorted(options.keys() - names.keys() - WITHOUT_EFFECT)
        if unsupported := [name for name in unknown if options[name] is not None]:
            raise UnsupportedOperation(f"packed attention does not support {unsupported[0]}")
        return cls(**{field: options[name] for name, field in names.items() if name in options})


class AttentionBackend(Protocol[M]):
    """Attention over a paged cache. Both methods are called on the compute thread."""

    def metadata(self, batch: PackedBatch) -> M:
        """What `attend` needs to know of a pass, the same for all of its blocks."""
        ...

    def attend(
        self, metadata: M, block: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """Write a block's new keys and values into the cache, and return its outputs [1, T, H, V].

        `query` is [1, H, T, K], `key` is [1, J, T, K] and `value` is [1, J, T, V]. A token attends to the tokens of its
        own sequence up to itself, as `options` say. The output of a token that sees only padding is 0.
        """
        ...


class PartialBackend(AttentionBackend[M], Protocol[M]):
    """A backend that computes what needs no other features than its own."""

    @property
    def features(self) -> frozenset[Feature]:
        """What it supports."""
        ...


def attend_with(
    backend: AttentionBackend[M], metadata: M, block: int, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Tensor:
    """`AttentionBackend.attend` with a layer's keywords: an `AttentionFunction` once the first two are bound."""
    return backend.attend(metadata, block, query, key, value, AttentionOptions.from_layer(options))
