"""Machines join by a code and generate: beside containers, from two homes behind NATs, after the first machine has
gone, and with a wrong clock. Beside each runs `shoal doctor`, and says what the scene has it say.

The scenes are in `scenes.py`, which says of the others why they are in no test.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.testing.namespaces import missing_for_namespaces
from tests.net.scenes import SCENES
from tests.net.stage import known_speeds, stage

NAMES = ("containers", "two-homes", "dead-bootstrap", "clients-clock")

pytestmark = pytest.mark.skipif(missing_for_namespaces() is not None, reason=str(missing_for_namespaces()))


@pytest.fixture(scope="module")
def speeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that knows how fast this machine computes."""
    return known_speeds(tmp_path_factory.mktemp("speeds"))


@pytest.mark.parametrize("name", NAMES)
def test_machines_join_and_tell_the_story_while_one_of_them_is_lost(name: str, speeds: Path) -> None:
    scene = SCENES[name]
    with stage(speeds, scene.versions) as at:
        scene.play(at)
