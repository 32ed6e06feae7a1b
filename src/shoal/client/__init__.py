"""The client: a Transformers model whose blocks run on servers. It imports `shoal.net`, `shoal.model` and below.

Its names are imported on first use, so that `shoal.client.options` is there without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.client.auto_model import (
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
    )
    from shoal.client.blocks import RemoteSequential
    from shoal.client.inference_session import InferenceSession

_MODULES = {
    "AutoDistributedModel": "auto_model",
    "AutoDistributedModelForCausalLM": "auto_model",
    "AutoDistributedModelForSequenceClassification": "auto_model",
    "InferenceSession": "inference_session",
    "RemoteSequential": "blocks",
}

__all__ = [
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "InferenceSession",
    "RemoteSequential",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
