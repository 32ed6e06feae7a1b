"""Machines behind NATs join by a code, through relays that are named by hand, and generate.

The scenes are in `scenes.py`, which also has those without relays.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.testing.namespaces import missing_for_namespaces
from tests.net.scenes import SCENES, Scene, known_speeds, stage

NAMES = ("port-restricted-relays", "symmetric-relays", "two-homes-relays")

pytestmark = pytest.mark.skipif(missing_for_namespaces() is not None, reason=str(missing_for_namespaces()))


@pytest.fixture(scope="module")
def speeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that knows how fast this machine computes."""
    return known_speeds(tmp_path_factory.mktemp("speeds"))


@pytest.mark.parametrize("scene", [each for each in SCENES if each.name in NAMES], ids=lambda scene: scene.name)
def test_machines_behind_nats_join_and_tell_the_story_while_a_link_is_lost(scene: Scene, speeds: Path) -> None:
    with stage(speeds, scene.versions) as at:
        scene.play(at)
