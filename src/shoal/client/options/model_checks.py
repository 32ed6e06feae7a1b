"""Options checked against the model that they are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from shoal.client.options.client_options import ClientOptions
from shoal.client.options.keywords import similar
from shoal.errors import UnsupportedOperation, UserError
from shoal.model.families import Family
from shoal.tensors import LOSSY, Encoding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a client can compute in: the dtypes in which hidden states travel."""


def changed_config(config: PreTrainedConfig, changes: Mapping[str, Any], known: Iterable[str] = ()) -> PreTrainedConfig:
    """The same config, with the caller's changes set on it; `known` are keywords for a hint at a misspelled one.

    Raises `UserError` for a name that the config does not have, and for another number of blocks.
    """
    num_blocks = config.num_hidden_layers
    for name, value in changes.items():
        if not hasattr(config, name):
            raise UserError(
                f"neither from_pretrained nor the config of {config.model_type!r} knows {name!r}",
                hint=similar(name, [*known, *config.to_dict()]),
            )
        setattr(config, name, value)
    if config.num_hidden_layers != num_blocks:  # configs have several names for it
        raise UserError(
            f"the swarm's model has {num_blocks} blocks, not {config.num_hidden_layers}",
            hint="slice them: model.transformer.h[2:5]",
        )
    return config


def dtype_of(dtype: torch.dtype | str, config: PreTrainedConfig) -> torch.dtype:
    """What the client computes in; "auto" is the config's own dtype. Raises `UserError` if it is not in `DTYPES`."""
    found = dtype
    if dtype == "auto":
        found = config.dtype or torch.float32
    elif isinstance(dtype, str):
        found = getattr(torch, dtype, dtype)
    if found not in DTYPES:
        raise UserError(f"{dtype} is not a dtype to compute in", hint="use auto, float32, bfloat16 or float16")
    return found


def device_of(device: torch.device | str) -> torch.device | str:
    """Where the client computes; "auto" is a GPU if there is one. Raises `UserError` for what this machine lacks."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"PyTorch {torch.__version__} cannot compute on {str(device)!r} here: {str(error).splitlines()[0]}",
            hint='use device="cpu" or "auto", or install a driver and a PyTorch that support the device',
        ) from None
    return device


def check_pins(options: ClientOptions, num_blocks: int) -> None:
    """Raises `UserError` for pinned blocks that the model does not have."""
    for span, _ in options.pinned:
        if span.end > num_blocks:
            raise UserError(f"blocks {span} cannot be pinned: the model has {num_blocks}")


def check_encodings(options: ClientOptions, family: Family, dtype: torch.dtype) -> None:
    """Raises `UnsupportedOperation` for an encoding that changes this family's outputs too much."""
    _check_encoding(options.wire, family, dtype, "travel in")
    _check_encoding(options.history, family, dtype, "are kept in")


def _check_encoding(encoding: Encoding, family: Family, dtype: torch.dtype, what: str) -> None:
    is_lossy = str(dtype).removeprefix("torch.") in LOSSY.get(encoding, ())
    if is_lossy and encoding not in family.encodings:
        raise UnsupportedOperation(
            f"{family.model_type!r} is not certified for hidden states that {what} {encoding}: small errors grow in it",
            hint='leave wire="raw" and history="exact"; docs/models.md lists the encodings of each family',
        )
