"""`shoal plan`, as a user runs it: from a folder and from the hub's headers."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from shoal.bundled import STORIES
from shoal.cli import run
from shoal.cli.plan import kinds, parse_memory
from shoal.cli.terminal.console import WrongUsage
from shoal.host.computer import available_memory
from shoal.model.weights import disk_cache
from shoal.policy.machines.max_blocks import CACHE_SHARE
from shoal.policy.will_fit import Kind
from shoal.server import measured_speed
from shoal.server.capacity import free_memory

from ..known_speed import know_speed
from .fake_hub import FakeHub
from .tiny_checkpoint import save_tiny

REPO = "someone/tiny"
SLOW = ("torch", "transformers", "hivemind")
BLOCK = 639_744
"""The bytes of a block of the bundled model, in its own dtype."""


@pytest.fixture(autouse=True)
def own_cache_and_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and the logging as before a command set it up."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SHOAL_INITIAL_PEERS", raising=False)
    logger = logging.getLogger("shoal")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it in its own process, on a terminal of 80 cells."""
    program = (
        "import sys\nfrom shoal.cli import run\ncode = run(sys.argv[1:])\n"
        f"print([name for name in {SLOW} if name in sys.modules], file=sys.stderr)\nsys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert run(["plan", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_for_a_folder_is_a_table_of_80_cells_and_imports_nothing_slow() -> None:
    done = shoal("plan", str(STORIES), "--memory", "2MB,3x4MB")
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = {name: values for line in done.stdout.splitlines() for name, *values in [re.split(r"\s{2,}", line.strip())]}
    assert rows["a block"] == ["640 kB", "323 kB", "180 kB"]
    assert rows["2 MB"] == ["2", "4", "8"]
    assert rows["3 machines of 4 MB, each"] == ["5", "9", "12"]
    assert rows["copies of the model"] == ["1.42", "2.58", "3.67"]
    assert "It fits on these machines in bfloat16, int8 and nf4." in done.stdout


def test_a_plan_that_does_not_fit_says_what_is_missing_and_what_would_help(capsys) -> None:
    found = planned(capsys, str(STORIES), "--memory", "1MB,0.3MB", code=1)
    assert found["fits"] is False
    form = found["forms"][0]
    assert form["missing"] == list(range(1, 12))
    assert [(each["name"], each["holds"], each["more_needed"]) for each in form["machines"]] == [
        ("1 MB", 1, 11),
        ("300 kB", 0, None),
    ]
    assert form["tokens_per_second"] is None
    done = shoal("plan", str(STORIES), "--memory", "1MB")
    assert done.returncode == 1
    assert "It does not fit on these machines in any form." in done.stdout


def test_the_json_adds_up(capsys) -> None:
    found = planned(capsys, str(STORIES), "--memory", "2MB,2MB,8MB", "--round-trip", "20")
    assert (found["model"]["num_blocks"], found["dtype"], found["round_trip"]) == (12, "bfloat16", 0.02)
    plain = found["forms"][0]
    assert plain["block_bytes"] == [BLOCK] * 12
    assert [each["holds"] for each in plain["machines"]] == [
        int(size * (1 - CACHE_SHARE) / BLOCK) for size in (2e6, 8e6)
    ]
    assert [part["blocks"] for part in plain["parts"]] == [[0, 10], [10, 12]]
    assert plain["tokens_per_second"] < 1 / 0.03  # three trips of 10 ms


def test_a_dtype_can_be_named(capsys) -> None:
    found = planned(capsys, str(STORIES), "--memory", "1GB", "--dtype", "float32")
    assert found["forms"][0]["block_bytes"] == [2 * BLOCK] * 12


def test_without_memory_it_is_this_machine_that_is_planned_for(capsys) -> None:
    found = planned(capsys, str(STORIES))
    assert [each["name"] for each in found["forms"][0]["machines"]] == ["this machine"]
    assert found["this_machine"]["free_bytes"] > 0


def test_free_memory_is_what_a_server_reckons_with(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 123})())
    assert available_memory() == free_memory(torch.device("cpu")) == 123


def test_sizes_of_memory() -> None:
    assert parse_memory(["8GB,24gb", "2x16 GiB", "this", "1.5T"]) == [
        *((8 * 10**9, 1), (24 * 10**9, 1), (16 * 2**30, 2), (None, 1), (1_500 * 10**9, 1))
    ]
    assert kinds(parse_memory(["8GB,this,8GB"]), own=5) == [Kind("8 GB", 8 * 10**9, 2), Kind("this machine", 5)]


@pytest.mark.parametrize("wrong", ["", "8", "GB", "8XB", "-8GB", "0GB", "0x8GB", "8GB,", "8 GB GB", "1e9GB", "9" * 30])
def test_what_is_no_size_of_a_memory_is_refused(wrong: str) -> None:
    with pytest.raises(WrongUsage, match="not the size of a memory") as error:
        parse_memory([wrong])
    assert error.value.hint == "write --memory 8GB,24GB or --memory 4x16GB"


