from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import MissingBlocks
from shoal.routing.placement import choose_num_blocks, choose_span
from shoal.routing.route import HOP_OVERHEAD, UNKNOWN_ROUND_TRIP, choose_route
from shoal.routing.view import SwarmView, format_blocks
from shoal.spans import ServerInfo, ServerState, Span


def server(
    peer: str, span: str, speed: float = 10.0, state: ServerState = ServerState.ONLINE, *, head: bool = False
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
    )


def hops(view: SwarmView, **round_trips: float) -> list[str]:
    return [
        f"{hop.server.peer} {hop.span}" for hop in choose_route(view, Span(0, view.num_blocks), round_trips=round_trips)
    ]


def test_a_route_covers_every_block_once_and_in_order():
    view = SwarmView(8, (server("a", "0:4"), server("b", "4:8")))
    assert hops(view) == ["a 0:4", "b 4:8"]


def test_one_server_is_preferred_to_two_of_the_same_speed():
    whole, halves = server("whole", "0:8", 5), (server("a", "0:4", 10), server("b", "4:8", 10))
    assert hops(SwarmView(8, (*halves, whole))) == ["whole 0:8"]


def test_a_fast_server_is_worth_the_detour_and_a_far_one_is_not():
    view = SwarmView(4, (server("slow", "0:4", 0.5), server("fast", "2:4", 100)))
    assert hops(view, slow=0.001, fast=0.001) == ["slow 0:2", "fast 2:4"]
    assert hops(view, slow=0.001, fast=9.0) == ["slow 0:4"]


def test_a_server_without_room_is_left_to_others_but_used_if_there_are_none():
    full, slow = replace(server("full", "0:4", 100), cache_tokens_left=0), server("slow", "0:4", 1)
    assert hops(SwarmView(4, (full, slow))) == ["slow 0:4"]
    assert hops(SwarmView(4, (full,))) == ["full 0:4"]


def test_blocks_that_nobody_holds_are_named():
    view = SwarmView(8, (server("a", "0:2"), server("b", "5:7")))
    with pytest.raises(MissingBlocks, match="no server holds blocks 2:5, 7:8") as error:
        hops(view)
    assert error.value.blocks == (2, 3, 4, 7)


def test_a_route_to_a_head_ends_there_and_runs_as_it_likes_before():
    whole, middle, last = server("whole", "0:4", 99), server("middle", "1:3"), server("last", "2:4", 1, head=True)
    view = SwarmView(4, (whole, middle, last, server("inside", "0:3", 999, head=True)))

    def ends(span: str, *, head: bool) -> list[str]:
        return [hop.server.peer for hop in choose_route(view, Span.parse(span), round_trips={}, head=head)]

    assert ends("0:4", head=False) == ["whole"]
    assert ends("0:4", head=True) in (["whole", "last"], ["inside", "last"])
    assert ends("3:4", head=True) == ["last"]


@st.composite
def swarms(draw: st.DrawFn) -> SwarmView:
    num_blocks = draw(st.integers(1, 5))
    servers = [server("whole", f"0:{num_blocks}", draw(st.floats(0.1, 50)))]
    for index in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, num_blocks - 1))
        end = draw(st.integers(start + 1, num_blocks))
        servers.append(server(f"s{index}", f"{start}:{end}", draw(st.floats(0.1, 50))))
    return SwarmView(num_blocks, tuple(servers))


def seconds(route: Sequence[ServerInfo]) -> float:
    """What a route costs when `route[i]` runs block i, written as plainly as possible."""
    total = 0.0
    for block, chosen in enumerate(route):
        if block == 0 or route[block - 1].peer != chosen.peer:
            total += UNKNOWN_ROUND_TRIP + HOP_OVERHEAD
        total += 1 / (chosen.decode_speed * len(chosen.span))
    return total


@given(swarms())
def test_no_other_assignment_of_blocks_is_faster(view: SwarmView):
    route = choose_route(view, Span(0, view.num_blocks), round_trips={})
    assert [block for hop in route for block in hop.span] == list(range(view.num_blocks))
    assert all(hop.span in hop.server.span for hop in route)
    found = seconds([hop.server for hop in route for _ in hop.span])

    def every(block: int) -> list[list[ServerInfo]]:
        if block == view.num_blocks:
            return [[]]
        return [[s, *rest] for s in view.servers if block in s.span for rest in every(block + 1)]

    assert found <= min(seconds(route) for route in every(0)) + 1e-9


def test_a_new_server_goes_where_the_swarm_is_weakest():
    assert choose_span([5, 5, 0, 0, 5, 5], num_blocks=2) == Span(2, 4)
    assert choose_span([0, 0, 0], num_blocks=3) == Span(0, 3)
    assert choose_span([1, 2, 3, 0.5], num_blocks=2) == Span(2, 4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_the_chosen_window_is_the_smallest_when_sorted(throughput: list[int], data: st.DataObject):
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


def test_blocks_are_named_as_spans():
    assert format_blocks([7, 0, 2, 1]) == "0:3, 7:8"
