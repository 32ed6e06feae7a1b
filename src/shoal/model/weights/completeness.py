"""Whether a checkpoint has exactly the tensors that a model needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.errors import CheckpointError


def check_loaded(info: Mapping[str, Any]) -> None:
    """Check the loading info of Transformers' `from_pretrained`.

    Raises `CheckpointError` if the checkpoint lacks a tensor of the model, has one that the model does not know, or has
    one of another shape.
    """
    if info["missing_keys"]:
        raise CheckpointError(f"the checkpoint lacks {_first_names(sorted(info['missing_keys']))}")
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(f"{name} is {list(found)} in the checkpoint but {list(expected)} in the model")
    if info["unexpected_keys"]:
        raise CheckpointError(f"the model has no place for {_first_names(sorted(info['unexpected_keys']))}")
    if info.get("error_msgs"):
        raise CheckpointError("; ".join(info["error_msgs"]))


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
