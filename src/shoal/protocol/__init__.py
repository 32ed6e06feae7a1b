"""Every message that peers exchange, typed, with its limits. It imports the ground only.

A stream carries frames; a frame is one message and the tensors that it declares (`docs/protocol.md` has the bytes).
The first message of a stream is `Open` for a session, `Forward`, `Backward` or `Norms` for single computations, a `Step`
with a `link`, which one server pushes to the next, or a `Transfer`. `Adapter`s may come before the first four. Every
header is parsed here before any other code sees it: an unknown kind, field or type, or a number beyond its limit, is
refused.
"""

from shoal.protocol.adapters import Adapter, AdapterStored, NotCached
from shoal.protocol.control import Close, Leaving, Ping, Pong
from shoal.protocol.failures import FAILURES, Failure, FailureCode
from shoal.protocol.limits import (
    MAX_BATCH,
    MAX_BLOCKS,
    MAX_FACTORS,
    MAX_HEADER_BYTES,
    MAX_HOPS,
    MAX_LENGTH,
    MAX_LOGITS_BYTES,
    MAX_PASS_TOKENS,
    MAX_PAYLOAD_BYTES,
    MAX_STEP_TOKENS,
    MAX_STEPS_AHEAD,
    MAX_TEXT,
    MAX_TRANSFER_BYTES,
    PROTOCOL,
    Adapted,
    Address,
    Block,
    Epoch,
    Link,
    PassId,
    PeerId,
    Position,
    Reason,
    Seed,
    Text,
)
from shoal.protocol.message import Message
from shoal.protocol.parsing import (
    REPLY_KINDS,
    REQUEST_KINDS,
    SESSION_KINDS,
    TRANSFER_KINDS,
    AnyMessage,
    ProtocolViolation,
    dump,
    parse,
)
from shoal.protocol.passes import Backward, FactorIndices, Forward, Norms, NormsResult, PassResult
from shoal.protocol.session import Downstream, Open, Opened, Rewind, SetNeighbors, Step, StepResult, Unreached, Upstream
from shoal.protocol.transfers import Filler, Transfer

__all__ = [
    "FAILURES",
    "MAX_BATCH",
    "MAX_BLOCKS",
    "MAX_FACTORS",
    "MAX_HEADER_BYTES",
    "MAX_HOPS",
    "MAX_LENGTH",
    "MAX_LOGITS_BYTES",
    "MAX_PASS_TOKENS",
    "MAX_PAYLOAD_BYTES",
    "MAX_STEPS_AHEAD",
    "MAX_STEP_TOKENS",
    "MAX_TEXT",
    "MAX_TRANSFER_BYTES",
    "PROTOCOL",
    "REPLY_KINDS",
    "REQUEST_KINDS",
    "SESSION_KINDS",
    "TRANSFER_KINDS",
    "Adapted",
    "Adapter",
    "AdapterStored",
    "Address",
    "AnyMessage",
    "Backward",
    "Block",
    "Close",
    "Downstream",
    "Epoch",
    "FactorIndices",
    "Failure",
    "FailureCode",
    "Filler",
    "Forward",
    "Leaving",
    "Link",
    "Message",
    "Norms",
    "NormsResult",
    "NotCached",
    "Open",
    "Opened",
    "PassId",
    "PassResult",
    "PeerId",
    "Ping",
    "Pong",
    "Position",
    "ProtocolViolation",
    "Reason",
    "Rewind",
    "Seed",
    "SetNeighbors",
    "Step",
    "StepResult",
    "Text",
    "Transfer",
    "Unreached",
    "Upstream",
    "dump",
    "parse",
]
