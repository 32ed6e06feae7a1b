"""What `--device` names, and what the servers of several devices get of a command's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bundled import STORIES
from shoal.cli import run
from shoal.cli.service import devices
from shoal.cli.service.devices import VISIBLE, as_arguments, chosen_devices, shared_out, show_only
from shoal.cli.terminal.console import WrongUsage
from shoal.spans import Span

TWO = ("cuda:0", "cuda:1")


def values_of(names: tuple[str, ...] = TWO, cores: int = 8, **values: Any) -> list[dict[str, Any]]:
    return [dict(each.values) for each in shared_out(names, {"model": "m", **values}, cores=cores)]


@pytest.mark.parametrize("text", ["cpu", "cuda", "mps", "cuda:3"])
def test_one_device_is_one_server(text: str) -> None:
    assert chosen_devices(text) == (text,)


def test_several_devices_are_a_server_each() -> None:
    assert chosen_devices("cuda:0, cuda:2,cpu") == ("cuda:0", "cuda:2", "cpu")


@pytest.mark.parametrize(
    ("text", "error"),
    [("gpu", "not a device: 'gpu'"), ("cuda:0,", "not a device: ''"), ("cuda,cpu", "which GPU is cuda")],
)
def test_what_is_no_device_is_told_at_once_with_a_hint(
    text: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", str(STORIES), "--new-swarm", "--device", text]) == 2
    told, hint = capsys.readouterr().err.splitlines()
    assert error in told
    assert "--device" in hint


@pytest.mark.parametrize(("count", "expected"), [(0, ("auto",)), (1, ("auto",)), (2, TWO)])
def test_auto_is_a_server_for_each_gpu_if_there_are_several(
    monkeypatch: pytest.MonkeyPatch, count: int, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(devices, "_count_gpus", lambda: count)
    assert chosen_devices("auto") == expected


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        (None, "cuda:1", "1"),
        ("2,GPU-5", "cuda:1", "GPU-5"),
        ("2", "cuda:1", "-1"),
        (None, "cuda", None),
        ("3", "cpu", "3"),
    ],
)
def test_a_process_sees_only_its_own_of_the_gpus_that_it_was_shown(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, expected: str | None
) -> None:
    monkeypatch.setenv(VISIBLE, visible or "")
    if visible is None:
        monkeypatch.delenv(VISIBLE)
    assert show_only(device) == device.partition(":")[0]
    assert devices.os.environ.get(VISIBLE) == expected


def test_a_single_server_gets_all_options_as_they_are_and_no_mark() -> None:
    (share,) = shared_out(("cpu",), {"model": "m", "threads": 3, "port": 7, "blocks": "0:4", "name": "a"}, cores=8)
    assert share.values == {"threads": 3, "port": 7, "blocks": "0:4", "name": "a", "device": "cpu"}


@given(count=st.integers(1, 9), start=st.integers(0, 50), length=st.integers(1, 200))
def test_the_blocks_of_several_servers_are_those_of_the_command_each_once(count: int, start: int, length: int) -> None:
    names = tuple(f"cuda:{number}" for number in range(count))
    given_blocks = str(Span(start, start + length))
    if length < count:
        with pytest.raises(WrongUsage, match="blocks for"):
            values_of(names, blocks=given_blocks)
        return
    spans = [Span.parse(each["blocks"]) for each in values_of(names, blocks=given_blocks)]
    assert [block for span in spans for block in span] == list(range(start, start + length))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


def test_threads_numbers_of_blocks_and_the_upload_limit_are_divided() -> None:
    first, second = values_of(num_blocks=5, threads=7, upload_limit=10.0)
    assert [(each["num_blocks"], each["threads"], each["upload_limit"]) for each in (first, second)] == [
        (3, 3, 5.0),
        (2, 3, 5.0),
    ]
    assert [each["threads"] for each in values_of(("cuda:0", "cuda:1", "cuda:2"), cores=2)] == [1, 1, 1]


def test_the_output_head_is_served_by_the_last_of_given_blocks_and_offered_by_all_that_choose() -> None:
    assert [each["serve_head"] for each in values_of(blocks="0:4", serve_head=True)] == [False, True]
    assert [each["serve_head"] for each in values_of(serve_head=True)] == [True, True]


def test_ports_count_up_also_those_that_are_announced() -> None:
    first, second = values_of(port=31337, announce=["/ip4/203.0.113.5/tcp/4000"])
    assert (first["port"], second["port"]) == (31337, 31338)
    assert (first["announce"], second["announce"]) == (["/ip4/203.0.113.5/tcp/4000"], ["/ip4/203.0.113.5/tcp/4001"])
    assert [each["port"] for each in values_of(port=0)] == [0, 0]
    with pytest.raises(WrongUsage, match="there is no port 65536"):
        values_of(port=65535)


def test_each_server_has_a_name_and_an_identity_of_its_own() -> None:
    first, second = values_of(("cpu", "cpu"), name="alpha", identity=Path("/k/mine"), num_blocks=2)
    assert (first["name"], second["name"]) == ("alpha-cpu0", "alpha-cpu1")
    assert (first["identity"], second["identity"]) == (Path("/k/mine-cpu0"), Path("/k/mine-cpu1"))
    assert [each["mark"] for each in values_of()] == ["cuda0", "cuda1"]
    assert [each["mark"] for each in values_of(("cuda:0", "cuda:0"), num_blocks=2)] == ["cuda0.0", "cuda0.1"]


def test_several_servers_on_one_device_have_to_be_given_blocks() -> None:
    with pytest.raises(WrongUsage, match="would each take all of its memory") as caught:
        values_of(("cpu", "cpu"))
    assert caught.value.hint is not None
    assert "--num-blocks" in caught.value.hint


def test_values_become_the_options_that_a_command_reads_again() -> None:
    found = as_arguments({"lan": None, "move": False, "upnp": True, "adapter": ["a", "b"], "cache_dtype": "int8"})
    assert found == ["--no-move", "--upnp", "--adapter", "a", "--adapter", "b", "--cache-dtype", "int8"]
