"""Peers that serve are served before peers that only take, when there is a queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.ledgers.given_ledger import held_in
from shoal.ledgers.statements import acknowledge, delegate, is_genuine
from shoal.ledgers.taken_ledger import TakenLedger
from shoal.net.identity import Identity
from shoal.policy.batching.engine_limits import Limits
from shoal.policy.contribution.credit import period_of
from shoal.protocol import MAX_DELEGATIONS, MAX_PRESENTED, Failure, Opened, Pong, StepResult

from .harness import QUICK, Swarm
from .intruder import FINGERPRINT, MODEL, Intruder, Raw, raw

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 3, 44, 8, 9]])
VICTIM, GIVER, CONTACT, TAKER_CLIENT, GIVER_CLIENT = (Identity.temporary() for _ in range(5))
ON_SPAN: dict[str, Any] = {"model": MODEL, "fingerprint": FINGERPRINT, "start": 0, "end": 4}


def week() -> int:
    return period_of(time.time())


def introducing(*servers: Identity, client: Identity = GIVER_CLIENT, said: Any = ()) -> Raw:
    until = int(time.time()) + 3600
    delegations = [delegate(each, client.peer, until=until).model_dump() for each in servers]
    return raw("introduce", delegations=delegations, acknowledgements=[each.model_dump() for each in said])


def acknowledging(client: Identity, server: str, **changes: Any) -> Raw:
    statement = acknowledge(client, server, period=week(), work=7)
    return raw("acknowledge", acknowledgement=statement.model_dump() | changes)


def opening() -> Raw:
    return raw("open", **ON_SPAN, batch_size=1, expected_length=256)


def step(num_tokens: int = 2) -> Raw:
    return raw("step", {"hidden": torch.ones(1, num_tokens, 32)}, position=0)


def server_with_a_giver(swarm: MakeSwarm, folder: Path, **options: Any) -> Swarm:
    """A swarm of one server, for whose user the giver's server has computed something."""
    TakenLedger(folder).add(GIVER.peer, 1000, client=VICTIM.peer, now=week())
    net = swarm()
    net.start("0:4", peer=VICTIM.peer, ledger_folder=folder, **options)
    return net


def weight(net: Swarm, payer: Identity) -> float:
    return net.call(net.servers[VICTIM.peer].engine.priorities.weight_of, payer.peer)


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [False, True])
def test_both_sides_keep_what_a_server_computed_for_a_client(swarm: MakeSwarm, tmp_path: Path, trains: bool) -> None:
    net, own = swarm(), Identity.load_or_create(tmp_path / "own")
    net.start("0:4", peer=VICTIM.peer, ledger_folder=tmp_path / "server")
    config = replace(QUICK, own_servers=(tmp_path / "own",), ledger_folder=tmp_path / "client")
    prompted = {"tuning_mode": "ptune", "pre_seq_len": 4} if trains else {}
    model = net.model(config=config, **prompted)
    if trains:
        texts = torch.arange(1, 65).reshape(2, 32)
        for _ in range(8):
            model(texts, labels=texts).loss.backward()
    else:
        model.generate(PROMPT, max_new_tokens=300, do_sample=False)
    model.close()
    net.settle(lambda: net.network.num_handlers(VICTIM.peer) == 0)
    net.stop(VICTIM.peer)
    (taken,) = TakenLedger(tmp_path / "client").rows(now=week())
    (held,) = held_in(tmp_path / "server", VICTIM.peer, now=week())
    assert is_genuine(held.acknowledgement)
    assert (taken.client, taken.server) == (own.peer, VICTIM.peer)
    assert taken.work == held.acknowledgement.work == int(held.computed) > 0


def test_work_is_acknowledged_while_a_session_is_open(swarm: MakeSwarm, tmp_path: Path) -> None:
    net = swarm()
    net.start("0:4", peer=VICTIM.peer, ledger_folder=tmp_path / "server")
    model = net.model(config=replace(QUICK, own_servers=(), ledger_folder=tmp_path / "client"))
    with model.inference_session(max_length=400) as session:
        model.generate(PROMPT, max_new_tokens=300, do_sample=False, session=session)
        ledger = TakenLedger(tmp_path / "client")
        net.settle(lambda: bool(ledger.given_by(now=week()).get(VICTIM.peer)))


# -- who is served first ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("introduces", [True, False])
def test_the_prompt_of_a_peer_that_serves_is_computed_before_that_of_one_that_only_takes(
    swarm: MakeSwarm, tmp_path: Path, introduces: bool
) -> None:
    net = server_with_a_giver(swarm, tmp_path, limits=Limits(max_num_batched_tokens=64))
    engine = net.servers[VICTIM.peer].engine
    taker, giver = (Intruder(net, VICTIM.peer, name=each.peer) for each in (TAKER_CLIENT, GIVER_CLIENT))
    streams = {"taker": taker.open(), "giver": giver.open()}
    if introduces:
        giver.tell(streams["giver"], introducing(GIVER))
    for client, name in ((taker, "taker"), (giver, "giver")):
        client.tell(streams[name], opening())
        ((opened, _),) = client.hear(streams[name])
        assert isinstance(opened, Opened)
    gate, order = threading.Event(), list[str]()

    async def hold() -> None:
        await engine.executor.run(gate.wait)

    async def compete() -> None:
        holding = asyncio.create_task(hold())
        for number, name in enumerate(streams, start=1):  # the taker's comes first
            await streams[name].send(step(200).header, [step(200).payload])
            while engine.queue_length < number:  # noqa: ASYNC110 - nothing tells when it is there
                await asyncio.sleep(0)
        gate.set()

        async def hear(name: str) -> None:
            header, _ = await streams[name].receive()
            assert b"step_result" in header
            order.append(name)

        async with asyncio.timeout(20):
            await asyncio.gather(*map(hear, streams), holding)

    net.runtime.run(compete())
    assert order == (["giver", "taker"] if introduces else ["taker", "giver"])
    for client, name in ((taker, "taker"), (giver, "giver")):
        client.finish(streams[name])


