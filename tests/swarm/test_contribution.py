"""Peers that serve are served before peers that only take, when there is a queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from shoal.ledgers.given_ledger import held_in
from shoal.ledgers.ledger_place import LedgerPlace
from shoal.ledgers.statements import is_genuine
from shoal.ledgers.taken_ledger import TakenLedger
from shoal.net.identity import Identity
from shoal.policy.contribution.credit import period_of
from shoal.server.server import Server

from .harness import QUICK, Swarm

PROMPT = [[5, 17, 3, 44, 8, 9]]


def identity_file(path: Path) -> Identity:
    """The identity of a server, in a file."""
    return Identity.load_or_create(path)


def now(server: Server) -> int:
    import time

    return period_of(time.time())


def test_both_sides_keep_what_a_server_computed_for_a_client(swarm: Callable[..., Swarm], tmp_path: Path) -> None:
    net, server, own = swarm(), Identity.temporary(), Identity.load_or_create(tmp_path / "own")
    net.start("0:4", peer=server.peer, ledger_folder=tmp_path / "server")
    place = LedgerPlace(tmp_path / "client", (tmp_path / "own",))
    model = net.model(config=replace(QUICK, own_servers=place.identities, ledger_folder=place.folder))
    model.generate(torch.tensor(PROMPT), max_new_tokens=300, do_sample=False)
    model.close()
    net.settle(lambda: net.network.num_handlers(server.peer) == 0)
    net.stop(server.peer)
    week = now(net.servers[server.peer])
    (taken,) = TakenLedger(place.folder).rows(now=week)
    (held,) = held_in(tmp_path / "server", server.peer, now=week)
    assert is_genuine(held.acknowledgement)
    assert (taken.client, taken.server, taken.work) == (own.peer, server.peer, held.acknowledgement.work)
    assert held.acknowledgement.work == int(held.computed) > 0
