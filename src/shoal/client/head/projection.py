"""The client's own output projection: the largest product that it computes, made as quick as it was asked for."""

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
    """The name and the module of a model's projection to its vocabulary; None for a model that has none."""
    projection = model.get_output_embeddings() if model.can_generate() else None
    names = [name for name, child in model.named_children() if child is projection]
    return (names[0], projection) if names and isinstance(projection, nn.Linear) else None


def prepare_projection(model: PreTrainedModel, *, quantization: str, remote: bool, dtype: torch.dtype) -> None:
    """Quantize the projection, or let it keep a packed copy of itself if there is room.

    Raises `UserError` for a quantization that cannot be had.
    """
    if quantization not in list(Quantization):
        raise UserError(f"there is no quantization {quantization!r}", hint=", ".join(Quantization))
    found, settings = projection_of(model), Quantization(quantization).config(dtype)
    if settings is None:
        if found is not None:
            enable_packed_copy(found[1], free_bytes=psutil.virtual_memory().available)
        return
    if found is None:
        raise UserError(f"{type(model).__name__} has no output head that could be quantized")
    if remote:
        raise UserError(
            "an output head that a server computes is not quantized here",
            hint="choose one of remote_head and head_quantization",
        )
    name, projection = found
    device = projection.weight.device
    check_quantizer(model.config, settings, dtype=dtype, device=device)
    setattr(model, name, quantize_linear(projection, settings, dtype=dtype))
