"""Which server somebody means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.client.options.client_options import ClientOptions
from shoal.client.options.peer_names import all_are_whole, find_peer, with_whole_ids
from shoal.errors import UserError
from shoal.net.identity import Identity
from shoal.peers import ServerInfo, ServerState
from shoal.spans import Span

A, B, C, ABSENT = (Identity.temporary().peer for _ in range(4))


def server(peer: str, name: str = "", span: str = "0:4") -> ServerInfo:
    return ServerInfo(
        peer=peer,
        span=Span.parse(span),
        state=ServerState.ONLINE,
        fingerprint="f" * 32,
        decode_speed=1.0,
        prefill_speed=1.0,
        cache_tokens_left=1,
        dtype="float32",
        quantization="none",
        version="0.1.0",
        name=name,
    )


SERVERS = (server(A, "mia"), server(B, "hugo", "4:8"), server(C))


@pytest.mark.parametrize(
    "text",
    ["mia", A[-6:], A[-12:], A[:20], A],
    ids=["its name", "six characters", "twelve", "its beginning", "its whole id"],
)
def test_a_server_is_found_by_its_name_by_either_end_of_its_id_and_by_the_whole_id(text):
    assert find_peer(text, SERVERS) == A


def test_a_whole_id_is_one_of_a_server_that_may_come_later():
    assert find_peer(ABSENT, SERVERS) == ABSENT


def test_an_unknown_name_is_an_error_that_lists_the_servers():
    with pytest.raises(UserError, match="no server is called 'lily'") as error:
        find_peer("lily", SERVERS)
    assert error.value.hint is not None
    assert f"mia {A[-6:]} (blocks 0:4)" in error.value.hint
    assert f"hugo {B[-6:]} (blocks 4:8)" in error.value.hint
    assert f"{C[-6:]} (blocks 0:4)" in error.value.hint


def test_a_name_of_two_servers_is_an_error_that_lists_both():
    twice = (server(A, "mia"), server(B, "mia", "4:8"), server(C, "hugo"))
    with pytest.raises(UserError, match="'mia' may be one of 2 servers") as error:
        find_peer("mia", twice)
    assert f"mia {A[-6:]} (blocks 0:4), mia {B[-6:]} (blocks 4:8)" in str(error.value)
    assert "hugo" not in str(error.value)


def test_a_server_that_calls_itself_by_the_id_of_another_is_not_taken_for_it():
    with pytest.raises(UserError, match="may be one of 2 servers"):
        find_peer(A[-6:], (server(A), server(B, A[-6:])))
    assert find_peer(A, (server(A), server(B, A))) == A
    assert find_peer(A, (server(B, A),)) == A


def test_a_few_characters_that_happen_to_fit_are_no_id():
    for text in (A[-3:], A[:8], "", "12D3KooW"):
        with pytest.raises(UserError, match="no server is called"):
            find_peer(text, (server(A, "mia"),))


def test_who_has_left_is_not_meant():
    left = replace(server(A, "mia"), state=ServerState.LEAVING)
    assert find_peer("mia", (left, server(B, "mia"))) == B


def test_many_servers_are_listed_in_part():
    many = [server(Identity.temporary().peer, f"s{number}") for number in range(30)]
    with pytest.raises(UserError) as error:
        find_peer("mia", many)
    assert str(error.value.hint).endswith("and 22 more")


def test_pinned_allowed_and_blocked_servers_are_all_found():
    config = ClientOptions(
        allowed_servers=frozenset({"mia", B, C[-6:]}),
        blocked_servers=frozenset({"hugo"}),
        pinned=((Span(0, 2), "mia"), (Span(2, 4), ABSENT)),
    )
    assert not all_are_whole(config)
    found = with_whole_ids(config, SERVERS)
    assert found.allowed_servers == {A, B, C}
    assert found.blocked_servers == {B}
    assert found.pinned == ((Span(0, 2), A), (Span(2, 4), ABSENT))
    assert all_are_whole(found)


def test_options_that_name_no_server_stay_as_they_are():
    assert all_are_whole(ClientOptions())
    assert with_whole_ids(ClientOptions(), SERVERS) == ClientOptions()
    assert with_whole_ids(ClientOptions(allowed_servers=frozenset()), SERVERS).allowed_servers == frozenset()
