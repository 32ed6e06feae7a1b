from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.errors import MissingBlocks
from shoal.peers import Capacity, ServerInfo, ServerState
from shoal.policy.machines.max_blocks import choose_num_blocks
from shoal.policy.placement.petals import choose_span
from shoal.policy.routing.costs import HOP_OVERHEAD, NO_ROOM, OTHER_DTYPE, RELAYED, UNKNOWN_ROUND_TRIP
from shoal.policy.routing.route import Measured, Needs, Route, announced_seconds, choose_route, price_route
from shoal.policy.view import SwarmView, format_blocks
from shoal.spans import Span

PASS, STEP = Needs(session=False), Needs()


def server(
    peer: str,
    span: str,
    speed: float = 10.0,
    state: ServerState = ServerState.ONLINE,
    *,
    head: bool = False,
    to: Mapping[str, float] | None = None,
) -> ServerInfo:
    return ServerInfo(
        peer=peer,
        span=Span.parse(span),
        state=state,
        fingerprint="f",
        decode_speed=speed,
        prefill_speed=speed,
        cache_tokens_left=1,
        dtype="float32",
        quantization="none",
        version="0",
        head=head,
        round_trips=tuple((to or {}).items()),
    )


def route(view: SwarmView, needs: Needs = PASS, *, known: Measured | None = None, **round_trips: float) -> Route:
    return choose_route(view, Span(0, view.num_blocks), needs=needs, known=known or Measured(round_trips=round_trips))


def hops(view: SwarmView, needs: Needs = PASS, *, known: Measured | None = None, **round_trips: float) -> list[str]:
    return [f"{hop.server.peer} {hop.span}" for hop in route(view, needs, known=known, **round_trips).hops]


def test_a_route_covers_every_block_once_and_in_order():
    view = SwarmView(8, (server("a", "0:4"), server("b", "4:8")))
    assert hops(view) == ["a 0:4", "b 4:8"]


def test_one_server_is_preferred_to_two_of_the_same_speed():
    whole, halves = server("whole", "0:8", 5), (server("a", "0:4", 10), server("b", "4:8", 10))
    assert hops(SwarmView(8, (*halves, whole))) == ["whole 0:8"]


def test_a_fast_server_is_worth_the_detour_and_a_far_one_is_not():
    view = SwarmView(4, (server("slow", "0:4", 0.5), server("fast", "2:4", 100)))
    for needs in PASS, STEP:
        assert hops(view, needs, slow=0.001, fast=0.001) == ["slow 0:2", "fast 2:4"]
        assert hops(view, needs, slow=0.001, fast=9.0) == ["slow 0:4"]


def test_a_ring_goes_over_the_shorter_links_between_servers():
    first = server("first", "0:2", to={"near": 0.01, "far": 0.3})
    view = SwarmView(4, (first, server("far", "2:4"), server("near", "2:4")))
    round_trips = {"first": 0.1, "far": 0.1, "near": 0.1}
    for needs in PASS, STEP:
        assert hops(view, needs, **round_trips) == ["first 0:2", "near 2:4"]
        assert hops(view, needs, **round_trips | {"far": 0.01}) == ["first 0:2", "near 2:4"]


def test_a_ring_costs_one_way_trips():
    view = SwarmView(4, (server("a", "0:2", to={"b": 0.02}), server("b", "2:4")))
    computing = 2 * announced_seconds(view.servers[0], 2, 1)
    for needs in PASS, STEP:
        found = route(view, needs, a=0.1, b=0.3)
        assert found.seconds == pytest.approx(0.05 + 0.01 + 0.15 + computing + 2 * HOP_OVERHEAD)


def test_of_two_servers_that_disagree_on_their_distance_the_farther_is_believed():
    view = SwarmView(4, (server("a", "0:2", to={"b": 0.001}), server("b", "2:4", to={"a": 0.4})))
    assert route(view, STEP, a=0.1, b=0.1).costs[1].network == pytest.approx(0.2 + HOP_OVERHEAD)


