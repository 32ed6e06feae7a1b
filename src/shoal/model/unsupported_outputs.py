"""What callers of a client's model may ask of Transformers, and a swarm cannot give: refused, never left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from shoal.errors import UnsupportedOperation, UserError


def check_outputs(config: PreTrainedConfig, arguments: Mapping[str, Any]) -> None:
    """Raises `UnsupportedOperation` for what is inside the blocks, asked for in a call or in the config."""
    for name in ("output_hidden_states", "output_attentions"):
        asked = arguments.get(name)
        if asked is None:
            asked = getattr(config, name, None)
        if asked is not None and asked is not False:  # a number is an index of hidden states, 0 too
            raise UnsupportedOperation(
                f"{name}: what is inside the blocks stays on the servers",
                hint="model.transformer.h[:3](hidden) is hidden states after three blocks; attentions cannot be had",
            )


def check_cache_choice(choice: str | None, cache: Any) -> None:
    """Raises `UserError` for a `cache_implementation` that would change numbers, or is given beside a cache."""
    if choice is None:
        return
    if cache is not None:
        raise UserError(
            "cache_implementation and past_key_values in one call", hint="a session is the cache: leave the former out"
        )
    if "quantized" in choice:
        raise UserError(
            f"cache_implementation={choice!r}: the cache is on the servers",
            hint="shoal serve --cache-dtype int8 keeps it in half of the room",
        )
