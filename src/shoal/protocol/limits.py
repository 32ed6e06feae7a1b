"""The limits of everything that peers send, and the types of the fields that they bound."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shoal.adapters import AdapterName

MAX_HEADER_BYTES = 64 * 1024
"""The JSON of one message: room for the longest lists that the limits below allow."""
MAX_PAYLOAD_BYTES = 256 * 1024 * 1024
"""The tensors of one message, on the wire and decoded: `MAX_STEP_TOKENS` of the widest models, and little memory."""
MAX_STEP_TOKENS = 1024
"""The tokens, of all sequences of a batch, that one message carries at most; clients cut longer inputs into pieces.

A single token of every sequence always fits. `MAX_PASS_TOKENS` is for one sequence of a `Forward` or `Backward`."""
MAX_PASS_TOKENS = 16 * 1024
"""The tokens of one sequence of a `Forward` or `Backward`: it cannot be cut, and some attention needs their square."""
MAX_PUSHED_BYTES = 16 * 1024 * 1024
"""The inputs of a pass that one server pushes to the next, where they are more than what one step could carry."""
MAX_LOGITS_BYTES = 64 * 1024 * 1024
"""The logits of one answer: a small request must not cost much memory. For more, clients use their own head."""
MAX_BATCH = 1024
"""The sequences of a batch: as many as one message has tokens."""
MAX_LENGTH = 1 << 22
"""The tokens of a sequence, and the likeliest tokens of one position: beyond every model there is."""
MAX_TRANSFER_BYTES = 4 << 20
"""The bytes with which a peer measures its network, at a time."""
MAX_LISTING_BYTES = 1 << 24
"""The bytes of a piece of a file, and of the list of all pieces."""
MAX_INVITATION = 4000
"""The characters of an invitation."""
MAX_BLOCKS = 4096
"""The blocks of a model: beyond every model there is."""
MAX_HOPS = 256
"""The servers that a step may be pushed through: more than a route has, and an end to rings linked into a loop."""
MAX_FACTORS = 200_000
"""Tensors of factors in a span: a bit for each fits into a header."""
MAX_SUMMED_PASSES = 1 << 20
"""The backward passes whose gradients are in one sum: beyond every batch there is."""
MAX_TEXT = 256
"""The characters of a name."""
MAX_ADDRESS = 300
"""The characters of a multiaddress."""
MAX_STEPS_AHEAD = 32
"""The steps of one session that wait on a server beside the one that it computes: their inputs stay in memory."""
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Reason = Annotated[str, Field(max_length=1000, pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]  # users see it on terminals
Block = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
Goodput = Annotated[int, Field(ge=0, lt=1 << 53)]
Position = Annotated[int, Field(ge=0, le=MAX_LENGTH)]
Epoch = Annotated[int, Field(ge=0, lt=1 << 53)]
PeerId = Annotated[str, Field(min_length=1, max_length=64)]
Address = Annotated[str, Field(max_length=MAX_ADDRESS, pattern=r"^[^\p{C}]*$")]
Link = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""A secret that the client gives two servers: it allows the one to push steps to the session on the other."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""32 bytes of BLAKE2b."""
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
"""64 bytes of Ed25519."""
Adapted = Annotated[tuple[AdapterName | None, ...], Field(max_length=MAX_BLOCKS, strict=False)]
"""The name of the adapter of each block of a span; empty if no block has one."""
PassId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Seed = Annotated[int, Field(ge=0, lt=1 << 53)]