def test_a_link_that_was_never_measured_costs_no_more_than_the_way_through_the_client():
    view = SwarmView(4, (server("a", "0:2"), server("b", "2:4")))
    assert route(view, STEP, a=0.01, b=0.03).costs[1].network == pytest.approx(0.02 + HOP_OVERHEAD)
    assert route(view, STEP, a=1.0, b=1.1).costs[1].network == pytest.approx(UNKNOWN_ROUND_TRIP / 2 + HOP_OVERHEAD)


def test_a_link_from_a_near_server_to_a_far_one_is_long_although_it_was_never_measured():
    view = SwarmView(4, (server("a", "0:2"), server("b", "2:4")))
    assert route(view, STEP, a=0.1, b=0.7).costs[1].network == pytest.approx(0.3 + HOP_OVERHEAD)


def test_servers_that_cannot_reach_one_another_cost_the_way_through_the_client():
    view = SwarmView(4, (server("a", "0:2", to={"b": 0.001, "c": 0.1}), server("b", "2:4"), server("c", "2:4")))
    round_trips = {"a": 0.5, "b": 0.5, "c": 0.5}
    assert hops(view, STEP, **round_trips) == ["a 0:2", "b 2:4"]
    known = Measured(round_trips, broken_pairs=frozenset({("a", "b")}))
    assert hops(view, STEP, known=known) == ["a 0:2", "c 2:4"]
    only_b = view.only(lambda each: each.peer != "c")
    assert route(only_b, STEP, known=known).costs[1].network == pytest.approx(0.5 + HOP_OVERHEAD)
    reverse = Measured(round_trips, broken_pairs=frozenset({("b", "a")}))
    assert hops(view, STEP, known=reverse) == ["a 0:2", "b 2:4"]


def test_a_part_of_a_ring_is_chosen_for_its_neighbors():
    upstream, downstream = (
        server("before", "0:2", to={"x": 0.2, "y": 0.01}),
        server("after", "4:6", to={"x": 0.2, "y": 0.01}),
    )
    view = SwarmView(6, (upstream, server("x", "2:4"), server("y", "2:4"), downstream))
    known = Measured({"x": 0.001, "y": 0.2, "before": 0.001, "after": 0.001})
    alone = choose_route(view, Span(2, 4), needs=STEP, known=known)
    between = choose_route(view, Span(2, 4), needs=STEP, known=known, upstream=upstream, downstream=downstream)
    assert [hop.server.peer for hop in (*alone.hops, *between.hops)] == ["x", "y"]
    assert between.seconds == pytest.approx(0.005 + HOP_OVERHEAD + announced_seconds(view.servers[2], 2, 1) + 0.005)


def test_long_inputs_go_where_prefill_is_fast_and_single_tokens_where_decoding_is():
    decodes = replace(server("decodes", "0:4"), decode_speed=100.0, prefill_speed=100.0)
    prefills = replace(server("prefills", "0:4"), decode_speed=10.0, prefill_speed=10_000.0)
    view = SwarmView(4, (decodes, prefills))
    assert hops(view) == ["decodes 0:4"]
    assert hops(view, replace(PASS, step_tokens=1000)) == ["prefills 0:4"]
    assert hops(view, replace(PASS, prompt_tokens=1000, num_steps=10)) == ["prefills 0:4"]
    assert hops(view, replace(PASS, prompt_tokens=1000, num_steps=1000)) == ["decodes 0:4"]


def test_a_server_without_room_is_used_only_if_there_are_no_others():
    full, slow = server("full", "0:4", 100), replace(server("slow", "0:4", 1), cache_tokens_left=512)
    session = replace(PASS, needed_tokens=512)
    assert hops(SwarmView(4, (full, slow)), session) == ["slow 0:4"]
    assert hops(SwarmView(4, (full,)), session) == ["full 0:4"]
    assert hops(SwarmView(4, (full, slow)), PASS) == ["full 0:4"]
    assert route(SwarmView(4, (full,)), session).costs[0].handicap == NO_ROOM


def test_a_queue_costs_a_step_for_each_request_in_it():
    busy, slower = replace(server("busy", "0:4", 10), queue_length=5), server("slower", "0:4", 5)
    assert hops(SwarmView(4, (busy, slower))) == ["slower 0:4"]
    assert route(SwarmView(4, (busy,))).costs[0].queue == pytest.approx(0.5)


