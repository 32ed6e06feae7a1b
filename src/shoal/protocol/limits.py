"""How large, how long and how many: the limits of everything that peers send, and the types of fields that carry
them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shoal.adapters import AdapterName

PROTOCOL = "/shoal/6"
"""The libp2p protocol id: peers that speak another version cannot open a stream at all."""
MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 256 * 1024 * 1024
MAX_STEP_TOKENS = 1024
"""The tokens, over all sequences of a batch, that one message carries at most; clients cut longer work in pieces.

A single token of every sequence always fits; for one sequence of a `Forward` or `Backward`, see `MAX_PASS_TOKENS`."""
MAX_PASS_TOKENS = 16 * 1024
"""The tokens of one sequence of a `Forward` or `Backward`: it cannot be cut, and some attention needs their square."""
MAX_LOGITS_BYTES = 64 * 1024 * 1024
"""The logits of one answer: a small question must not cost much memory. Beyond, clients compute the head themselves."""
MAX_BATCH = 1024
MAX_LENGTH = 1 << 22
MAX_BLOCKS = 4096
MAX_HOPS = 256
MAX_FACTORS = 200_000
"""Tensors of factors in a span: a bit for each fits into a header."""
MAX_TEXT = 256
MAX_STEPS_AHEAD = 16
"""The steps of one session that a server keeps beside the one that it computes."""
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Reason = Annotated[str, Field(max_length=1000, pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]  # it ends up on terminals
Block = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
Position = Annotated[int, Field(ge=0, le=MAX_LENGTH)]
Epoch = Annotated[int, Field(ge=0, lt=1 << 53)]
PeerId = Annotated[str, Field(min_length=1, max_length=64)]
Address = Annotated[str, Field(max_length=300, pattern=r"^[^\p{C}]*$")]
Link = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""A secret of the client and two servers: by it the one may push to the other's session."""
Adapted = Annotated[tuple[AdapterName | None, ...], Field(max_length=MAX_BLOCKS, strict=False)]
"""The adapter of each block of a span; nothing at all if no block has one."""
PassId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Seed = Annotated[int, Field(ge=0, lt=1 << 53)]
