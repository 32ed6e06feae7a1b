"""Machines join by a code and generate: beside containers, over IPv6, after the first machine has gone, with a wrong
clock, and over a bad line.

The scenes are in `scenes.py`, which says of those in no test why. Beside each runs `shoal doctor`, and says what the
scene has it say.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.testing.namespaces import missing_for_namespaces
from tests.net.scenes import HOMES, SCENES
from tests.net.stage import stage

pytestmark = pytest.mark.skipif(missing_for_namespaces() is not None, reason=str(missing_for_namespaces()))


@pytest.mark.parametrize("name", [name for name, each in SCENES.items() if name not in HOMES and not each.by_hand])
def test_machines_join_and_tell_the_story_while_one_of_them_is_lost(name: str, speeds: Path) -> None:
    with stage(speeds, SCENES[name].versions) as at:
        SCENES[name].play(at)
