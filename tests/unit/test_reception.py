"""What is said when others do not keep an announcement."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.net.libp2p.reception import Answers, Fault, Reception, fault_of
from shoal.net.records import CLOCK_SKEW


def test_the_clock_is_blamed_only_if_it_differs() -> None:
    assert fault_of(is_kept=True, num_refused=3, seconds_ahead=None) is None
    assert fault_of(is_kept=False, num_refused=0, seconds_ahead=None) is Fault.SILENT
    assert fault_of(is_kept=False, num_refused=1, seconds_ahead=0.1) is Fault.REFUSED
    assert fault_of(is_kept=False, num_refused=1, seconds_ahead=None) is Fault.REFUSED
    for seconds in CLOCK_SKEW + 1, -CLOCK_SKEW - 1:
        assert fault_of(is_kept=False, num_refused=1, seconds_ahead=seconds) is Fault.CLOCK


def test_each_trouble_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    reception = Reception()
    with caplog.at_level(logging.INFO, "shoal"):
        for fault in None, *[Fault.SILENT] * 38, *[Fault.CLOCK] * 3, None, None, Fault.SILENT:
            reception.becomes(fault, seconds_ahead=-63.0 if fault is Fault.CLOCK else None)
    assert [each.getMessage().partition(";")[0] for each in caplog.records] == [
        str(Fault.SILENT),
        f"{Fault.CLOCK}: this machine's is 63 s behind theirs",
        "others keep this server's announcement again",
        str(Fault.SILENT),
    ]


@pytest.mark.anyio
async def test_silence_and_refusal_are_told_apart() -> None:
    async def call_store(peer: str, keys: list[bytes]) -> Any:
        return {"keeps": [True, True], "refuses": [True, False], "silent": None}[peer]

    answers, table = Answers(), SimpleNamespace(call_store=call_store)
    answers.listen(table)
    for peer in "keeps", "refuses", "silent":
        assert await table.call_store(peer, keys=[]) == await call_store(peer, [])
    assert (answers.refused, answers.silent) == ({"refuses"}, {"silent"})
    answers.clear()
    assert not answers.refused
