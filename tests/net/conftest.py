"""What the swarms of processes share: a cache that knows how fast this machine computes the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.bundled import STORIES
from tests.known_speed import know_speed

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
