"""What `shoal serve` prints when it is ready: one fact per line, and the commands to join and use the swarm."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shoal.cli.terminal.console import tokens_per_second
from shoal.joining.invite_code import InviteCode
from shoal.net.addressing.reach_words import in_words

if TYPE_CHECKING:
    from shoal.server.config import ServerConfig
    from shoal.server.server import Server

EXAMPLE_PROMPT = "Once upon a time"


def describe(
    server: Server,
    config: ServerConfig,
    code: InviteCode | None,
    came_by: Sequence[str] = (),
    *,
    is_closed: bool = False,
) -> str:
    """The text. `code` is None if the server cannot invite others yet. `came_by`: addresses of other members.

    `is_closed`: the swarm has a key.
    """
    info, model = server.info, server.model
    way = ",".join([info.addresses[0], *came_by[:1]]) + (" --swarm-key FILE" if is_closed else "")
    facts = [
        ("model", f"{model.name} ({model.family}, {model.num_blocks} blocks)"),
        ("blocks", f"{info.span} and the output head" if info.head else str(info.span)),
        *([("because", info.reason)] if config.blocks is None and info.reason else []),
        ("dtype", f"{info.dtype} on {config.device}"),
        *([("quantized", info.quantization)] if info.quantization != "none" else []),
        *([("attention", info.attention)] if info.attention else []),
        ("decoding", f"{tokens_per_second(info.decode_speed)} through these blocks"),
        ("prefill", tokens_per_second(info.prefill_speed)),
        ("cache", f"{server.engine.cache_tokens:,} tokens"),
        ("weights", info.fingerprint),
        ("peer", info.peer),
        ("reached", in_words(server.reach, info.addresses)),
        *(("address", each) for each in info.addresses),
        *([("code", str(code))] if code is not None else []),
        *([("closed", "the code and the key's file let others in: keep both secret")] if is_closed else []),
    ]
    lines = [f"{fact:<10}{value}" for fact, value in facts]
    lines += ["", *commands(config, way, code), ""]
    if config.name:
        lines.insert(0, f"{'name':<10}{config.name}")
    return "\n".join(lines)


def commands(config: ServerConfig, way: str, code: InviteCode | None) -> list[str]:
    """Lines with the commands for others. They repeat the options that change the model or its results.

    `way`: addresses of members, with commas between them, and the option for the key. A server without a copy of the
    model has only a name for it, by which others cannot find it.
    """
    by_code = [] if code is None else ["Join this swarm from another machine:", f"  shoal join {code}"]
    use = [] if code is None else ["Use the model from any machine:", f'  shoal generate {code} "{EXAMPLE_PROMPT}"']
    if config.files is not None:
        return by_code + use
    model = _render_options({"--revision": config.revision}, allow_uncertified=config.allow_uncertified)
    dtype = _render_options({"--dtype": _unless(config.dtype, "auto")})
    storage = {
        "--quantization": _unless(config.quantization, "none"),
        "--cache-dtype": _unless(config.cache_dtype, "auto"),
    }
    name = shlex.quote(config.model)
    return [
        *by_code,
        "or, where a copy of the model is:" if by_code else "Join this swarm from another machine:",
        f"  shoal serve {name}{model}{dtype}{_render_options(storage)} --initial-peers {way}",
        *use,
        "or, where a copy of the model is:" if use else "Use the model:",
        f'  shoal generate {name}{model}{dtype} "{EXAMPLE_PROMPT}" --initial-peers {way}',
    ]


def _unless(value: str, default: str) -> str | None:
    return None if value == default else value


def _render_options(values: Mapping[str, str | None], *, allow_uncertified: bool = False) -> str:
    options = "".join(f" {option} {shlex.quote(value)}" for option, value in values.items() if value)
    return options + (" --allow-uncertified" if allow_uncertified else "")
