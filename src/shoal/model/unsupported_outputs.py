"""Outputs and caches of Transformers that a swarm cannot give. The client refuses them instead of ignoring them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from shoal.errors import UnsupportedOperation, UserError


def check_outputs(config: PreTrainedConfig, arguments: Mapping[str, Any]) -> None:
    """Check that neither a call nor the config asks for hidden states or attentions inside the blocks.

    Raises `UnsupportedOperation` if one does.
    """
    for name in ("output_hidden_states", "output_attentions"):
        value = arguments.get(name)
        if value is None:
            value = getattr(config, name, None)
        if value is not None and value is not False:  # a number is an index of hidden states, and so is 0
            raise UnsupportedOperation(
                f"{name}: what is inside the blocks stays on the servers",
                hint="model.transformer.h[:3](hidden) gives hidden states after three blocks; attentions are not "
                "available",
            )


def check_cache_choice(choice: str | None, cache: Any) -> None:
    """Check a call's `cache_implementation`.

    Raises `UserError` if it would change the results, or if the call has a cache already.
    """
    if choice is None:
        return
    if cache is not None:
        raise UserError("cache_implementation and past_key_values in one call", hint="leave cache_implementation out")
    if "quantized" in choice:
        raise UserError(
            f"cache_implementation={choice!r}: the cache is on the servers",
            hint="shoal serve --cache-dtype int8 halves its memory",
        )
