"""How a server's weights are quantized: by Transformers' own quantizers, for the blocks alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig

from shoal.errors import UserError
from shoal.model.families import Family, text_config
from shoal.model.linear.packed_linear import READ_BY_MODELS

DEQUANTIZED_ON_CPUS = frozenset({"fp8", "mxfp4"})
"""Stored quantizations without a kernel for CPUs: Transformers makes plain weights of them."""


class Quantization(StrEnum):
    """What becomes of the weights of linear layers when a server loads them; the values are announced."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"

    def config(self, dtype: torch.dtype) -> BitsAndBytesConfig | None:
        """What Transformers is told."""
        if self is Quantization.NONE:
            return None
        # Without a list Transformers leaves out what it takes for the output head, and a body has none.
        skipped = sorted(READ_BY_MODELS)
        if self is Quantization.INT8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )

    def weight_bytes(self, dtype: torch.dtype) -> float:
        """What a weight of a linear layer takes, with its share of the scales: one for every 64, or for every row."""
        return {Quantization.NONE: float(dtype.itemsize), Quantization.INT8: 1.01, Quantization.NF4: 0.5 + 4 / 64}[self]


def quantizable_weights(family: Family, config: PreTrainedConfig) -> frozenset[str]:
    """The weights of a model's blocks that are quantized, by their names in the backbone: those of linear layers."""
    with torch.device("meta"):
        layers = family.backbone(text_config(config)).get_submodule(family.layers_name)
    return frozenset(
        f"{family.layers_name}.{name}.weight"
        for name, module in layers.named_modules()
        if type(module) in (nn.Linear, Conv1D) and name.rpartition(".")[2] not in READ_BY_MODELS
    )


def dequantized_bytes(family: Family, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[int, ...]:
    """The size of each block with plain weights."""
    with torch.device("meta"):
        layers = family.backbone(text_config(config)).get_submodule(family.layers_name)
    return tuple(sum(weight.numel() for weight in layer.parameters()) * dtype.itemsize for layer in layers)


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """The method by which a checkpoint's weights are quantized already ("gptq", "fp8", ...), or `None`."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return None
    settings = described if isinstance(described, Mapping) else described.to_dict()
    method = settings.get("quant_method") or "bitsandbytes"
    return str(getattr(method, "value", method))


def quantized_config(
    family: Family, whole: PreTrainedConfig, text: PreTrainedConfig, added: BitsAndBytesConfig | None
) -> PreTrainedConfig:
    """The config of a body: the language model's, and how the checkpoint is quantized already, if it is.

    That says which modules are left out, by their names in the whole model: they are given the names of the body.
    Raises `UserError` if weights are to be quantized (`added`) that are quantized already.
    """
    method = stored_quantization(whole) or stored_quantization(text)
    if method is None:
        return text
    if added is not None:
        raise UserError(
            f"the weights of this checkpoint are quantized already ({method})",
            hint="leave --quantization out: they are used as they are",
        )
    described = getattr(whole, "quantization_config", None) or text.quantization_config
    settings = described if isinstance(described, Mapping) else described.to_dict()
    text = copy.copy(text)
    text.quantization_config = {name: _as_in_body(family, value) for name, value in settings.items()}
    return text


def _as_in_body(family: Family, value: Any) -> Any:
    if isinstance(value, list):
        return [_as_in_body(family, each) for each in value]
    if isinstance(value, str) and family.backbone_path:
        return value.removeprefix(f"{family.backbone_path}.")
    return value


def check_quantizer(
    config: PreTrainedConfig, added: BitsAndBytesConfig | None, *, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Raise `UserError` unless everything that this quantization needs is installed here."""
    stored = getattr(config, "quantization_config", None)
    if stored is None and added is None:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that it can do without
    method = stored_quantization(config) or "bitsandbytes"
    try:
        settings = AutoHfQuantizer.merge_quantization_configs(stored, None) if added is None else added
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=added is None)
        quantizer.validate_environment(dtype=dtype, device_map={"": device}, weights_only=True)
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"weights quantized by {method!r} cannot be used here: {' '.join(str(error).split())[:300]}",
            hint="install what is missing, or use a checkpoint or a --quantization that this machine can compute with",
        ) from error
