"""What a client adds to a block: small layers of its own, called an *adapter*, described in a few words.

The numbers of an adapter are its *factors*, one flat tensor for each block. An adapter of a block is known by the
digest of its description and its factors: whoever says the name means exactly these numbers, and a server that checks
what it is sent cannot be made to mistake one client's for another's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from shoal.strict import Strict

MAX_RANK = 4096
MAX_LAYERS = 256
"""Of an adapter, in one block."""
DIGEST_BYTES = 16

Module = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]
"""Where in the block, in the model's own names: "self_attn.q_proj"."""
HostedName = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""Of an adapter that others have trained and everybody may have, in all blocks: the digest of its files."""
AdapterName = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Lora(Strict):
    """`y + scaling * B(A(dropout(x)))` for a linear layer (arXiv 2106.09685), or what DoRA makes of it (2402.09353).

    Factors: A [rank, inputs], B [outputs, rank], with `bias` that of B [outputs], with `dora` the magnitudes [outputs].
    """

    kind: Literal["lora"] = "lora"
    module: Module
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)]
    scaling: Annotated[float, Field(allow_inf_nan=False)]
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    bias: bool = False
    dora: bool = False

    def shapes(self, num_inputs: int, num_outputs: int) -> list[tuple[int, ...]]:
        """The shapes of its factors."""
        optional = [(num_outputs,)] * (self.bias + self.dora)
        return [(self.rank, num_inputs), (num_outputs, self.rank), *optional]


class IA3(Strict):
    """A linear layer whose outputs, or as `feedforward` its inputs, are multiplied by factors (arXiv 2205.05638)."""

    kind: Literal["ia3"] = "ia3"
    module: Module
    feedforward: bool

    def shapes(self, num_inputs: int, num_outputs: int) -> list[tuple[int, ...]]:
        """The shape of its factors, as PEFT has it."""
        return [(1, num_inputs) if self.feedforward else (num_outputs, 1)]


class Prompt(Strict):
    """Factors [tokens, hidden size] that are added to what the first tokens of a sequence bring into the block."""

    kind: Literal["prompt"] = "prompt"
    num_tokens: Annotated[int, Field(ge=1, le=1 << 16)]


Layer = Annotated[Lora | IA3 | Prompt, Field(discriminator="kind")]
Layers = Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MAX_LAYERS, strict=False)]


def adapter_name(block: int, layers: Sequence[Lora | IA3 | Prompt], dtype: str, factors: bytes | memoryview) -> str:
    """What an adapter of a block is called."""
    digest = hashlib.blake2b(f"{block}\n".encode(), digest_size=DIGEST_BYTES)
    for layer in layers:
        digest.update(layer.model_dump_json().encode() + b"\n")
    digest.update(dtype.encode() + b"\n")
    digest.update(factors)
    return digest.hexdigest()


def salted(salt: str, names: Sequence[str | None]) -> str:
    """A tenant's salt for what is computed with these adapters, one for each block: no others' pages are the same.

    Whatever a tenant chooses, it is none that adapters give: nobody can pass off pages without them as pages with them.
    """
    if not any(names):
        return f"plain {salt}"
    digest = hashlib.blake2b(f"{len(salt)} {salt}".encode(), digest_size=DIGEST_BYTES)
    for name in names:
        digest.update(b"\n" + (name or "-").encode())
    return f"adapted {digest.hexdigest()}"
