"""Which texts a client has begun before."""

from __future__ import annotations

import pytest

from shoal.client.history import sent_beginnings
from shoal.client.history.sent_beginnings import SentBeginnings


def test_a_beginning_is_known_once_it_was_noted():
    beginnings = SentBeginnings()
    assert not beginnings.note([b"one", b"two"])
    assert not beginnings.note([b"three"])
    assert beginnings.note([b"four", b"two"])
    assert beginnings.note([b"four"])


def test_the_oldest_beginnings_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sent_beginnings, "MOST_NOTED", 3)
    beginnings = SentBeginnings()
    for name in (b"one", b"two", b"three", b"one", b"four"):
        beginnings.note([name])
    assert beginnings.note([b"one"])
    assert not beginnings.note([b"two"])