def test_no_plan_is_made_for_more_machines_than_there_are() -> None:
    with pytest.raises(WrongUsage, match="more machines than a plan is made for"):
        parse_memory(["99999x1GB"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["./nowhere"], "there is no folder ./nowhere"),
        (["not a model"], "'not a model' is neither a folder nor the id of a model"),
        ([str(STORIES), "--memory", "8 apples"], "not the size of a memory: '8 apples'"),
        ([str(STORIES), "--initial-peers", "here"], "not the address of a peer: 'here'"),
    ],
)
def test_a_mistake_gets_one_line_and_a_hint_before_anything_slow(arguments: list[str], error: str) -> None:
    done = shoal("plan", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"error: {error}")
    assert lines[1].startswith("hint: ")
    assert lines[2] == "[]"


def test_a_speed_that_this_machine_has_measured_is_used(capsys) -> None:
    know_speed(STORIES, num_blocks=12, decode_speed=4.0)
    found = planned(capsys, str(STORIES), "--memory", "1GB", "--dtype", "float32")
    assert [form["speed"] for form in found["forms"]] == ["measured", "assumed", "assumed"]
    assert found["forms"][0]["tokens_per_second"] == pytest.approx(4.0, rel=0.02)
    stated = planned(capsys, str(STORIES), "--memory", "1GB", "--dtype", "float32", "--bandwidth", "900")
    assert {form["speed"] for form in stated["forms"]} == {"stated"}
    assert stated["forms"][0]["tokens_per_second"] > 100
    fingerprint = found["model"]["fingerprint"]
    key = measured_speed.weights_key(fingerprint, "none")
    assert measured_speed.last_profile(weights=key, dtype="float32") is not None
    assert measured_speed.last_profile(weights=key, dtype="float32", clock=lambda: time.time() + 1e7) is None
    assert measured_speed.last_profile(weights=key, dtype="bfloat16") is None


def test_weights_that_were_never_read_are_not_read_for_a_plan(capsys) -> None:
    found = planned(capsys, str(STORIES), "--memory", "1GB")
    assert found["model"]["fingerprint"] is None
    assert not (disk_cache.cache_folder() / "facts").exists()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub(save_tiny(tmp_path / "tiny", sharded=True))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client waits before it tries again
    yield hub
    hub.close()


def test_from_the_hub_come_the_config_and_the_headers_only(hub: FakeHub, capsys, tmp_path: Path) -> None:
    there, here = planned(capsys, REPO, "--memory", "1GB"), planned(capsys, str(hub.folder), "--memory", "1GB")
    assert there["forms"][0]["block_bytes"] == here["forms"][0]["block_bytes"]
    assert there["head_bytes"] == here["head_bytes"]
    assert there["model"]["key"] == here["model"]["key"]
    assert there["model"]["fingerprint"] is not None  # the hub publishes the digests
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_model_that_the_hub_does_not_have_gets_one_line(hub: FakeHub, capsys) -> None:
    assert run(["plan", "someone/unheard-of"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: there is no model someone/unheard-of on the hub that you may see")
    assert hint.startswith("hint: ")


def tensor(start: int, end: int, *, shape: tuple[int, ...] = (4, 8), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def file_of(*tensors: Any, size: int = 512, length: int | None = None) -> bytes:
    """A safetensors file with these tensors of the first block, and `size` bytes of numbers."""
    header = json.dumps({f"model.layers.0.mlp.{each}.weight": one for each, one in enumerate(tensors)}).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(size)


HOSTILE = {
    "a header longer than the file": file_of(tensor(0, 128), length=10**6),
    "a header of exabytes": file_of(tensor(0, 128), length=1 << 62),
    "a header of nothing": bytes(8),
    "a header that is no object": (2).to_bytes(8, "little") + b"[]",
    "a tensor that is none": file_of([1, 2]),
    "a tensor behind the end": file_of(tensor(0, 1 << 40, shape=(1 << 20, 1 << 18))),
    "a tensor of a negative size": file_of(tensor(128, 0)),
    "a tensor before the beginning": file_of(tensor(-128, 0)),
    "a tensor larger than its shape": file_of(tensor(0, 256)),
    "a tensor smaller than its shape": file_of(tensor(0, 128, shape=(1 << 30, 1 << 30))),
    "a shape with a negative side": file_of(tensor(0, 128, shape=(-4, -8))),
    "tensors that overlap": file_of(*[tensor(0, 512, shape=(4, 32))] * 9),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("source", ["folder", "hub"])
def test_a_header_that_lies_is_refused_in_one_line(content: bytes, source: str, hub: FakeHub, capsys) -> None:
    for file in (*hub.folder.glob("*.safetensors"), hub.folder / "model.safetensors.index.json"):
        file.unlink()
    (hub.folder / "model.safetensors").write_bytes(content)
    assert run(["plan", REPO if source == "hub" else str(hub.folder)]) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (out, len(lines)) == ("", 2 if "hint: " in err else 1)
    assert re.match(r"error: .*(is damaged|is truncated)", lines[0]), lines
