"""What is signed, kept and believed of what peers computed for each other."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.ledgers.given_ledger import MAX_HELD, GivenLedger, held_in, to_present
from shoal.ledgers.ledger_place import LedgerPlace
from shoal.ledgers.own_servers import own_servers
from shoal.ledgers.priorities import Priorities
from shoal.ledgers.statements import (
    MAX_DELEGATION_SECONDS,
    acknowledge,
    delegate,
    is_genuine,
    is_valid_delegation,
)
from shoal.ledgers.tabs import Tabs
from shoal.ledgers.taken_ledger import TakenLedger
from shoal.net.identity import Identity
from shoal.policy.contribution.credit import PERIOD_SECONDS
from shoal.protocol import MAX_PRESENTED, Acknowledgement, Introduce
from shoal.spans import Span

pytestmark = pytest.mark.anyio

V, X, S, T, CLIENT = (Identity.temporary() for _ in range(5))
WEEK = 2900
NOW = WEEK * PERIOD_SECONDS + 1000.0


def introduction(*servers: Identity, said: tuple[Acknowledgement, ...] = (), client: str = CLIENT.peer) -> Introduce:
    delegations = tuple(delegate(each, client, until=int(NOW) + 3600) for each in servers)
    return Introduce(delegations=delegations, acknowledgements=said)


def server(folder: Path, **taken: int) -> Priorities:
    """The server V, for whose users X and others have computed something."""
    ledger, names = TakenLedger(folder), {"x": X, "s": S}
    for name, work in taken.items():
        ledger.add(names[name].peer, work, client=V.peer, now=WEEK)
    return Priorities(folder, V.peer, unix_time=lambda: NOW)


# -- statements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"client": S.peer}, {"server": S.peer}, {"period": WEEK - 1}, {"work": 8}])
def test_an_acknowledgement_that_was_changed_is_not_genuine(change: dict[str, Any]) -> None:
    statement = acknowledge(X, V.peer, period=WEEK, work=7)
    assert is_genuine(statement)
    assert not is_genuine(statement.model_copy(update=change))


def test_a_delegation_is_for_one_client_and_for_a_day_at_most() -> None:
    ours = delegate(S, CLIENT.peer, until=int(NOW) + 60)
    assert is_valid_delegation(ours, CLIENT.peer, now=NOW)
    assert not is_valid_delegation(ours, T.peer, now=NOW)
    assert not is_valid_delegation(ours, CLIENT.peer, now=NOW + 60)
    assert not is_valid_delegation(ours.model_copy(update={"by": T.peer}), CLIENT.peer, now=NOW)
    longer = delegate(S, CLIENT.peer, until=int(NOW) + MAX_DELEGATION_SECONDS + 60)
    assert not is_valid_delegation(longer, CLIENT.peer, now=NOW)


def test_a_delegation_is_no_acknowledgement_and_the_other_way_round() -> None:
    delegation = delegate(S, CLIENT.peer, until=int(NOW) + 60)
    fields = {"client": S.peer, "server": CLIENT.peer, "period": 1, "work": int(NOW) + 60}
    assert not is_genuine(Acknowledgement(**fields, signature=delegation.signature))


# -- ledgers ----------------------------------------------------------------------------------------------------------


@given(
    st.permutations([(WEEK, 5), (WEEK, 9), (WEEK, 9), (WEEK - 1, 20), (WEEK - 1, 3), (WEEK - 4, 1000), (WEEK + 1, 7)])
)
def test_the_newest_sum_of_each_week_is_kept_in_whichever_order_and_however_often_they_come(order) -> None:
    ledger = GivenLedger(Path("/nowhere"), V.peer)
    for period, work in order:
        ledger.take(acknowledge(X, V.peer, period=period, work=work), 1.0, now=WEEK)
    assert {(row.acknowledgement.period, row.acknowledgement.work) for row in ledger.copy()[0]} == {
        (WEEK, 9),
        (WEEK - 1, 20),
    }


def test_invented_sums_take_no_place_from_those_that_were_computed() -> None:
    ledger = GivenLedger(Path("/nowhere"), V.peer)
    ledger.take(acknowledge(X, V.peer, period=WEEK, work=10), 10.0, now=WEEK)
    real = acknowledge(S, V.peer, period=WEEK, work=1)
    for number in range(MAX_HELD + 10):
        fake = real.model_copy(update={"client": f"client {number}", "work": 1 << 50})
        ledger.take(fake, 0.0, now=WEEK)
    held, _ = ledger.copy()
    assert len(held) == MAX_HELD
    assert X.peer in {row.acknowledgement.client for row in held}


def test_a_ledger_is_the_same_after_a_restart(tmp_path: Path) -> None:
    ledger = GivenLedger(tmp_path, V.peer)
    ledger.take(acknowledge(X, V.peer, period=WEEK, work=10), 8.5, now=WEEK)
    ledger.consume(S.peer, 3.0, now=WEEK - 1)
    ledger.consume(S.peer, 4.0, now=WEEK)
    ledger.save(ledger.copy())
    again = GivenLedger(tmp_path, V.peer)
    again.load()
    assert again.copy() == ledger.copy()
    assert again.consumed(S.peer, now=WEEK) == 7.0
    assert again.consumed(S.peer, now=WEEK + 3) == 4.0


@pytest.mark.parametrize(
    "text", ["", "{", '{"held": [{}]}', '{"held": 7}', "[" * 10_000, '{"consumed": [{"work": 1e999}]}']
)
def test_a_damaged_file_is_empty_and_the_log_says_so(tmp_path: Path, caplog, text: str) -> None:
    (tmp_path / f"given-{V.peer}.json").write_text(text)
    assert held_in(tmp_path, V.peer, now=WEEK) == ()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len(caplog.messages[0].splitlines()) == 1


def test_a_disk_that_cannot_be_written_is_one_warning_and_nothing_fails(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").touch()
    ledger = TakenLedger(tmp_path / "file" / "folder")
    for _ in range(3):
        assert ledger.add(X.peer, 5, client="", now=WEEK) == 5
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


def test_clients_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    ledger = TakenLedger(tmp_path)

    def add() -> None:
        for _ in range(20):
            ledger.add(X.peer, 1, client=V.peer, now=WEEK)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.given_by(now=WEEK) == {X.peer: 80}


def test_the_largest_acknowledgements_of_this_machines_servers_are_presented(tmp_path: Path) -> None:
    for own in (S, T):
        ledger = GivenLedger(tmp_path, own.peer)
        for work in range(1, 21):
            ledger.take(acknowledge(Identity.temporary(), own.peer, period=WEEK, work=work), 1.0, now=WEEK)
        ledger.save(ledger.copy())
    found = to_present(tmp_path, (S.peer, T.peer), now=WEEK)
    assert len(found) == MAX_PRESENTED
    assert {each.work for each in found} == set(range(13, 21))


def test_the_identities_that_serve_keeps_are_this_machines_servers(tmp_path: Path, caplog) -> None:
    place = LedgerPlace.of(tmp_path)
    assert own_servers(place) == ()
    kept = Identity.load_or_create(tmp_path / "identities" / "serve-0")
    (tmp_path / "identities" / "serve-0.lock").touch()
    (tmp_path / "identities" / "serve-1").write_bytes(b"nothing")
    Identity.load_or_create(tmp_path / "identities" / "dht-0")
    assert [each.peer for each in own_servers(place)] == [kept.peer]
    assert own_servers(LedgerPlace.of(tmp_path, ())) == ()
    assert own_servers(LedgerPlace.of(tmp_path, [tmp_path / "missing"])) == ()
    assert "is not the identity of a server" in caplog.text


# -- what a client signs ----------------------------------------------------------------------------------------------


async def test_a_client_signs_the_sum_of_what_it_received_as_its_machines_server(tmp_path: Path) -> None:
    own = Identity.load_or_create(tmp_path / "own")
    place = LedgerPlace(tmp_path, (tmp_path / "own",))
    sums = []
    for _ in range(2):  # models, of which each counts for itself
        tabs = Tabs(place, CLIENT.peer, [3_000_000, 1_500_000], unix_time=lambda: NOW)
        tab = tabs.open(V.peer)
        assert tab is not None
        tab.add(255, Span(0, 2))
        assert not tab.due.is_set()
        tab.add(1, Span(1, 2), times=2)
        assert tab.due.is_set()
        said = await tab.acknowledgement()
        assert said is not None
        statement = said.acknowledgement
        assert is_genuine(statement)
        assert (statement.client, statement.server, statement.period) == (own.peer, V.peer, WEEK)
        sums.append(statement.work)
        assert await tab.acknowledgement() == said  # it was not sent
        tab.sent()
        assert await tab.acknowledgement() is None
    assert sums == [1150, 2300]
    assert TakenLedger(tmp_path).given_by(now=WEEK) == {V.peer: 2300}


async def test_what_was_begun_on_another_connection_is_not_taken_for_sent(tmp_path: Path) -> None:
    tabs = Tabs(LedgerPlace(tmp_path, ()), CLIENT.peer, [10**6], unix_time=lambda: NOW)
    one, other = tabs.open(V.peer), tabs.open(V.peer)
    assert one is not None
    assert other is not None
    one.add(40, Span(0, 1))
    assert await one.acknowledgement() is not None
    other.add(13, Span(0, 1))
    assert await other.acknowledgement() is not None  # it is not sent: its connection ends
    one.sent()
    last = await one.acknowledgement()
    assert last is not None
    assert last.acknowledgement.work == 53
    one.sent()
    assert await one.acknowledgement() is None


async def test_nothing_is_lost_when_a_connection_ends_before_its_acknowledgement_is_kept(
    tmp_path: Path,
) -> None:
    tabs = Tabs(LedgerPlace(tmp_path, ()), CLIENT.peer, [10**6], unix_time=lambda: NOW)
    tab = tabs.open(V.peer)
    assert tab is not None
    gate = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(threads)
        busy = loop.run_in_executor(None, gate.wait)
        tab.add(40, Span(0, 1))
        waiting = asyncio.create_task(tab.acknowledgement())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        gate.set()
        await busy
        last = await tab.acknowledgement()
    assert last is not None
    assert last.acknowledgement.work == 40


async def test_a_client_without_a_server_signs_with_a_key_that_it_uses_once(tmp_path: Path) -> None:
    signers = set()
    for _ in range(2):
        tabs = Tabs(LedgerPlace(tmp_path, ()), CLIENT.peer, [10**6], unix_time=lambda: NOW)
        tab = tabs.open(V.peer)
        assert tab is not None
        assert await tab.introduction() is None
        tab.add(300, Span(0, 1))
        said = await tab.acknowledgement()
        assert said is not None
        assert is_genuine(said.acknowledgement)
        assert said.acknowledgement.work == 300
        signers.add(said.acknowledgement.client)
    assert len(signers) == 2
    assert CLIENT.peer not in signers
    assert TakenLedger(tmp_path).given_by(now=WEEK) == {V.peer: 600}


async def test_nothing_is_said_to_this_machines_own_server_and_to_peers_that_cannot_be_named(tmp_path: Path) -> None:
    own = Identity.load_or_create(tmp_path / "own")
    tabs = Tabs(LedgerPlace(tmp_path, (tmp_path / "own",)), CLIENT.peer, [10**6], unix_time=lambda: NOW)
    tab = tabs.open(own.peer)
    assert tab is not None
    tab.add(300, Span(0, 1))
    assert await tab.introduction() is None
    assert await tab.acknowledgement() is None
    assert TakenLedger(tmp_path).given_by(now=WEEK) == {}
    assert tabs.open("s0") is None


# -- what a server believes -------------------------------------------------------------------------------------------


async def test_a_client_of_a_peer_that_served_this_servers_users_has_a_weight_while_its_stream_is_open(
    tmp_path,
) -> None:
    priorities = server(tmp_path, s=100)
    accounts = await priorities.introduce(CLIENT.peer, "its network", introduction(S))
    assert accounts == (S.peer,)
    assert priorities.weight_of("its network") == 4.0
    assert priorities.weight_of("another network") == 1.0
    priorities.served("its network", 100.0)
    assert priorities.weight_of("its network") == 2.5
    priorities.leave("its network", accounts)
    assert priorities.weight_of("its network") == 1.0


async def test_what_was_used_stays_used_under_another_address_and_after_a_restart(tmp_path: Path) -> None:
    priorities = server(tmp_path, s=100)
    async with priorities.kept():
        await priorities.introduce(CLIENT.peer, "home", introduction(S))
        priorities.served("home", 300.0)
    again = Priorities(tmp_path, V.peer, unix_time=lambda: NOW)
    async with again.kept():
        await again.introduce(CLIENT.peer, "elsewhere", introduction(S))
        assert again.weight_of("elsewhere") == 1.75


async def test_work_for_a_contact_earns_something_and_work_for_strangers_nothing(tmp_path: Path) -> None:
    priorities = server(tmp_path, x=100)
    for_contact = acknowledge(X, S.peer, period=WEEK, work=30)
    for_stranger = acknowledge(T, S.peer, period=WEEK, work=10**9)
    await priorities.introduce(CLIENT.peer, "a", introduction(S, said=(for_stranger,)))
    assert priorities.weight_of("a") == 1.0
    await priorities.introduce(CLIENT.peer, "b", introduction(S, said=(for_stranger, for_contact)))
    assert priorities.weight_of("b") == 4.0
    priorities.served("b", 30.0)
    assert priorities.weight_of("b") == 2.5


@pytest.mark.parametrize(
    "said",
    [
        acknowledge(X, S.peer, period=WEEK, work=30).model_copy(update={"work": 31}),  # forged
        acknowledge(T, S.peer, period=WEEK, work=30).model_copy(update={"client": X.peer}),  # signed by another
        acknowledge(X, T.peer, period=WEEK, work=30),  # of work of another server
        acknowledge(X, S.peer, period=WEEK - 4, work=30),  # too old
        acknowledge(X, S.peer, period=WEEK + 1, work=30),  # of a time that has not come
        acknowledge(S, S.peer, period=WEEK, work=30),  # to itself
    ],
)
async def test_what_is_forged_borrowed_old_or_dealt_to_oneself_earns_nothing(tmp_path: Path, said) -> None:
    priorities = server(tmp_path, x=100)
    await priorities.introduce(CLIENT.peer, "a", introduction(S, said=(said,)))
    assert priorities.weight_of("a") == 1.0


async def test_the_same_claims_again_and_in_another_order_change_nothing(tmp_path: Path) -> None:
    older, newer = (acknowledge(X, S.peer, period=WEEK, work=work) for work in (10, 30))
    rng, weights = random.Random(0), set()
    for number in range(5):
        priorities = server(tmp_path / str(number), x=100)
        said = [older, newer, newer, older]
        rng.shuffle(said)
        for each in said:
            await priorities.introduce(CLIENT.peer, "a", introduction(S, said=(each,)))
        priorities.served("a", 30.0)
        weights.add(priorities.weight_of("a"))
    assert weights == {2.5}


async def test_a_delegation_of_another_client_earns_nothing(tmp_path: Path) -> None:
    priorities = server(tmp_path, s=100)
    await priorities.introduce(T.peer, "thief", introduction(S, client=CLIENT.peer))
    assert priorities.weight_of("thief") == 1.0


async def test_no_client_can_present_what_was_acknowledged_to_another_one(tmp_path: Path) -> None:
    priorities = server(tmp_path, x=100)
    to_another = acknowledge(X, T.peer, period=WEEK, work=1000)
    await priorities.introduce(CLIENT.peer, "x's enemy", introduction(S, said=(to_another,)))
    await priorities.introduce(T.peer, "x", introduction(X, client=T.peer))
    priorities.served("x", 100.0)
    assert priorities.weight_of("x") == 2.5  # all of X's credit is still its own


async def test_a_server_without_a_ledger_serves_all_alike(tmp_path: Path) -> None:
    server(tmp_path, s=100)
    priorities = Priorities(None, V.peer, unix_time=lambda: NOW)
    assert await priorities.introduce(CLIENT.peer, "a", introduction(S)) == ()
    assert priorities.weight_of("a") == 1.0


async def test_only_genuine_acknowledgements_of_this_servers_work_are_kept(tmp_path: Path) -> None:
    priorities = server(tmp_path)
    async with priorities.kept():
        good = acknowledge(X, V.peer, period=WEEK, work=5)
        for each in (good, good.model_copy(update={"work": 6}), acknowledge(X, S.peer, period=WEEK, work=9)):
            await priorities.acknowledged(each, 1.0)
    assert [row.acknowledgement for row in held_in(tmp_path, V.peer, now=WEEK)] == [good]
