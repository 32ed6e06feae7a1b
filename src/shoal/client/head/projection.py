"""The client's own output projection, the largest product that it computes: quantized, or packed to be faster."""

from __future__ import annotations

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.model.linear.packed_linear import enable_packed_copy
from shoal.model.linear.quantization import Quantization, check_quantizer
from shoal.model.linear.quantized_linear import quantize_linear


def projection_of(model: PreTrainedModel) -> tuple[str, nn.Linear] | None:
    """The name and the module of a model's projection to its vocabulary, or `None` if it has none."""
    projection = model.get_output_embeddings() if model.can_generate() else None
    names = [name for name, child in model.named_children() if child is projection]
    return (names[0], projection) if names and isinstance(projection, nn.Linear) else None


def prepare_projection(model: PreTrainedModel, *, quantization: str, remote: bool, dtype: torch.dtype) -> None:
    """Quantize the projection, or without a quantization let it keep a packed copy of its weights if memory allows.

    Raises `UserError` for an unknown quantization, and for one that this model or device cannot have.
    """
    if quantization not in list(Quantization):
        raise UserError(f"there is no quantization {quantization!r}", hint=f"use one of {', '.join(Quantization)}")
    found, settings = projection_of(model), Quantization(quantization).config(dtype)
    if settings is None:
        if found is not None:
            enable_packed_copy(found[1], free_bytes=psutil.virtual_memory().available)
        return
    if found is None:
        raise UserError(f"{type(model).__name__} has no output head to quantize")
    if remote:
        raise UserError(
            "a remote output head cannot be quantized by the client",
            hint="use either remote_head or head_quantization",
        )
    name, projection = found
    device = projection.weight.device
    check_quantizer(model.config, settings, dtype=dtype, device=device)
    setattr(model, name, quantize_linear(projection, settings, dtype=dtype))
