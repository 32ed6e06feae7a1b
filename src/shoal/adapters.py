"""Adapters, as messages describe them: the layers that a client adds to a block.

The numbers of an adapter are its *factors*, one flat tensor for each block. The name of a block's adapter is the digest
of its description and its factors. A server checks the name, so that one client's adapter cannot be passed off as
another's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from shoal.strict import Strict

MAX_RANK = 4096
MAX_LAYERS = 256
"""The number of layers of an adapter in one block."""
DIGEST_BYTES = 16

Module = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]
"""The path of a layer in the block, such as "self_attn.q_proj"."""
HostedName = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""The name of a hosted adapter in all blocks: the digest of its files."""
AdapterName = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""The name of an adapter in one block."""


class Lora(Strict):
    """LoRA on a linear layer: `y + scaling * B(A(dropout(x)))` (arXiv 2106.09685), or DoRA (arXiv 2402.09353).

    The factors are A [rank, inputs] and B [outputs, rank], then B's bias [outputs] with `bias`, then the magnitudes
    [outputs] with `dora`.
    """

    kind: Literal["lora"] = "lora"
    module: Module
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)]
    scaling: Annotated[float, Field(allow_inf_nan=False)]
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    bias: bool = False
    dora: bool = False

    def shapes(self, num_inputs: int, num_outputs: int) -> list[tuple[int, ...]]:
        """The shapes of the factors."""
        optional = [(num_outputs,)] * (self.bias + self.dora)
        return [(self.rank, num_inputs), (num_outputs, self.rank), *optional]


class IA3(Strict):
    """IA3: factors multiply the outputs of a linear layer, or its inputs with `feedforward` (arXiv 2205.05638)."""

    kind: Literal["ia3"] = "ia3"
    module: Module
    feedforward: bool

    def shapes(self, num_inputs: int, num_outputs: int) -> list[tuple[int, ...]]:
        """The shape of the factors, as in PEFT."""
        return [(1, num_inputs) if self.feedforward else (num_outputs, 1)]


class Prompt(Strict):
    """A prompt: factors [tokens, hidden size] are added to the block's input at the first tokens of a sequence."""

    kind: Literal["prompt"] = "prompt"
    num_tokens: Annotated[int, Field(ge=1, le=1 << 16)]


Layer = Annotated[Lora | IA3 | Prompt, Field(discriminator="kind")]
Layers = Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MAX_LAYERS, strict=False)]


def adapter_name(block: int, layers: Sequence[Lora | IA3 | Prompt], dtype: str, factors: bytes | memoryview) -> str:
    """The name of an adapter of a block, from its description and the bytes of its factors."""
    digest = hashlib.blake2b(f"{block}\n".encode(), digest_size=DIGEST_BYTES)
    for layer in layers:
        digest.update(layer.model_dump_json().encode() + b"\n")
    digest.update(dtype.encode() + b"\n")
    digest.update(factors)
    return digest.hexdigest()


def adapter_cache_salt(salt: str, names: Sequence[str | None]) -> str:
    """The salt of cached pages that are computed with these adapters, one name or None for each block.

    Pages with other adapters, or of another tenant, get another salt. No choice of `salt` makes a salt without adapters
    equal to one with adapters, so that cached pages cannot be passed off as others.
    """
    if not any(names):
        return f"plain {salt}"
    digest = hashlib.blake2b(f"{len(salt)} {salt}".encode(), digest_size=DIGEST_BYTES)
    for name in names:
        digest.update(b"\n" + (name or "-").encode())
    return f"adapted {digest.hexdigest()}"
