"""The commands that a server prints, with which others join its swarm and use its model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.server.config import ServerConfig

EXAMPLE_PROMPT = "Once upon a time"


def invitation(config: ServerConfig, address: str) -> list[str]:
    """Lines with both commands. They repeat each option of this server that changes the model or its numbers."""
    model = _options({"--revision": config.revision}, allow_uncertified=config.allow_uncertified)
    dtype = _options({"--dtype": _unless(config.dtype, "auto")})
    held = {
        "--quantization": _unless(config.quantization, "none"),
        "--cache-dtype": _unless(config.cache_dtype, "auto"),
    }
    name = shlex.quote(config.model)
    return [
        "Join this swarm from another machine:",
        f"  shoal serve {name}{model}{dtype}{_options(held)} --initial-peers {address}",
        "Use the model:",
        f'  shoal generate {name}{model}{dtype} "{EXAMPLE_PROMPT}" --initial-peers {address}',
    ]


def _unless(value: str, default: str) -> str | None:
    return None if value == default else value


def _options(values: Mapping[str, str | None], *, allow_uncertified: bool = False) -> str:
    options = "".join(f" {option} {shlex.quote(value)}" for option, value in values.items() if value)
    return options + (" --allow-uncertified" if allow_uncertified else "")
