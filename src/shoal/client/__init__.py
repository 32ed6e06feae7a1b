"""The client: a Transformers model whose blocks are elsewhere."""

from shoal.client.blocks import RemoteBlocks
from shoal.client.inference import InferenceSession
from shoal.client.model import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)

__all__ = [
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "InferenceSession",
    "RemoteBlocks",
]
