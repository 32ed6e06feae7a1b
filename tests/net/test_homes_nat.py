"""Machines behind NATs join by a code, through relays that they find among the members, and generate.

The scenes are in `scenes.py`, which says of the others why they are in no test.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.testing.namespaces import missing_for_namespaces
from tests.net.scenes import SCENES, known_speeds, stage

NAMES = ("two-homes",)

pytestmark = pytest.mark.skipif(missing_for_namespaces() is not None, reason=str(missing_for_namespaces()))


@pytest.fixture(scope="module")
def speeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that knows how fast this machine computes."""
    return known_speeds(tmp_path_factory.mktemp("speeds"))


@pytest.mark.parametrize("name", NAMES)
def test_machines_behind_nats_join_and_tell_the_story_while_a_link_is_lost(name: str, speeds: Path) -> None:
    scene = SCENES[name]
    with stage(speeds, scene.versions) as at:
        scene.play(at)
