"""What is logged when other peers do not store an announcement."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.net.libp2p.hash_table.store_failures import StoreFailure, StoreFailureLog, StoreResponses, store_failure
from shoal.net.records import CLOCK_SKEW


def test_the_clock_is_blamed_only_if_it_differs() -> None:
    assert store_failure(is_stored=True, num_refused=3, seconds_ahead=None) is None
    assert store_failure(is_stored=False, num_refused=0, seconds_ahead=None) is StoreFailure.NO_ANSWER
    assert store_failure(is_stored=False, num_refused=1, seconds_ahead=0.1) is StoreFailure.REFUSED
    assert store_failure(is_stored=False, num_refused=1, seconds_ahead=None) is StoreFailure.REFUSED
    for seconds in CLOCK_SKEW + 1, -CLOCK_SKEW - 1:
        assert store_failure(is_stored=False, num_refused=1, seconds_ahead=seconds) is StoreFailure.CLOCKS_DIFFER


def test_each_failure_is_logged_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    log = StoreFailureLog()
    with caplog.at_level(logging.INFO, "shoal"):
        for failure in (
            None,
            *[StoreFailure.NO_ANSWER] * 38,
            *[StoreFailure.CLOCKS_DIFFER] * 3,
            None,
            None,
            StoreFailure.NO_ANSWER,
        ):
            log.update(failure, seconds_ahead=-63.0 if failure is StoreFailure.CLOCKS_DIFFER else None)
    assert [each.getMessage().partition(";")[0] for each in caplog.records] == [
        str(StoreFailure.NO_ANSWER),
        f"{StoreFailure.CLOCKS_DIFFER}: this machine's is 63 s behind theirs",
        "other peers store this server's announcement again",
        str(StoreFailure.NO_ANSWER),
    ]


@pytest.mark.anyio
async def test_missing_answers_and_refusals_are_told_apart() -> None:
    async def call_store(peer: str, keys: list[bytes]) -> Any:
        return {"stores": [True, True], "refuses": [True, False], "silent": None}[peer]

    responses, protocol = StoreResponses(), SimpleNamespace(call_store=call_store)
    responses.watch(protocol)
    for peer in "stores", "refuses", "silent":
        assert await protocol.call_store(peer, keys=[]) == await call_store(peer, [])
    assert (responses.refused, responses.unanswered) == ({"refuses"}, {"silent"})
    responses.clear()
    assert not responses.refused
