"""A swarm and a route as text, as `shoal status` shows them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from shoal.cli.terminal.render import MAX_REASONS, render, render_route
from shoal.net.ping import PingAnswer
from shoal.peers import ModelInfo, ServerInfo, ServerState, short
from shoal.policy.routing.route import Measured, Needs, Route, choose_route
from shoal.policy.view import SwarmView
from shoal.protocol import PROTOCOL_VERSION
from shoal.spans import Span

MODEL = ModelInfo(key="llama-8x64-1a2b3c4d", name="org/tiny", family="llama", num_blocks=8)


def server(name: str, span: str, state: ServerState = ServerState.ONLINE) -> ServerInfo:
    return ServerInfo(
        peer=f"12D3KooW{name * 20}",
        span=Span.parse(span),
        state=state,
        fingerprint="f" * 32,
        decode_speed=1234.5,
        prefill_speed=98765.4,
        cache_tokens_left=1 << 20,
        dtype="bfloat16",
        quantization="none",
        version="0.1.0",
        name=name,
    )


def shown(
    *servers: ServerInfo,
    model: ModelInfo = MODEL,
    width: int = 80,
    now: float = 0.0,
    answers: Mapping[str, PingAnswer | None] | None = None,
) -> str:
    out = Console(file=io.StringIO(), width=width)
    for part in render(model, SwarmView(model.num_blocks, servers), answers or {}, width=width, now=now):
        out.print(part)
    return out.file.getvalue()


def test_missing_blocks_are_named():
    text = shown(server("a", "0:4"), server("b", "2:4"))
    assert "missing: blocks 4:8" in text
    assert "1122····" in text
    assert "████····" in text


def test_blocks_that_are_still_loading_are_missing():
    assert "missing: blocks 4:8 (4:6 loading)" in shown(server("a", "0:4"), server("b", "4:6", ServerState.JOINING))


def test_a_server_that_leaves_is_not_counted():
    text = shown(server("a", "0:8"), server("b", "0:8", ServerState.LEAVING))
    assert "11111111" in text
    assert "complete" in text


def test_a_server_of_another_protocol_is_named_and_not_counted():
    next_version = PROTOCOL_VERSION + 1
    text = " ".join(shown(server("a", "0:8"), replace(server("b", "4:8"), protocol=next_version)).split())
    assert f"b speaks protocol {next_version} of shoal, and this machine speaks {PROTOCOL_VERSION}" in text
    assert "complete: every block is served" in text
    text = shown(server("a", "0:4"), replace(server("b", "4:8"), protocol=next_version))
    assert "missing" in text
    assert "4:8" in text
    assert "complete" not in text


def test_a_server_that_does_not_answer_counts_for_no_block():
    mute, other = server("a", "0:4"), server("b", "4:8")
    text = shown(mute, other, answers={mute.peer: None, other.peer: PingAnswer(0.01)})
    assert "missing: blocks 0:4" in text
    assert "silent" in text
    assert "do not answer this machine: a" in text
    assert "····1111" in text


def test_a_server_that_was_not_asked_counts_as_one_that_answers():
    assert "complete" in shown(server("a", "0:8"), answers={})


def test_a_server_that_others_cannot_reach_counts_for_no_block_and_its_operator_learns_what_to_do():
    text = shown(server("a", "0:4", ServerState.UNREACHABLE), server("b", "4:8"))
    assert "missing: blocks 0:4" in text
    assert "cannot be reached by others: a; `shoal doctor` there says what to do" in text


def test_a_server_that_answers_through_a_relay_is_marked():
    relayed = server("a", "0:8")
    assert "online, relayed" in shown(relayed, answers={relayed.peer: PingAnswer(0.1, is_relayed=True)})


def test_how_servers_attend_is_shown_with_the_reason_where_it_is_not_the_only_way():
    said = "sdpa; not varlen: off by 3 %"
    servers = [replace(server(name, "0:8"), attention=said) for name in "ab"]
    assert f"attention of a, b: {said}" in shown(*servers, replace(server("c", "0:8"), attention="sdpa"))
    assert "attention" not in shown(replace(server("c", "0:8"), attention="sdpa"))


def test_a_model_without_servers_is_shown_as_such():
    assert "no server serves it" in shown()


def test_values_that_all_servers_have_in_common_are_printed_once():
    same = shown(server("a", "0:4"), server("b", "4:8"))
    assert same.count("bfloat16") == 1
    differing = shown(server("a", "0:4"), replace(server("b", "4:8"), dtype="float32", quantization="nf4"))
    assert "float32, nf4" in differing
    assert differing.count("bfloat16") == 2  # in the column, and in the line that names the servers that differ


def test_servers_that_compute_in_different_dtypes_are_named_in_one_line():
    line = "servers with equal weights use different dtypes: bfloat16: a; float32: b"
    assert line in shown(server("a", "0:4"), replace(server("b", "4:8"), dtype="float32")).splitlines()
    assert "different dtypes" not in shown(server("a", "0:4"), server("b", "4:8"))
    other_weights = replace(server("b", "4:8"), dtype="float32", fingerprint="0" * 32)
    assert "different dtypes" not in shown(server("a", "0:4"), other_weights)


def test_queues_and_heads_are_shown_where_there_are_any():
    assert "queue" not in shown(server("a", "0:8"))
    text = shown(server("a", "0:4"), replace(server("b", "4:8"), queue_length=17, head=True))
    assert text.splitlines()[2].split()[-2:] == ["queue", "head"]
    assert text.splitlines()[4].split()[-2:] == ["17", "yes"]
    assert max(len(line) for line in text.splitlines()) <= 80


def busy(name: str, span: str, **changes: Any) -> ServerInfo:
    """A server with something in every column."""
    other = {"dtype": "float32", "quantization": "nf4", "version": "0.2.0", "fingerprint": "e" * 32}
    more = {"queue_length": 12345, "head": True, "training": False, "adapters": ("one", "two")}
    return replace(server(name, span), **other | more | changes)


NARROW, USUAL, WIDE = 60, 80, 160


@pytest.mark.parametrize("width", [NARROW, USUAL, 100, 140, WIDE])
def test_server_peer_blocks_and_state_are_complete_at_every_width(width):
    model = replace(MODEL, num_blocks=126)
    name = "a-long-name-1234"
    text = shown(server(name, "0:126"), busy("b", "120:126", state=ServerState.JOINING), model=model, width=width)
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    header, first, second = (
        next(line.split() for line in lines if word in line) for word in ("peer", "0:126", "120:126")
    )
    assert header[:3] == ["server", "peer", "blocks"]
    assert first[1:3] == ["e-1234", "0:126"]
    assert second[:3] == ["b", "bbbbbb", "120:126"]
    assert "online" in first
    assert "joining" in second


def test_columns_that_do_not_fit_are_left_out_and_named():
    servers = server("a-long-name-1234", "0:4"), busy("b", "4:8")
    wide = shown(*servers, width=WIDE)
    assert "hidden" not in wide
    assert all(title in wide for title in ("tokens/s", "prefill", "cache", "queue", "head", "training", "adapters"))
    assert all(title in wide for title in ("dtype", "weights", "version"))
    narrow = shown(*servers, width=NARROW)
    header = next(line for line in narrow.splitlines() if line.startswith("server "))
    note = narrow.partition("hidden in this width")[2]
    assert all((title in header) != (title in note) for title in ("tokens/s", "prefill", "cache", "queue", "version"))
    assert "dtype" in header  # kept to the last, because a mixture of dtypes matters most
    assert "--json" in narrow


def test_a_speed_that_was_not_measured_is_not_shown():
    joining = replace(
        server("b", "4:8", ServerState.JOINING), decode_speed=None, prefill_speed=None, cache_tokens_left=0
    )
    line = next(line for line in shown(server("a", "0:4"), joining).splitlines() if "joining" in line)
    assert line.split() == ["b", "bbbbbb", "4:8", "····████", "joining", "…", "…", "…"]


def test_a_speed_below_one_is_shown_with_its_digits():
    slow = replace(server("a", "0:8"), decode_speed=0.333, prefill_speed=4.56)
    line = next(line for line in shown(slow).splitlines() if "online" in line)
    assert line.split()[-3:] == ["0.333", "4.56", "1.0M"]


def test_markup_in_a_name_is_shown_literally():
    text = shown(server("[/red]", "0:4"), server("[bold]b", "4:8"))
    assert "[/red]" in text
    assert "[bold]b" in text
    view = SwarmView(8, (server("[/red]", "0:8"),))
    assert shown_route(choose_route(view, Span(0, 8), needs=Needs(), known=Measured({})))[2].startswith("[/red]")


def shown_route(route: Route | None, answers: Mapping[str, PingAnswer | None] | None = None) -> list[str]:
    out = Console(file=io.StringIO(), width=80)
    for part in render_route(route, answers or {}):
        out.print(part)
    return out.file.getvalue().splitlines()


def test_a_route_is_shown_hop_by_hop_with_its_costs():
    view = SwarmView(8, (replace(server("a", "0:4"), decode_speed=100.0), server("b", "4:8")))
    known = Measured({each.peer: 0.02 for each in view.servers})
    answers = {server("b", "4:8").peer: PingAnswer(0.02, is_relayed=True)}
    lines = shown_route(choose_route(view, Span(0, 8), needs=Needs(), known=known), answers)
    assert lines[0].startswith("from this machine, a token is expected to take 54.8 ms (18.2 tokens/s)")
    assert [line.split() for line in lines[2:]] == [
        ["a", "aaaaaa", "direct", "0:4", "12.0", "10.0"],
        ["b", "bbbbbb", "relay", "4:8", "22.0", "0.8"],
        ["return", "trip", "10.0"],
    ]
    assert max(len(line) for line in lines) <= 80


def test_what_this_machine_carries_between_two_servers_is_marked():
    apart = replace(server("a", "0:4"), unreached=(short(server("b", "4:8").peer),))
    view = SwarmView(8, (apart, server("b", "4:8")))
    lines = shown_route(choose_route(view, Span(0, 8), needs=Needs(), known=Measured({})))
    assert [line.split()[2:4] for line in lines[-4:-2]] == [["direct", "0:4"], ["carried", "4:8"]]
    assert lines[-1] == "this machine carries what goes from a to b: they do not reach each other"
    assert "a does not reach b: clients carry what goes there" in shown(*view.servers)
    assert "does not reach" not in shown(*reversed(view.servers[1:]), server("a", "0:4"))


def test_a_missing_route_is_said_to_be_missing():
    assert shown_route(None)[0].startswith("no route from this machine")


@pytest.mark.parametrize("num_blocks", [1, 8, 80, 126])
def test_the_output_fits_into_eighty_columns(num_blocks):
    model = replace(MODEL, num_blocks=num_blocks)
    text = shown(server("a" * 40, f"0:{num_blocks}"), server("b", f"{num_blocks - 1}:{num_blocks}"), model=model)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "online" in text
    assert f"0:{num_blocks}" in text
    assert "complete" in text


def test_status_says_why_servers_took_their_blocks_and_when_those_that_load_will_be_ready():
    moved = replace(server("a", "0:4"), reason="blocks 0:4 had no server")
    loading = replace(server("b", "4:8", ServerState.JOINING), ready_at=130.0, reason="blocks 4:8 carried 3 tokens/s")
    given = replace(server("c", "0:8"), reason="its operator chose them", pinned=True)
    lines = shown(moved, loading, given, now=100.0).splitlines()
    assert lines[-2:] == [
        "b loads 4:8, ready in 30 s: blocks 4:8 carried 3 tokens/s",
        "a serves 0:4: blocks 0:4 had no server",
    ]
    assert not any("its operator" in line for line in lines)


@pytest.mark.parametrize(("seconds", "when"), [(-5.0, "at any moment"), (90.0, "in 90 s"), (600.0, "in 10 min")])
def test_a_server_that_loads_given_blocks_says_when_it_will_be_ready(seconds: float, when: str):
    loading = replace(server("b", "4:8", ServerState.JOINING), ready_at=1000.0 + seconds, pinned=True)
    assert shown(loading, now=1000.0).splitlines()[-1] == f"b loads 4:8, ready {when}"


def test_status_says_which_other_blocks_a_server_wants_or_loads_beside_its_own():
    wants = replace(server("a", "0:4"), wants=Span(0, 6), reason="blocks 4:6 carried 3 tokens/s")
    assert shown(wants, now=100.0).splitlines()[-1] == "a serves 0:4, wants 0:6: blocks 4:6 carried 3 tokens/s"
    line = shown(replace(wants, ready_at=120.0), now=100.0).splitlines()[-1]
    assert line == "a serves 0:4, loads 0:6, ready in 20 s: blocks 4:6 carried 3 tokens/s"


def test_of_many_reasons_some_are_shown():
    servers = [replace(server(f"s{index:02}", "0:8"), reason="blocks 0:8 had no server") for index in range(30)]
    lines = shown(*servers).splitlines()
    assert sum("had no server" in line for line in lines) == MAX_REASONS
    assert lines[-1] == f"and {30 - MAX_REASONS} more (see --json)"
