"""What a client by code shows while it fetches the head from members."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.client import by_code
from shoal.client.by_code import FetchBar


class FakeBar:
    """A bar that remembers what it was told."""

    made: list[FakeBar]

    def __init__(self, *, total: int, **_: Any) -> None:
        self.total = total
        self.updates: list[float] = []
        self.is_closed = False
        self.made.append(self)

    def update(self, num_bytes: float) -> None:
        assert not self.is_closed
        self.updates.append(num_bytes)

    def close(self) -> None:
        self.is_closed = True


def test_each_fetch_has_a_bar_that_advances_by_what_has_come_and_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeBar.made = []
    monkeypatch.setattr(by_code, "DownloadBar", FakeBar)
    bar = FetchBar()
    for come, wanted in [(0, 10), (4, 10), (10, 10), (0, 0), (0, 6), (6, 6)]:
        bar(come, wanted)
    assert [(each.total, each.updates, each.is_closed) for each in FakeBar.made] == [(10, [4, 6], True), (6, [6], True)]


def test_a_fetch_that_was_given_up_leaves_no_bar_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeBar.made = []
    monkeypatch.setattr(by_code, "DownloadBar", FakeBar)
    bar = FetchBar()
    bar(0, 10)
    bar(3, 10)
    bar(0, 7)
    assert [each.is_closed for each in FakeBar.made] == [True, False]
