"""What `shoal status --contribution` shows of a machine's ledgers."""

from __future__ import annotations

import json
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from shoal.cli import run
from shoal.cli.terminal.contribution_table import MOST_PEERS, render_contribution
from shoal.ledgers.given_ledger import GivenLedger
from shoal.ledgers.machine_totals import MachineTotals, PeerTotal, WeekTotal
from shoal.ledgers.statements import acknowledge
from shoal.ledgers.taken_ledger import TakenLedger
from shoal.net.identity import Identity
from shoal.policy.contribution.credit import period_of

OWN, ALICE, BOB = (Identity.temporary() for _ in range(3))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose server computed something for two clients, and whose client took something of one of them."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    week, ledger = period_of(time.time()), GivenLedger(tmp_path / "contribution", OWN.peer)
    for client, period, work in [(ALICE, week, 12_340), (BOB, week - 1, 250), (BOB, week - 4, 10**9)]:
        ledger.take(acknowledge(client, OWN.peer, period=period, work=work), work, now=period)
    ledger.save(ledger.copy())
    TakenLedger(tmp_path / "contribution").add(ALICE.peer, 4_100_000, client="", now=week)
    return tmp_path


def shown(totals: MachineTotals, width: int) -> str:
    console = Console(file=StringIO(), width=width)
    for part in render_contribution(totals, width=width):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_status_shows_what_was_computed_for_whom_and_nothing_that_is_too_old(cache: Path, capsys) -> None:
    assert run(["status", "--contribution"]) == 0
    out, err = capsys.readouterr()
    assert not err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("…" + ALICE.peer[-10:]) and line.endswith("12.3 G 4.10 T") for line in lines)
    assert any(line.startswith("…" + BOB.peer[-10:]) and line.endswith("250 M -") for line in lines)
    assert "all 12.6 G 4.10 T" in lines


def test_json_has_the_same_in_millions_of_parameter_tokens(cache: Path, capsys) -> None:
    assert run(["status", "--contribution", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["servers"] == [OWN.peer]
    assert found["peers"] == [
        {"peer": ALICE.peer, "given": 12_340, "taken": 4_100_000},
        {"peer": BOB.peer, "given": 250, "taken": 0},
    ]
    assert [(week["given"], week["taken"]) for week in found["weeks"]] == [(12_340, 4_100_000), (250, 0)]


def test_a_machine_without_ledgers_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    assert run(["status", "--contribution"]) == 0
    assert "nothing for others in the last four weeks" in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 79, 88, 200])
def test_no_line_is_longer_than_the_terminal_and_no_peer_is_forgotten(width: int) -> None:
    peers = tuple(PeerTotal(Identity.temporary().peer, 10**number, 7) for number in range(16)) * 2
    out = shown(MachineTotals((OWN.peer,), peers, (WeekTotal(0, 5, 6),)), width)
    assert max(map(len, out.splitlines())) <= width
    assert f"{len(peers) - MOST_PEERS} others" in out
    assert ("12D3KooW" in out) is (width >= 88)


def test_a_damaged_ledger_is_one_warning_and_counts_as_empty(cache: Path, capsys) -> None:
    (cache / "contribution" / "taken.json").write_text('{"rows": [{"period": -1}]}')
    assert run(["status", "--contribution"]) == 0
    out, err = capsys.readouterr()
    assert "counts as empty" in err
    assert "Traceback" not in err
    assert "12.3 G" in out
    assert "4.10 T" not in out
