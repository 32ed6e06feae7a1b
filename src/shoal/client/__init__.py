"""The client: a Transformers model whose blocks are elsewhere."""

from shoal.client.blocks import RemoteBlocks
from shoal.client.inference_session import InferenceSession
from shoal.client.model import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)

RemoteSequential = RemoteBlocks
"""What PETALS calls them."""

__all__ = [
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "InferenceSession",
    "RemoteBlocks",
    "RemoteSequential",
]