def test_a_client_has_its_weight_as_long_as_its_stream(swarm: MakeSwarm, tmp_path: Path) -> None:
    net = server_with_a_giver(swarm, tmp_path)
    client = Intruder(net, VICTIM.peer, name=GIVER_CLIENT.peer)
    stream = client.open()
    client.tell(stream, introducing(GIVER), raw("ping"))
    client.hear(stream)
    assert weight(net, GIVER_CLIENT) == 4.0
    assert weight(net, TAKER_CLIENT) == 1.0
    client.finish(stream)
    net.settle(lambda: net.network.num_handlers(VICTIM.peer) == 0)
    assert weight(net, GIVER_CLIENT) == 1.0


def test_a_real_client_acts_for_the_servers_of_its_machine(swarm: MakeSwarm, tmp_path: Path) -> None:
    own = Identity.load_or_create(tmp_path / "own")
    TakenLedger(tmp_path / "server").add(own.peer, 10**6, client=VICTIM.peer, now=week())
    net = swarm()
    net.start("0:4", peer=VICTIM.peer, ledger_folder=tmp_path / "server")
    config = replace(QUICK, own_servers=(tmp_path / "own",), ledger_folder=tmp_path / "client")
    name = Identity.temporary().peer
    model = net.model(config=config, peer=name)
    with model.inference_session(max_length=32) as session:
        model.generate(PROMPT, max_new_tokens=4, do_sample=False, session=session)
        priorities = net.servers[VICTIM.peer].engine.priorities
        assert 3.9 < net.call(priorities.weight_of, name) < 4.0  # it has used a little of its credit


# -- what strangers say -----------------------------------------------------------------------------------------------


def test_a_client_that_introduces_itself_twice_is_refused(swarm: MakeSwarm, tmp_path: Path) -> None:
    net = server_with_a_giver(swarm, tmp_path)
    client = Intruder(net, VICTIM.peer, name=GIVER_CLIENT.peer)
    (failure,) = client.ask(introducing(GIVER), introducing(GIVER))
    assert isinstance(failure, Failure)
    assert failure.reason == "a client introduces itself once"
    assert weight(net, GIVER_CLIENT) == 1.0


@pytest.mark.parametrize(
    "frame",
    [
        introducing(*(Identity.temporary() for _ in range(MAX_DELEGATIONS + 1))),
        introducing(),
        introducing(GIVER, said=[acknowledge(CONTACT, GIVER.peer, period=1, work=1)] * (MAX_PRESENTED + 1)),
        raw("introduce", delegations=[{"by": GIVER.peer, "until": 1, "signature": "zz" * 64}]),
        raw("introduce", delegations=[{"by": "x" * 65, "until": 1, "signature": "00" * 64}]),
        acknowledging(GIVER_CLIENT, VICTIM.peer, work=0),
        acknowledging(GIVER_CLIENT, VICTIM.peer, work=1 << 60),
        acknowledging(GIVER_CLIENT, VICTIM.peer, work=1.5),
        acknowledging(GIVER_CLIENT, VICTIM.peer, more=1),
    ],
)
def test_what_is_malformed_is_refused_in_one_line(swarm: MakeSwarm, tmp_path: Path, frame: Raw) -> None:
    net = server_with_a_giver(swarm, tmp_path)
    (failure,) = Intruder(net, VICTIM.peer, name=GIVER_CLIENT.peer).ask(frame)
    assert isinstance(failure, Failure)
    assert failure.code == "rejected"
    assert len(failure.reason.splitlines()) == 1


def test_a_session_goes_on_after_statements_that_are_forged(swarm: MakeSwarm, tmp_path: Path) -> None:
    net = server_with_a_giver(swarm, tmp_path)
    client = Intruder(net, VICTIM.peer, name=GIVER_CLIENT.peer)
    forged = acknowledging(GIVER_CLIENT, VICTIM.peer, work=10**9)
    elsewhere = acknowledging(GIVER_CLIENT, CONTACT.peer)
    borrowed = introducing(GIVER, client=TAKER_CLIENT)  # a delegation for another client
    answers = client.ask(borrowed, forged, opening(), forged, elsewhere, raw("ping"), step())
    assert [type(each) for each in answers] == [Opened, Pong, StepResult]
    net.stop(VICTIM.peer)
    assert held_in(tmp_path, VICTIM.peer, now=week()) == ()
