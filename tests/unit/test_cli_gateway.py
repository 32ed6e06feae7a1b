"""What `shoal gateway` makes of its options."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.bundled import STORIES
from shoal.cli import run
from shoal.cli.gateway import GatewayAdapter, adapter_of, checked_keys
from shoal.cli.terminal.console import WrongUsage
from shoal.gateway.guard.admission import Admission

ADDRESS = "/ip4/203.0.113.5/tcp/31337/p2p/12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"


@pytest.mark.parametrize(
    ("given", "models", "expected"),
    [
        ("someone/tales", ["llama"], GatewayAdapter("llama", "tales", "someone/tales")),
        ("/data/tales/", ["org/llama"], GatewayAdapter("org/llama", "tales", "/data/tales/")),
        ("fox=someone/tales", ["llama"], GatewayAdapter("llama", "fox", "someone/tales")),
        ("qwen:fox=/data/a=b", ["llama", "qwen"], GatewayAdapter("qwen", "fox", "/data/a=b")),
    ],
)
def test_an_adapter_has_a_name_and_a_model(given: str, models: list[str], expected: GatewayAdapter):
    assert adapter_of(given, models) == expected


@pytest.mark.parametrize(
    ("given", "models", "message"),
    [
        ("someone/tales", ["llama", "qwen"], "which model"),
        ("other:fox=someone/tales", ["llama"], "not an adapter of a model"),
        ("=someone/tales", ["llama"], "not an adapter of a model"),
        ("fox=", ["llama"], "not an adapter of a model"),
    ],
)
def test_an_adapter_of_no_model_is_refused(given: str, models: list[str], message: str):
    with pytest.raises(WrongUsage, match=message) as refused:
        adapter_of(given, models)
    assert refused.value.hint is not None
    assert "--adapter llama:" in refused.value.hint


def test_a_key_is_one_word():
    assert checked_keys(["one", "two"]) == ("one", "two")
    for key in ("a b", "a,b", "", "a\n"):
        with pytest.raises(WrongUsage, match="a key with a space or a comma, or an empty one"):
            checked_keys(["one", key])


@pytest.mark.parametrize("command", ["up", "gateway"])
def test_an_empty_key_is_refused_on_the_command_line_and_in_a_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SHOAL_INITIAL_PEERS", ADDRESS)
    path = tmp_path / "shoal.toml"
    path.write_text('api-key = ""\n')
    path.chmod(0o600)
    for options in (["--api-key", ""], ["--config", str(path)]):
        assert run([command, str(STORIES), *options]) == 2
        assert "a key with a space or a comma, or an empty one" in capsys.readouterr().err


def test_an_empty_key_does_not_open_the_gateway():
    with pytest.raises(ValueError, match="an empty API key"):
        Admission(("one", ""))
