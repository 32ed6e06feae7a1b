"""What a server is told at its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.server.engine.engine_limits import Limits
from shoal.spans import Span


@dataclass(frozen=True)
class ServerConfig:
    """Everything that can be chosen about a server. `None` means: decide for me."""

    model: str
    revision: str | None = None
    blocks: Span | None = None
    num_blocks: int | None = None
    device: str = "cpu"
    """"auto" is the GPU, if this machine has one that PyTorch's CUDA can use."""
    num_threads: int | None = None
    """Of the processor, for computing; `None` leaves it to torch."""
    dtype: str = "auto"
    """"auto" is what the swarm computes in (`shoal.policy.dtypes`)."""
    quantization: str = "none"
    cache_tokens: int | None = None
    cache_dtype: str = "auto"
    """"auto" is the dtype of the computation; "int8" takes half of bfloat16's room, and is not exact."""
    name: str = ""
    allow_uncertified: bool = False
    training: bool = True
    """Compute forward and backward passes too, not sessions only."""
    adapters: tuple[str, ...] = ()
    """Folders and Hugging Face ids of adapters to host for everybody."""
    serve_head: bool = False
    """Hold the output head too, so that clients need not; of use where the last block is held."""

    announce_seconds: float = 20.0
    """Records are renewed this often, and live three times as long."""
    idle_seconds: float = 300.0
    """A client that says nothing for so long, not even a ping, is gone."""
    drain_seconds: float = 0.0
    """At the end, so much time is left to clients for taking their sessions elsewhere."""
    limits: Limits = field(default_factory=Limits)
    """How time and room are divided."""
    max_length: int = 1 << 17
    """Tokens of one sequence, where the model itself sets no lower limit."""
