"""What can be chosen about a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from shoal.events import Observer
from shoal.joining.invitation import Invitation
from shoal.model.weights.files import Files
from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_rules import DEFAULT_RULE
from shoal.policy.placement.joining import Rule
from shoal.spans import Span


@dataclass(frozen=True)
class ServerConfig:
    """All options of a server. Where `None` is allowed, the server chooses."""

    model: str
    """A Hugging Face id, or the path of a folder with a checkpoint."""
    revision: str | None = None
    """The branch, tag or commit of a Hugging Face model; `None` is the default branch."""
    files: Files | None = None
    """The files of the model, if they come from elsewhere: `model` is only a name then."""
    invitation: Invitation | None = None
    """The invitation by which the server came, to invite others with; `None` is one of its own."""
    upload_limit: float | None = None
    """Bytes per second of the model's files that the server gives to machines that join; `None` is no limit, 0 none."""
    blocks: Span | None = None
    """The blocks to serve, always; `None` is those that help the swarm most."""
    num_blocks: int | None = None
    """The most blocks to hold if `blocks` is `None`; `None` is as many as fit into memory.

    The server may take fewer where that helps the swarm more. It does not check whether that number fits into memory.
    """
    placement: Rule = "graded"
    """The rule by which it chooses blocks that it is not given: "graded", or "petals", which is PETALS'."""
    move: bool = True
    """Go to other blocks when the swarm needs them more. Servers that are given `blocks` never do."""
    device: str = "cpu"
    """"cpu", "cuda" or "mps"; "auto" is the GPU if this machine has one that PyTorch's CUDA can use."""
    num_threads: int | None = None
    """Threads of the processor that compute; `None` is PyTorch's choice."""
    dtype: str = "auto"
    """"float32", "bfloat16" or "float16"; "auto" is the swarm's dtype (`shoal.policy.dtypes`)."""
    quantization: str = "none"
    """How the blocks' weights are held: a value of `shoal.model.linear.quantization.Quantization`."""
    cache_tokens: int | None = None
    """The size of the KV cache, in tokens of all sessions together; `None` is what memory allows."""
    cache_dtype: str = "auto"
    """"auto" is the dtype of the computation; "int8" takes half of the memory of bfloat16, and is not exact."""
    name: str = ""
    """What people call this server; it need not be unique."""
    zone: str | None = None
    """The place whose servers may fail together; `None` is what the addresses tell (`shoal.server.measuring.zones`)."""
    allow_uncertified: bool = False
    """Serve models of families whose outputs were not compared with Transformers'."""
    training: bool = True
    """Compute forward and backward passes for training, and not sessions only."""
    adapters: tuple[str, ...] = ()
    """Folders and Hugging Face ids of PEFT adapters that the server hosts for all clients."""
    serve_head: bool = False
    """Serve the output head too. It has an effect only if the last block is served."""

    announce_seconds: float = 20.0
    """Seconds between renewals of the server's record, which expires after three times as long."""
    ledger_folder: Path | None = None
    """Where is kept what this server computes for others, and what this machine's clients take.

    It decides who is served first when there is a queue (`shoal.ledgers`). `None` keeps nothing, and serves all alike.
    """
    idle_seconds: float = 300.0
    """A client that sends nothing for this many seconds, not even a ping, counts as gone."""
    drain_seconds: float = 0.0
    """How many seconds a server that stops leaves to its clients for moving their sessions to other servers."""
    limits: Limits = field(default_factory=Limits)
    """How the server divides its time and its memory between requests."""
    scheduling: str = DEFAULT_RULE
    """Whose tokens are computed next, and whose pages are taken: a rule of `shoal.policy.batching.pass_rules`."""
    max_length: int = 1 << 17
    """The most tokens of one sequence, for models whose config sets no limit."""
    measures_network: bool = True
    """Measure the network with some MiB to and from other servers, and again when sessions show something else."""
    observers: tuple[Observer, ...] = ()
    """Functions that are called with every event of this server (`shoal.events`)."""

    @property
    def moves(self) -> bool:
        """Whether the server may change its blocks."""
        return self.blocks is None and self.move