def test_a_queue_costs_less_on_a_server_that_computes_many_sessions_together():
    capacity = Capacity(4, ((4, 8 * 10 * 4),), None, 1.0, 1.0)  # eight times as fast when its passes are full
    busy = replace(server("busy", "0:4", 10), queue_length=40, capacity=capacity)
    assert route(SwarmView(4, (busy,)), STEP).costs[0].queue == pytest.approx((0.5 + 0.75 * 40 / 8) / 10)
    assert route(SwarmView(4, (busy,)), PASS).costs[0].queue == pytest.approx(40 / 10)
    alone = replace(busy, queue_length=1)
    assert route(SwarmView(4, (alone,)), STEP).costs[0].queue <= 1 / 10


def test_a_server_behind_a_relay_is_used_if_others_are_not_faster():
    relayed = replace(server("relayed", "0:4"), addresses=("/ip4/1.2.3.4/tcp/1/p2p/R/p2p-circuit/p2p/S",))
    assert hops(SwarmView(4, (relayed, server("direct", "0:4")))) == ["direct 0:4"]
    assert hops(SwarmView(4, (relayed, server("direct", "0:4", 1)))) == ["relayed 0:4"]
    assert route(SwarmView(4, (relayed,))).costs[0].handicap == RELAYED
    with_one_for_its_lan = replace(relayed, addresses=(*relayed.addresses, "/ip4/192.168.1.7/tcp/2/p2p/S"))
    assert route(SwarmView(4, (with_one_for_its_lan,))).costs[0].handicap == RELAYED
    assert route(SwarmView(4, (server("direct", "0:4"),))).costs[0].handicap == 0


def test_among_nearly_equal_servers_the_one_with_the_clients_dtype_is_taken():
    other, same = replace(server("other", "0:4", 10.1), dtype="bfloat16"), server("same", "0:4", 10)
    assert hops(SwarmView(4, (other, same)), replace(PASS, dtype="float32")) == ["same 0:4"]
    assert hops(SwarmView(4, (other, same)), PASS) == ["other 0:4"]
    faster = replace(server("other", "0:4", 10 * OTHER_DTYPE + 1), dtype="bfloat16")
    assert hops(SwarmView(4, (faster, same)), replace(PASS, dtype="float32")) == ["other 0:4"]


def test_a_server_that_was_slower_than_it_says_is_believed_no_longer():
    view = SwarmView(4, (server("liar", "0:4", 1000), server("honest", "0:4", 10)))
    assert hops(view) == ["liar 0:4"]
    assert hops(view, known=Measured(slowness={"liar": 200.0})) == ["honest 0:4"]


def test_pinned_blocks_go_through_their_peer_and_no_other():
    view = SwarmView(8, (server("fast", "0:8", 100), server("slow", "2:8", 1)), pinned=((Span(2, 4), "slow"),))
    assert hops(view) == ["fast 0:2", "slow 2:4", "fast 4:8"]
    assert hops(replace(view, pinned=((Span(2, 4), "fast"),))) == ["fast 0:8"]


def test_blocks_that_are_pinned_to_a_peer_without_them_are_missing():
    view = SwarmView(8, (server("a", "0:8"), server("b", "0:3")), pinned=((Span(2, 4), "b"),))
    assert view.missing() == [3]
    with pytest.raises(MissingBlocks, match="no server holds blocks 3:4"):
        hops(view)


def test_the_error_names_blocks_that_no_server_holds():
    view = SwarmView(8, (server("a", "0:2"), server("b", "5:7")))
    with pytest.raises(MissingBlocks, match="no server holds blocks 2:5, 7:8") as error:
        hops(view)
    assert error.value.blocks == (2, 3, 4, 7)


def test_a_route_to_a_head_ends_there_and_is_free_before_it():
    whole, middle, last = server("whole", "0:4", 99), server("middle", "1:3"), server("last", "2:4", 1, head=True)
    view = SwarmView(4, (whole, middle, last, server("inside", "0:3", 999, head=True)))

    def ends(span: str, *, head: bool) -> list[str]:
        needs = Needs(session=False, head=head)
        return [h.server.peer for h in choose_route(view, Span.parse(span), needs=needs, known=Measured()).hops]

    assert ends("0:4", head=False) == ["whole"]
    assert ends("0:4", head=True) in (["whole", "last"], ["inside", "last"])
    assert ends("3:4", head=True) == ["last"]
    with pytest.raises(MissingBlocks, match="no server holds block 3:4 and the output head"):
        hops(view.only(lambda each: each.peer != "last"), Needs(head=True))


