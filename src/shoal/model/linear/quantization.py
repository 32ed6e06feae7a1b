"""Quantization of a server's blocks, by the quantizers of Transformers."""

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
from shoal.model.family_tables import LINEARS_READ_DIRECTLY


class Quantization(StrEnum):
    """How a server quantizes the weights of linear layers when it loads them. Servers announce these values."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"

    def config(self, dtype: torch.dtype) -> BitsAndBytesConfig | None:
        """The config for Transformers' quantizer; None for no quantization."""
        if self is Quantization.NONE:
            return None
        # Without this list, Transformers skips what it takes for the output head, but a body has no output head.
        skipped = sorted(LINEARS_READ_DIRECTLY)
        if self is Quantization.INT8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )


def quantizable_weights(family: Family, config: PreTrainedConfig) -> frozenset[str]:
    """The names, in the backbone, of the weights that are quantized: those of the linear layers of the blocks."""
    with torch.device("meta"):
        layers = family.backbone(text_config(config)).get_submodule(family.layers_name)
    return frozenset(
        f"{family.layers_name}.{name}.weight"
        for name, module in layers.named_modules()
        if type(module) in (nn.Linear, Conv1D) and name.rpartition(".")[2] not in LINEARS_READ_DIRECTLY
    )


def dequantized_bytes(family: Family, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[int, ...]:
    """The size of each block in bytes with ordinary weights of `dtype`."""
    with torch.device("meta"):
        layers = family.backbone(text_config(config)).get_submodule(family.layers_name)
    return tuple(sum(weight.numel() for weight in layer.parameters()) * dtype.itemsize for layer in layers)


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """The method ("gptq", "fp8", ...) by which the weights in a checkpoint are quantized; None for ordinary weights."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return None
    settings = described if isinstance(described, Mapping) else described.to_dict()
    method = settings.get("quant_method") or "bitsandbytes"
    return str(getattr(method, "value", method))


def quantized_config(
    family: Family, full: PreTrainedConfig, text: PreTrainedConfig, added: BitsAndBytesConfig | None
) -> PreTrainedConfig:
    """The config of a body: that of the language model `text`, with the quantization that the checkpoint has.

    A stored quantization lists the modules that it skips by their names in the model. They are replaced by their names
    in the body. Raises `UserError` if `added` would quantize weights that are quantized already.
    """
    method = stored_quantization(full) or stored_quantization(text)
    if method is None:
        return text
    if added is not None:
        raise UserError(
            f"the weights of this checkpoint are quantized already ({method})",
            hint="leave --quantization out: a server uses them as they are",
        )
    described = getattr(full, "quantization_config", None) or text.quantization_config
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
    """Raise `UserError` unless this machine has everything that the quantization needs.

    The quantization is that of `config`, or `added` if it happens at loading.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None and added is None:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about kernels that are not needed
    method = stored_quantization(config) or "bitsandbytes"
    try:
        settings = AutoHfQuantizer.merge_quantization_configs(stored, None) if added is None else added
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=added is None)
        quantizer.validate_environment(dtype=dtype, device_map={"": device}, weights_only=True)
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"weights quantized by {method!r} cannot be used here: {' '.join(str(error).split())[:300]}",
            hint="install what is missing, or choose a checkpoint or a --quantization that this machine supports",
        ) from error
