"""Which dtype a swarm computes in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.peers import ServerInfo, ServerState
from shoal.policy.dtypes import mixture, swarm_dtype
from shoal.policy.view import SwarmView
from shoal.spans import Span

ONE = ServerInfo(
    peer="12D3KooWone",
    span=Span(0, 4),
    state=ServerState.ONLINE,
    fingerprint="f" * 32,
    decode_speed=1.0,
    prefill_speed=1.0,
    cache_tokens_left=0,
    dtype="bfloat16",
    quantization="none",
    version="0.1.0",
)


def server(name: str, span: str, dtype: str, **others: object) -> ServerInfo:
    return replace(ONE, peer=f"12D3KooWpeer-{name}", name=name, span=Span.parse(span), dtype=dtype, **others)


def dtype(*servers: ServerInfo, own: str = "bfloat16", pinned: tuple[tuple[Span, str], ...] = ()) -> str | None:
    return swarm_dtype(SwarmView(8, servers, pinned), fingerprint=ONE.fingerprint, own=own)


def test_a_swarm_without_servers_has_no_dtype():
    assert dtype(own="bfloat16") is None


def test_the_swarm_computes_in_what_its_servers_announce():
    assert dtype(server("a", "0:4", "float32"), server("b", "4:8", "float32")) == "float32"


def test_where_servers_differ_the_dtype_of_most_blocks_is_the_swarms():
    small = [server(name, "0:1", "float16") for name in "abc"]
    assert dtype(*small, server("d", "0:4", "float32")) == "float32"
    assert dtype(*small, server("d", "0:2", "float32")) == "float16"


@pytest.mark.parametrize(
    ("own", "expected"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")]
)
def test_among_equals_the_models_own_wins_or_else_the_more_precise(own, expected):
    assert dtype(server("a", "0:4", "float16"), server("b", "4:8", "bfloat16"), own=own) == expected


def test_servers_that_join_and_quantized_ones_count():
    assert dtype(server("a", "0:4", "float32", state=ServerState.JOINING)) == "float32"
    assert dtype(server("a", "0:4", "float16", quantization="nf4")) == "float16"


def test_servers_that_leave_have_other_weights_or_make_up_a_dtype_do_not_count():
    assert dtype(server("a", "0:8", "float32", state=ServerState.LEAVING)) is None
    assert dtype(server("a", "0:8", "float32", fingerprint="0" * 32)) is None
    assert dtype(server("a", "0:8", "complex128"), server("b", "0:1", "float32")) == "float32"


def test_of_pinned_blocks_their_peer_alone_counts():
    servers = server("a", "0:8", "float32"), server("b", "0:8", "float16"), server("c", "0:8", "float16")
    assert dtype(*servers) == "float16"
    assert dtype(*servers, pinned=((Span(0, 8), servers[0].peer),)) == "float32"


def test_a_mixture_says_in_one_line_which_servers_compute_in_what():
    servers = server("b", "0:4", "bfloat16"), server("a", "0:4", "bfloat16"), server("c", "4:8", "float32")
    assert mixture(servers) == "bfloat16: a, b; float32: c"
    assert mixture([replace(servers[0], name=""), servers[2]]) == "bfloat16: peer-b; float32: c"


def test_quantized_weights_make_a_mixture_too():
    assert mixture([server("a", "0:8", "bfloat16"), server("b", "0:8", "bfloat16", quantization="nf4")]) == (
        "bfloat16: a; bfloat16, nf4: b"
    )


def test_servers_that_agree_leave_or_have_other_weights_are_no_mixture():
    one = server("a", "0:8", "bfloat16")
    assert mixture([]) is None
    assert mixture([one, server("b", "0:8", "bfloat16")]) is None
    assert mixture([one, server("b", "0:8", "float32", state=ServerState.LEAVING)]) is None
    assert mixture([one, server("b", "0:8", "float32", fingerprint="0" * 32)]) is None


def test_of_many_servers_in_a_mixture_only_some_are_named():
    many = [server(f"s{number}", "0:8", "bfloat16") for number in range(9)]
    assert mixture([*many, server("x", "0:8", "float32")]) == "bfloat16: s0, s1, s2, s3 and 5 more; float32: x"