def test_a_route_says_where_its_time_goes():
    first = replace(server("a", "0:2", 20, to={"b": 0.01}), name="alpha", queue_length=1)
    found = route(SwarmView(4, (first, server("b", "2:4", 100))), replace(STEP, needed_tokens=9), a=0.006, b=0.02)
    assert found.explain() == (
        "20,132 ms a step: alpha 0:2 (network 5, compute 50, queue 50, handicap 10,000), "
        "b 2:4 (network 7, compute 10, handicap 10,000), back 10"
    )


def test_the_price_of_a_chosen_route_is_the_one_that_it_was_chosen_for():
    view = SwarmView(4, (server("a", "0:3", to={"b": 0.02}), server("b", "2:4")))
    chosen = route(view, STEP, a=0.1, b=0.3)
    assert price_route(chosen.hops, needs=STEP, known=Measured({"a": 0.1, "b": 0.3})) == chosen


@st.composite
def swarms(draw: st.DrawFn) -> SwarmView:
    num_blocks = draw(st.integers(1, 5))
    names = [f"s{index}" for index in range(draw(st.integers(0, 4)))]
    seconds = st.sampled_from((0.001, 0.02, 0.1, 0.5))

    def make(peer: str, span: str) -> ServerInfo:
        to = {name: draw(seconds) for name in (*names, "whole") if name != peer and draw(st.booleans())}
        return replace(
            server(peer, span, draw(st.floats(0.5, 500)), to=to, head=peer == "whole" or draw(st.booleans())),
            queue_length=draw(st.integers(0, 2)),
        )

    servers = [make("whole", f"0:{num_blocks}")]
    for name in names:
        start = draw(st.integers(0, num_blocks - 1))
        servers.append(make(name, f"{start}:{draw(st.integers(start + 1, num_blocks))}"))
    pinned: tuple[tuple[Span, str], ...] = ()
    if draw(st.booleans()):
        chosen = draw(st.sampled_from([each for each in servers if each.head or each.span.end < num_blocks]))
        pinned = ((chosen.span, chosen.peer),)
    return SwarmView(num_blocks, tuple(draw(st.permutations(servers))), pinned)


@st.composite
def knowledge(draw: st.DrawFn) -> Measured:
    peers = ("whole", "s0", "s1", "s2", "s3")
    some = st.dictionaries(st.sampled_from(peers), st.sampled_from((0.002, 0.03, 0.2)))
    pairs = st.sets(st.tuples(st.sampled_from(peers), st.sampled_from(peers)).filter(lambda pair: pair[0] != pair[1]))
    slowness = st.dictionaries(st.sampled_from(peers), st.floats(0.5, 5))
    return Measured(draw(some), draw(slowness), frozenset(draw(pairs)), draw(some))


def plain_seconds(servers: Sequence[ServerInfo], known: Measured) -> float:
    """What a step costs when `servers[i]` computes block i, written as plainly as possible."""

    def client(each: ServerInfo) -> float:
        return known.round_trips.get(each.peer, UNKNOWN_ROUND_TRIP)

    def link(sender: ServerInfo, receiver: ServerInfo) -> float:
        through_client = client(sender) / 2 + client(receiver) / 2
        said = [
            s
            for each, other in ((sender, receiver), (receiver, sender))
            for n, s in each.round_trips
            if n == other.peer
        ]
        if (sender.peer, receiver.peer) in known.broken_pairs:
            return through_client
        return (
            max(said) / 2
            if said
            else max(min(UNKNOWN_ROUND_TRIP / 2, through_client), abs(client(sender) - client(receiver)) / 2)
        )

    total = client(servers[0]) / 2 + client(servers[-1]) / 2
    total += sum(link(one, other) for one, other in pairwise(servers) if one is not other)
    for index, each in enumerate(servers):
        if index == 0 or servers[index - 1] is not each:
            total += HOP_OVERHEAD + each.queue_length / each.decode_speed + known.work_in_flight.get(each.peer, 0.0)
        total += known.slowness.get(each.peer, 1.0) / (each.decode_speed * len(each.span))
    return total


