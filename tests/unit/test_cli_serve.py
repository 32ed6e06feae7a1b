"""The commands that a server prints for others to join its swarm and to use its model."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.bundled import STORIES
from shoal.cli.generate import load_tokenizer
from shoal.cli.terminal import serve_output
from shoal.cli.terminal.serve_output import describe
from shoal.errors import UserError
from shoal.joining.invite_code import InviteCode, Way
from shoal.model.weights.files import LocalFiles
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.network.reachability import Reach
from shoal.server.config import ServerConfig
from shoal.spans import Span

ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/A"
CODE = InviteCode("0123456789abcdef", (Way("203.0.113.5", 31337),))


def commands(config: ServerConfig) -> tuple[list[str], list[str]]:
    """The arguments of both commands, to join the swarm and to use the model."""
    join, use = (line.strip() for line in serve_output.commands(config, ADDRESS, None) if line.startswith("  shoal "))
    return shlex.split(join)[1:], shlex.split(use)[1:]


def test_a_server_prints_both_commands_with_its_dtype():
    info = ServerInfo(
        peer="A", span=Span(0, 4), state=ServerState.ONLINE, fingerprint="f" * 32, decode_speed=1.0, prefill_speed=1.0,
        cache_tokens_left=0, dtype="float32", quantization="none", version="0.1.0", addresses=(ADDRESS,),
    )  # fmt: skip
    ready: Any = SimpleNamespace(
        info=info, model=ModelInfo("key", "name", "llama", 4), engine=SimpleNamespace(cache_tokens=64), reach=Reach()
    )
    lines = describe(ready, ServerConfig(model="org/model", dtype="float32"), None).splitlines()
    assert f"  shoal serve org/model --dtype float32 --initial-peers {ADDRESS}" in lines
    assert f'  shoal generate org/model --dtype float32 "Once upon a time" --initial-peers {ADDRESS}' in lines
    assert not any(line.startswith("attention") for line in lines)
    ready.info = replace(info, attention="sdpa; not varlen: off by 3 %")
    lines = describe(ready, ServerConfig(model="org/model", dtype="float32"), None).splitlines()
    assert "attention sdpa; not varlen: off by 3 %" in lines
    came_by = ["/ip4/203.0.113.5/tcp/1/p2p/B", "/ip4/203.0.113.6/tcp/1/p2p/C"]
    lines = describe(ready, ServerConfig(model="org/model"), None, came_by).splitlines()
    assert f"  shoal serve org/model --initial-peers {ADDRESS},{came_by[0]}" in lines


def test_without_options_the_commands_are_short():
    join, use = commands(ServerConfig(model="org/model"))
    assert join == ["serve", "org/model", "--initial-peers", ADDRESS]
    assert use == ["generate", "org/model", "Once upon a time", "--initial-peers", ADDRESS]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float32"}, ["--dtype", "float32"]),
        ({"revision": "a branch"}, ["--revision", "a branch"]),
        ({"allow_uncertified": True}, ["--allow-uncertified"]),
    ],
)
def test_options_that_change_the_results_are_in_both_commands(options, expected):
    join, use = commands(ServerConfig(model="a folder", **options))
    assert join == ["serve", "a folder", *expected, "--initial-peers", ADDRESS]
    assert use == ["generate", "a folder", *expected, "Once upon a time", "--initial-peers", ADDRESS]


def test_options_of_storage_are_in_the_command_of_servers_only():
    join, use = commands(ServerConfig(model="m", dtype="float16", quantization="nf4", cache_dtype="int8"))
    assert join[2:8] == ["--dtype", "float16", "--quantization", "nf4", "--cache-dtype", "int8"]
    assert use[2:4] == ["--dtype", "float16"]
    assert "nf4" not in use
    assert "int8" not in use


def test_options_of_one_machine_are_in_neither_command():
    config = ServerConfig(model="m", device="cuda", num_threads=3, cache_tokens=99, name="me", num_blocks=2)
    assert commands(config) == commands(ServerConfig(model="m"))


def test_a_server_that_can_invite_prints_the_line_with_its_code_first():
    lines = serve_output.commands(ServerConfig(model="org/model"), ADDRESS, CODE)
    shown = [line.split()[1:3] for line in lines if line.startswith("  shoal ")]
    assert shown == [["join", str(CODE)], ["serve", "org/model"], ["generate", str(CODE)], ["generate", "org/model"]]


def test_a_server_without_a_copy_of_the_model_prints_no_command_that_needs_one():
    config = ServerConfig(model="stories", files=LocalFiles(STORIES, name="stories"))
    lines = [line for line in serve_output.commands(config, ADDRESS, CODE) if line.startswith("  shoal ")]
    assert [line.split()[1:3] for line in lines] == [["join", str(CODE)], ["generate", str(CODE)]]


def test_a_tokenizer_that_names_code_of_its_own_is_refused_without_a_question(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(STORIES / name, tmp_path / name)
    config = json.loads((STORIES / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["somebody/else--tok.Tok", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
