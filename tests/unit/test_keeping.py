"""Which servers keep the embeddings and the head for others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.keeping import KEEPERS, keeps_head


@given(st.text(max_size=60), st.integers(0, KEEPERS))
def test_all_servers_of_a_small_swarm_keep_them(peer: str, num_servers: int):
    assert keeps_head(peer, num_servers)


@pytest.mark.parametrize("num_servers", [20, 400, 4000])
def test_about_four_of_a_large_one_do(num_servers: int):
    kept = sum(keeps_head(f"peer {number}", num_servers) for number in range(num_servers))
    assert 1 <= kept <= 3 * KEEPERS


@given(st.text(max_size=60), st.integers(1, 1000), st.integers(1, 1000))
def test_a_server_that_keeps_them_in_a_swarm_keeps_them_in_a_smaller_one(peer: str, one: int, other: int):
    fewer, more = sorted((one, other))
    assert keeps_head(peer, fewer) or not keeps_head(peer, more)