@example(  # a detour over two known links is shorter than a link that was never measured
    SwarmView(
        3,
        (
            server("whole", "0:1", 500),
            server("s0", "1:3", 500),
            server("s1", "1:3", 500, to={"whole": 0.001, "s0": 0.001}),
        ),
    ),
    Measured(),
    STEP,
)
@given(swarms(), knowledge(), st.sampled_from((PASS, STEP, Needs(head=True))))
def test_no_other_assignment_of_blocks_is_faster(view: SwarmView, known: Measured, needs: Needs):
    found = route(view, needs, known=known)
    chosen = [hop.server for hop in found.hops for _ in hop.span]
    holders = [
        [each for each in here if not needs.head or block < view.num_blocks - 1 or each.head]
        for block, here in enumerate(view.holders(Span(0, view.num_blocks)))
    ]
    assert [block for hop in found.hops for block in hop.span] == list(range(view.num_blocks))
    assert all(each in here for each, here in zip(chosen, holders, strict=True))

    def every(block: int) -> list[list[ServerInfo]]:
        if block == view.num_blocks:
            return [[]]
        return [[each, *rest] for each in holders[block] for rest in every(block + 1)]

    fastest = min(plain_seconds(each, known) for each in every(0))
    assert plain_seconds(chosen, known) == pytest.approx(fastest)
    assert found.seconds == pytest.approx(fastest)


def test_among_equals_the_first_is_taken_so_that_the_caller_may_shuffle():
    one, other = server("one", "0:4"), server("other", "0:4")
    assert hops(SwarmView(4, (one, other))) == ["one 0:4"]
    assert hops(SwarmView(4, (other, one))) == ["other 0:4"]


def test_a_new_server_goes_where_the_swarm_is_weakest():
    assert choose_span([5, 5, 0, 0, 5, 5], num_blocks=2) == Span(2, 4)
    assert choose_span([0, 0, 0], num_blocks=3) == Span(0, 3)
    assert choose_span([1, 2, 3, 0.5], num_blocks=2) == Span(2, 4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_the_chosen_span_has_the_least_throughput_when_sorted(throughput: list[int], data: st.DataObject):
    num_blocks = data.draw(st.integers(1, len(throughput)))
    span = choose_span(throughput, num_blocks=num_blocks)
    windows = [sorted(throughput[s : s + num_blocks]) for s in range(len(throughput) - num_blocks + 1)]
    assert sorted(throughput[span.start : span.end]) == min(windows)


def test_blocks_leave_room_for_caches():
    assert choose_num_blocks(1000, [100] * 20) == 8
    assert choose_num_blocks(1000, [100] * 4) == 4
    assert choose_num_blocks(100, [100]) == 0


def test_a_leaving_server_counts_for_nothing_and_a_joining_one_does():
    view = SwarmView(2, (server("a", "0:1", 3, ServerState.JOINING), server("b", "1:2", 4, ServerState.LEAVING)))
    assert view.throughput() == [3.0, 0.0]
    assert view.online().missing() == [0, 1]


def test_a_server_that_has_not_measured_its_speed_counts_a_little_when_a_span_is_chosen():
    joining = replace(server("a", "0:1", 3, ServerState.JOINING), decode_speed=None, prefill_speed=None)
    assert SwarmView(2, (joining,)).throughput() == [1.0, 0.0]


def test_a_server_without_a_speed_is_used_only_if_there_is_no_other():
    view = SwarmView(
        4, (replace(server("new", "0:4"), decode_speed=None, prefill_speed=None), server("slow", "0:4", 1))
    )
    assert hops(view) == ["slow 0:4"]
    assert hops(view.only(lambda server: server.peer == "new")) == ["new 0:4"]


def test_blocks_are_named_as_spans():
    assert format_blocks([7, 0, 2, 1]) == "0:3, 7:8"
