"""Which sums on servers have which gradients, as the client counts them."""

from __future__ import annotations

import itertools

import torch

from shoal.client.training.pass_plan import MicrobatchPiece
from shoal.client.training.sum_ledger import SumLedger, SummedPass
from shoal.policy.routing.route import Hop
from shoal.spans import Span

from ..server_infos import info

ONE, OTHER = (Hop(info(peer), Span(0, 4)) for peer in ("one", "other"))
PART = Hop(ONE.server, Span(2, 4))
NOTHING = torch.zeros(1, 1, 1)


def ledger() -> SumLedger:
    names = itertools.count()
    return SumLedger(lambda: f"sum {next(names)}")


def passed(number: int, hop: Hop = ONE) -> SummedPass:
    return SummedPass(number, MicrobatchPiece(hop.span, NOTHING, None, None, hop=hop), NOTHING)


def test_each_server_and_span_has_a_sum_of_its_own():
    own = ledger()
    names = [own.name_for(hop) for hop in (ONE, OTHER, PART)]
    assert len(set(names)) == 3
    assert [own.name_for(hop) for hop in (ONE, OTHER, PART)] == names
    assert not own.sums  # nothing is in them yet


def test_what_is_counted_is_in_the_order_of_blocks_and_microbatches():
    own = ledger()
    for number, hop in [(2, PART), (1, OTHER), (3, ONE), (0, ONE)]:
        own.count(own.name_for(hop), passed(number, hop))
    assert [(each.hop.server.peer, each.hop.span, [one.number for one in each.passes]) for each in own.sums] == [
        ("one", Span(0, 4), [0, 3]),
        ("other", Span(0, 4), [1]),
        ("one", Span(2, 4), [2]),
    ]


def test_after_an_answer_that_is_not_used_another_sum_begins():
    own = ledger()
    first = own.name_for(ONE)
    own.count(first, passed(0))
    own.close([ONE])
    second = own.name_for(ONE)
    assert second != first
    own.count(first, passed(1))  # it was asked for before
    own.count(second, passed(2))
    assert [[one.number for one in each.passes] for each in own.sums] == [[0, 1], [2]]


def test_a_sum_is_whole_if_it_has_every_microbatch():
    own = ledger()
    for number in range(3):
        own.count(own.name_for(ONE), passed(number))
    (one,) = own.sums
    assert one.is_whole(num_microbatches=3)
    assert not one.is_whole(num_microbatches=4)
