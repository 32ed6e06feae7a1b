"""shoal: one large language model on many ordinary machines that come and go.

from shoal import AutoDistributedModelForCausalLM

model = AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=[ADDRESS])
model.generate(**inputs, max_new_tokens=20)

This file holds the names that users import, and imports them from `shoal.client` and `shoal.errors` on first use.
Beside it stand the packages and, as loose modules, the ground: words that all packages use and that import only each
other.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, cast

from shoal.host.large_imports import forbid_hub_kernels

if TYPE_CHECKING:
    from shoal.client import (
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
        InferenceSession,
        RemoteSequential,
    )
    from shoal.errors import (
        BootstrapFailed,
        CheckpointError,
        MissingBlocks,
        PeerError,
        RequestRejected,
        ServerBusy,
        ServerLost,
        ShoalError,
        SwarmError,
        UnsupportedModel,
        UnsupportedOperation,
        UserError,
    )

_CLIENT = (
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "InferenceSession",
    "RemoteSequential",
)

__all__ = [
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "BootstrapFailed",
    "CheckpointError",
    "InferenceSession",
    "MissingBlocks",
    "PeerError",
    "RemoteSequential",
    "RequestRejected",
    "ServerBusy",
    "ServerLost",
    "ShoalError",
    "SwarmError",
    "UnsupportedModel",
    "UnsupportedOperation",
    "UserError",
]


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Whether to show a log line of bitsandbytes: not the one about a kernel that it can do without."""
    return "kernels-community" not in record.getMessage()


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_worth_reading)
forbid_hub_kernels(os.environ, cast("dict[str, Any]", sys.modules))


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because PyTorch takes seconds and `shoal --help` does not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _CLIENT:
        from shoal import client

        return getattr(client, name)
    from shoal import errors

    return getattr(errors, name)
