"""Each scene of `tests/net/scenes.py` is in one test, or says why it is in none."""

from __future__ import annotations

from tests.net.scenes import SCENES
from tests.net.test_homes import NAMES


def test_each_scene_is_in_one_test_or_says_why_it_is_in_none() -> None:
    by_hand = [name for name, scene in SCENES.items() if scene.by_hand]
    assert sorted([*NAMES, *by_hand]) == sorted(SCENES)
