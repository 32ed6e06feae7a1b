from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from shoal import AutoDistributedModel
from shoal.cli.options import DType, Wire, client_options
from shoal.cli.terminal.console import WrongUsage
from shoal.client.options.client_options import (
    CHOOSERS,
    INITIAL_PEERS,
    ClientOptions,
    ModelOptions,
    parse_chooser,
    parse_pins,
)
from shoal.errors import UserError
from shoal.net.swarm_key import SWARM_KEY, key_in
from shoal.spans import Span

ADDRESS = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"


def test_pins_are_spans_and_peers_in_the_order_of_the_blocks():
    pinned = parse_pins({"4:8": "B", "0:4": "A"})
    assert pinned == ((Span(0, 4), "A"), (Span(4, 8), "B"))


def test_text_that_is_not_a_span_cannot_be_pinned():
    with pytest.raises(UserError, match="not a span of blocks: 'first'") as error:
        parse_pins({"first": "A"})
    assert "0:4" in str(error.value.hint)


def test_a_block_is_pinned_to_one_peer_only():
    with pytest.raises(UserError, match="blocks 0:5 and 4:8 overlap"):
        parse_pins({"0:5": "A", "4:8": "B"})
    assert len(parse_pins({"0:5": "A", "4:8": "A"})) == 2


def test_an_unknown_chooser_is_refused_with_the_known_ones():
    assert [parse_chooser(each) for each in CHOOSERS] == ["balanced", "shortest", "nsga2"]
    with pytest.raises(UserError, match="'luck'") as error:
        parse_chooser("luck")
    assert error.value.hint == "use one of balanced, shortest, nsga2"


def test_a_salt_that_is_too_long_to_send_is_refused_before_the_swarm_is_asked():
    assert ClientOptions(salt="s" * 256).salt == "s" * 256
    with pytest.raises(UserError, match="a salt of 257 characters"):
        ClientOptions(salt="s" * 257)


def test_beginnings_are_shared_only_on_demand():
    address = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"
    assert client_options([address]).salt is None
    assert client_options([address], share_prefixes=True).salt == ""
    assert ClientOptions.from_keywords(salt="").salt == ""


def test_keywords_make_the_options_that_the_command_line_makes(monkeypatch: pytest.MonkeyPatch):
    by_command = client_options([ADDRESS], wire=Wire.int8, pin=["0:4=A"], history_memory=2, dtype=DType.float32)
    by_keywords = ClientOptions.from_keywords(
        initial_peers=ADDRESS, wire="int8", pinned={"0:4": "A"}, history_memory=2 << 20, torch_dtype="float32"
    )
    assert by_command == by_keywords
    assert by_keywords.initial_peers == (ADDRESS,)
    assert by_keywords.model == ModelOptions(dtype="float32")


def test_no_keywords_are_the_defaults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(INITIAL_PEERS, raising=False)
    monkeypatch.delenv(SWARM_KEY, raising=False)
    assert ClientOptions.from_keywords() == ClientOptions()


def test_every_option_that_has_a_keyword_is_filled_by_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv(INITIAL_PEERS, raising=False)
    key_in(tmp_path / "key", create=True)
    given = {
        "initial_peers": ["/a"], "swarm_key": tmp_path / "key", "revision": "main", "token": "hf_x",
        "cache_dir": "/c", "dtype": "float16",
        "device": "cuda", "allowed_servers": ["a"], "blocked_servers": "b c", "pinned": {"0:4": "a"},
        "chooser": "nsga2", "wire": "int8", "standby": True, "draft": "off", "audits": "off", "own_servers": ["/k"],
        "history": "bfloat16", "history_memory": 7,
        "history_folder": "/h", "remote_head": True, "head_top_k": 5, "head_quantization": "nf4",
        "tuning_mode": "ptune", "pre_seq_len": 3, "active_adapter": "/d", "salt": "s", "allow_uncertified": True,
        "local_files_only": True, "observers": [print], "num_labels": 3, "patience": 5,
    }  # fmt: skip
    keywords = {*inspect.signature(ClientOptions.from_keywords).parameters} - {"others"}
    assert keywords == {*given} - {"num_labels"}
    options, default = ClientOptions.from_keywords(**given), ClientOptions()
    assert options.history_folder == Path("/h")
    for name in keywords:
        name = {"patience": "patience_seconds"}.get(name, name)
        holder, untouched = (options, default) if hasattr(options, name) else (options.model, default.model)
        assert getattr(holder, name) != getattr(untouched, name)
    assert options.model.config_changes == {"num_labels": 3}
    assert {each.name for each in fields(ModelOptions)} <= keywords | {"config_changes"}


def test_from_pretrained_shows_its_keywords():
    shown = inspect.signature(AutoDistributedModel.from_pretrained).parameters
    assert [*shown] == ["model", *inspect.signature(ClientOptions.from_keywords).parameters]


def test_a_draft_is_a_kind_or_a_model_that_may_exist(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    for draft in ("auto", "off", "OWNER/NAME", str(tmp_path), tmp_path):
        assert ClientOptions.from_keywords(draft=draft).draft == draft
    with pytest.raises(UserError, match="'Auto' is not a way to guess tokens"):
        ClientOptions.from_keywords(draft="Auto")
    with pytest.raises(UserError, match="there is no folder"):
        ClientOptions.from_keywords(draft="./nowhere")
    with pytest.raises(WrongUsage, match=r"config\.json"):
        client_options([ADDRESS], draft=str(tmp_path.parent))


def test_options_are_made_without_importing_anything_slow():
    program = "import sys, shoal.client.options.client_options; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
