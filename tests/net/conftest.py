"""What the tests of processes share: a cache that knows how fast this machine is, and commands in this process."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoal.bundled import STORIES
from shoal.cli import run
from tests.known_speed import know_speed
from tests.net.stage import known_speeds

DECODE_SPEED = 250.0
"""Tokens per second through half of the bundled model."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for the processes that a module starts. With it, a server that computes in float32 measures nothing."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(folder))
        know_speed(STORIES, num_blocks=6, decode_speed=DECODE_SPEED)
        yield folder


@pytest.fixture(scope="module")
def speeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for the hosts of scenes, which knows how fast this machine computes."""
    return known_speeds(tmp_path_factory.mktemp("speeds"))


@dataclass
class Done:
    """The exit status and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def is_plain(self) -> bool:
        """Whether the output has no traceback, no color and no message of a library."""
        return not any(word in self.out + self.err for word in ("Traceback", "\x1b", "Warning", "it/s"))


Shoal = Callable[..., Done]


@pytest.fixture
def shoal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shoal:
    """Run a command that ends by itself. It runs in this process, where the slow imports are done."""

    def shoal(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = run(arguments)
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return shoal
