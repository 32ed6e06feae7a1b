"""What a user may ask for when a model is opened, checked, and in our own words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from shoal.client.options.client_config import ClientConfig
from shoal.client.options.keywords import similar
from shoal.errors import UnsupportedOperation, UserError
from shoal.model.families import Family
from shoal.tensors import LOSSY, Encoding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those in which hidden states travel

WIRES: dict[str, Encoding] = {"auto": "raw", "raw": "raw", "bfloat16": "bfloat16", "int8": "int8"}

HISTORIES: dict[str, Encoding] = {"exact": "raw", "bfloat16": "bfloat16", "int8": "int8"}


def addresses_of(peers: str | Sequence[str]) -> tuple[str, ...]:
    """Those that a list, or a string with spaces or commas, names."""
    return tuple(peers.replace(",", " ").split() if isinstance(peers, str) else peers)


def changed_config(config: PreTrainedConfig, changes: Mapping[str, Any], known: Iterable[str] = ()) -> PreTrainedConfig:
    """A config with what the user changes about it; `known` are keywords that they may have meant.

    Raises `UserError`s.
    """
    num_blocks = config.num_hidden_layers
    for name, value in changes.items():
        if not hasattr(config, name):
            raise UserError(
                f"neither from_pretrained nor the config of {config.model_type!r} knows {name!r}",
                hint=similar(name, [*known, *config.to_dict()]),
            )
        setattr(config, name, value)
    if config.num_hidden_layers != num_blocks:  # by whatever name
        raise UserError(
            f"the swarm's model has {num_blocks} blocks, not {config.num_hidden_layers}",
            hint="slice them: model.transformer.h[2:5]",
        )
    return config


def encoding_of(wire: str) -> Encoding:
    """How tensors travel. Raises `UserError`."""
    if wire not in WIRES:
        raise UserError(f"{wire!r} is no way for tensors to travel", hint=", ".join(WIRES))
    return WIRES[wire]


def history_encoding_of(history: str) -> Encoding:
    """How inputs are kept. Raises `UserError`."""
    if history not in HISTORIES:
        raise UserError(f"{history!r} is no way to keep a history", hint=", ".join(HISTORIES))
    return HISTORIES[history]


def check_encoding(encoding: Encoding, family: Family, dtype: torch.dtype, what: str) -> None:
    """Raises `UnsupportedOperation` for an encoding that changes this family's outputs more than it should."""
    loses = str(dtype).removeprefix("torch.") in LOSSY.get(encoding, ())
    if loses and encoding not in family.encodings:
        raise UnsupportedOperation(
            f"{family.model_type!r} is not certified for hidden states that {what} {encoding}: small errors grow in it",
            hint='leave wire="raw" and history="exact"; docs/models.md lists the encodings of each family',
        )


def dtype_of(dtype: torch.dtype | str, config: PreTrainedConfig) -> torch.dtype:
    """What this side computes in. Raises `UserError`."""
    found = dtype
    if dtype == "auto":
        found = config.dtype or torch.float32
    elif isinstance(dtype, str):
        found = getattr(torch, dtype, dtype)
    if found not in DTYPES:
        raise UserError(f"{dtype} is no dtype to compute in", hint="auto, float32, bfloat16 or float16")
    return found


def device_of(device: torch.device | str) -> torch.device | str:
    """Where this side computes: "auto" is a GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def check_pins(config: ClientConfig, num_blocks: int) -> None:
    """Raises `UserError` for blocks that the model does not have."""
    for span, _ in config.pinned:
        if span.end > num_blocks:
            raise UserError(f"blocks {span} cannot be pinned: the model has {num_blocks}")


def check_top_k(config: ClientConfig) -> None:
    """Raises `UserError` for a wish that nobody can fulfil."""
    if config.head_top_k is None:
        return
    if not config.remote_head:
        raise UserError("head_top_k is for a head that a server computes", hint="add remote_head=True")
    if config.head_top_k < 1:
        raise UserError(f"the {config.head_top_k} likeliest tokens: at least one is needed")
