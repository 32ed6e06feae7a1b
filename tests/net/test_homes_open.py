"""Machines join by a code and generate: on a LAN, beside containers, over IPv6 only, over lossy and
broken links, and with a wrong clock.

The scenes are in `scenes.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.testing.namespaces import missing_for_namespaces
from tests.net.scenes import SCENES, Scene, known_speeds, stage

NAMES = ("open", "containers", "ipv6", "dead-bootstrap", "clients-clock", "servers-clock", "loss", "separated")

pytestmark = pytest.mark.skipif(missing_for_namespaces() is not None, reason=str(missing_for_namespaces()))


@pytest.fixture(scope="module")
def speeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that knows how fast this machine computes."""
    return known_speeds(tmp_path_factory.mktemp("speeds"))


@pytest.mark.parametrize("scene", [each for each in SCENES if each.name in NAMES], ids=lambda scene: scene.name)
def test_machines_join_and_tell_the_story_while_one_of_them_is_lost(scene: Scene, speeds: Path) -> None:
    with stage(speeds, scene.versions) as at:
        scene.play(at)
