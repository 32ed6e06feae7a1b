"""Invite codes come back as they were, also when people read them out; mistakes are found; models are no codes."""

from __future__ import annotations

import hashlib
import ipaddress
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.joining.invite_code import ALPHABET, MAX_WAYS, InviteCode, Way, in_turn, is_code, ways_of
from shoal.net.swarm_key import KEY_BYTES, SwarmKey

digests = st.binary(min_size=8, max_size=8).map(bytes.hex)
hosts = st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str)
ways = st.builds(Way, hosts, st.integers(1, 65535))
keys = st.none() | st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES).map(SwarmKey)
codes = st.builds(InviteCode, digests, st.lists(ways, min_size=1, max_size=MAX_WAYS).map(tuple), keys)

ONE_WAY = InviteCode("00c0ffee00c0ffee", (Way("203.0.113.5", 31337),))


def some_codes() -> list[InviteCode]:
    """Codes of one, two and three ways with either kind of addresses, a third with keys, the same ones each time."""
    made = []
    for index in range(12):
        seed = hashlib.sha256(bytes([index])).digest()
        here = Way(str(ipaddress.IPv4Address(seed[8:12])), 1024 + seed[12])
        there = Way(str(ipaddress.IPv6Address(seed[16:32])), 31337)
        taken = [(here,), (there,), (here, there), (here, there, here)][index % 4]
        made.append(InviteCode(seed[:8].hex(), taken, SwarmKey(seed[16:]) if index % 3 == 0 else None))
    return made


def plain(code: InviteCode) -> str:
    return str(code).replace("-", "")


def share_found(mistakes: Iterator[str]) -> float:
    found = count = 0
    for text in mistakes:
        count += 1
        try:
            InviteCode.parse(text)
        except UserError:
            found += 1
    assert count > 300
    return found / count


@given(codes)
def test_a_code_comes_back_with_any_digest_and_any_ways(code: InviteCode) -> None:
    assert InviteCode.parse(str(code)) == code
    assert is_code(str(code))


@pytest.mark.parametrize("digest", ["00" * 8, "ff" * 8, "00" * 7 + "01"])
@pytest.mark.parametrize("host", ["0.0.0.0", "255.255.255.255", "::", "::1", "ffff:" * 7 + "ffff"])
def test_zeros_at_the_ends_are_kept(digest: str, host: str) -> None:
    for count in range(1, MAX_WAYS + 1):
        code = InviteCode(digest, tuple(Way(host, port) for port in range(1, count + 1)))
        assert InviteCode.parse(str(code)) == code


def test_a_code_of_one_way_is_short_and_in_groups_of_four() -> None:
    groups = str(ONE_WAY).split("-")
    assert [len(group) for group in groups] == [4] * 7
    assert set("".join(groups)) <= set(ALPHABET)
    assert not set("ILOU") & set(ALPHABET)
    assert len(str(replace(ONE_WAY, swarm_key=SwarmKey(bytes(KEY_BYTES)))).split("-")) == 14


@given(codes, st.randoms(use_true_random=False))
def test_a_code_is_read_as_people_write_it(code: InviteCode, rng: random.Random) -> None:
    look_alikes = {"0": "0Oo", "1": "1IiLl"}
    written = "".join(
        rng.choice(look_alikes.get(character, character + character.lower())) for character in plain(code)
    )
    spaced = "".join(character + rng.choice(["", "", "-", " ", "_"]) for character in written)
    for text in (str(code).lower(), plain(code), written, spaced, f"  {written}\n"):
        assert InviteCode.parse(text) == code
        assert is_code(text)


def test_nearly_all_mistakes_in_one_character_are_found() -> None:
    def mistakes() -> Iterator[str]:
        for code in some_codes():
            text = plain(code)
            for at, right in enumerate(text):
                for wrong in ALPHABET:
                    if wrong != right:
                        yield text[:at] + wrong + text[at + 1 :]

    assert share_found(mistakes()) >= 0.995


def test_nearly_all_swaps_of_neighbors_are_found() -> None:
    def mistakes() -> Iterator[str]:
        for code in some_codes():
            text = plain(code)
            for at in range(len(text) - 1):
                if text[at] != text[at + 1]:
                    yield text[:at] + text[at + 1] + text[at] + text[at + 2 :]

    assert share_found(mistakes()) >= 0.995


def test_nearly_all_characters_that_were_left_out_or_heard_twice_are_found() -> None:
    def mistakes() -> Iterator[str]:
        for code in some_codes():
            text = plain(code)
            for at in range(len(text)):
                yield text[:at] + text[at + 1 :]
                yield text[:at] + text[at] + text[at:]

    assert share_found(mistakes()) >= 0.995


@pytest.mark.parametrize("code", some_codes())
def test_a_code_that_was_cut_is_refused_with_a_hint(code: InviteCode) -> None:
    text = str(code)
    for end in range(len(text)):
        with pytest.raises(UserError, match=r"not an invite code|a mistake in it, or a part is missing") as caught:
            InviteCode.parse(text[:end])
        assert "ask for the code again" in str(caught.value.hint)
    for start in range(5, len(text), 5):  # whole groups are missing
        with pytest.raises(UserError):
            InviteCode.parse(text[start:])
    with pytest.raises(UserError):
        InviteCode.parse(text + text)


def test_a_mistake_in_a_code_is_told_as_one_and_not_as_a_model_that_there_is_not() -> None:
    text = str(ONE_WAY)
    mistake = text[:-1] + ("2" if text[-1] != "2" else "3")
    assert is_code(mistake)
    assert is_code(mistake.lower())
    with pytest.raises(UserError, match="has a mistake in it"):
        InviteCode.parse(mistake)


@pytest.mark.parametrize(
    "text", ["", " ", "-", "--", "0", "00", "000", "UUUU-UUUU", "ÄÖÜ", "1G4X/9QRT", "\0", "🐟" * 30]
)
def test_what_is_no_code_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UserError) as caught:
        InviteCode.parse(text)
    assert "ask for the code again" in str(caught.value.hint)
    assert not is_code(text)


def test_the_error_repeats_a_long_text_in_part_only() -> None:
    with pytest.raises(UserError) as caught:
        InviteCode.parse("no code\x1b[31m " * 1000)
    assert len(str(caught.value)) < 200
    assert "\x1b" not in str(caught.value)


@given(st.text() | st.text(alphabet=ALPHABET + "-", max_size=60))
def test_any_text_is_a_code_or_refused(text: str) -> None:
    try:
        code = InviteCode.parse(text)
    except UserError:
        is_code(text)
    else:
        assert InviteCode.parse(str(code)) == code
        assert is_code(text)


@pytest.mark.parametrize(
    "model",
    [
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.1-405B-Instruct",
        "gpt2",
        "bert-base-multilingual-cased",
        "bigscience/bloom-560m",
        "google/gemma-3-4b-it",
        "Qwen/Qwen3-0.6B",
        "stories",
        ".",
        "..",
        "/models/llama",
        "models/tiny",
        "~/llama",
        "C:\\models\\llama",
        "tiny-4x32",
        "long-name-with-many-short-parts-of-four",
        "1234",
        "a" * 64,
        "deadbeefdeadbeefdeadbeefdeadbeef",
        "2026-11-29",
        "550e8400-e29b-41d4-a716-446655440000",
    ],
)
def test_a_model_or_a_folder_is_no_code(model: str) -> None:
    assert not is_code(model)


def test_nearly_no_name_in_the_letters_of_codes_is_a_code() -> None:
    names = (hashlib.sha256(b"%d" % index).hexdigest()[: 1 + index % 40] for index in range(5000))
    assert not any(map(is_code, names))


def test_addresses_are_those_of_the_ways() -> None:
    code = InviteCode("00" * 8, (Way("203.0.113.5", 31337), Way("2001:db8::5", 80)))
    assert code.addresses == ("/ip4/203.0.113.5/tcp/31337", "/ip6/2001:db8::5/tcp/80")


@given(st.lists(ways, min_size=1, max_size=MAX_WAYS))
def test_the_ways_of_a_codes_addresses_are_its_ways_but_for_those_of_one_machine(made: list[Way]) -> None:
    found = ways_of([way.address + "/p2p/12D3KooW" for way in made])
    assert found
    assert set(found) <= set(made)
    assert list(found) == [way for way in dict.fromkeys(made) if way in found]


PUBLIC, HOME, PUBLIC6 = "/ip4/203.0.113.5/tcp/31337", "/ip4/192.168.1.7/tcp/31337", "/ip6/2001:db8::5/tcp/31337"


@pytest.mark.parametrize(
    "local",
    [
        "/ip4/127.0.0.1/tcp/31337",
        "/ip4/127.1.2.3/tcp/31337",
        "/ip6/::1/tcp/31337",
        "/ip4/169.254.3.4/tcp/31337",
        "/ip6/fe80::5/tcp/31337",
        "/ip4/172.17.0.1/tcp/31337",
        "/ip4/172.17.255.9/tcp/31337",
    ],
)
def test_an_address_that_only_its_own_machine_can_use_is_left_out_if_there_are_others(local: str) -> None:
    assert [way.address for way in ways_of([local, PUBLIC, local, HOME])] == [PUBLIC, HOME]
    assert [way.address for way in ways_of([local])] == [local]


def test_each_host_and_port_is_a_way_once_and_in_order() -> None:
    addresses = [
        f"{PUBLIC6}/p2p/A",
        f"{HOME}/p2p/A",
        f"{PUBLIC6}/p2p/B",
        "/ip6/2001:DB8:0::5/tcp/31337",
        f"{PUBLIC}/p2p/A",
    ]
    assert [way.address for way in ways_of(addresses)] == [HOME, PUBLIC]
    assert [way.address for way in ways_of(addresses, most=1)] == [HOME]
    assert [way.address for way in ways_of(addresses[:1] + addresses[2:4])] == [PUBLIC6]


def test_the_way_to_a_relayed_member_is_that_to_its_relay() -> None:
    assert [way.address for way in ways_of([f"{PUBLIC}/p2p/A/p2p-circuit/p2p/B", f"{HOME}/p2p/B"])] == [PUBLIC, HOME]


def test_a_code_leads_to_several_members_before_it_leads_to_one_of_them_twice() -> None:
    assert in_turn(["a1", "a2", "a3"], [], ["b1"], ["c1", "c2"]) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert in_turn() == []


def test_there_are_no_more_ways_than_a_code_has_room_for() -> None:
    found = ways_of([f"/ip4/203.0.113.{host}/tcp/31337" for host in range(1, 30)])
    assert len(found) == MAX_WAYS
    assert InviteCode.parse(str(InviteCode("00" * 8, found))).ways == found


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/203.0.113.6/udp/31337/quic-v1",
        "/dns4/example.org/tcp/31337",
        "/ip4/203.0.113.6",
        "/ip4/203.0.113.6/tcp",
        "/ip4/203.0.113.6/tcp/",
        "/ip4/203.0.113.6/tcp/port",
        "/ip4/203.0.113.6/tcp/0",
        "/ip4/203.0.113.6/tcp/-1",
        "/ip4/203.0.113.6/tcp/65536",
        "/ip4/203.0.113.666/tcp/80",
        "/ip4/example.org/tcp/80",
        "/ip4/2001:db8::6/tcp/80",
        "/ip6/203.0.113.6/tcp/80",
        "/ip6/fe80::6%eth0/tcp/80",
        "/ip6zone/eth0/ip6/fe80::6/tcp/80",
        "/ip4//tcp/80",
        "",
        "/",
        "/////",
        "203.0.113.6:80",
    ],
)
def test_an_address_that_a_code_cannot_say_is_no_way(address: str) -> None:
    assert ways_of([address]) == ()
    assert [way.address for way in ways_of([address, PUBLIC])] == [PUBLIC]


def errors_of(data: bytes) -> set[str]:
    """What is said of these bytes as a code, with any two last characters: some of them fit."""
    number, body = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 32)
        body = ALPHABET[digit] + body
    errors = set()
    for first in ALPHABET:
        for second in ALPHABET:
            try:
                InviteCode.parse(body + first + second)
            except UserError as error:
                errors.add(str(error))
            else:
                errors.add("")
    return errors


MISTAKE = "this invite code has a mistake in it, or a part is missing"
DIGEST, WAY = b"digest 8", b"\xcb\x00\x71\x05\x7a\x69"


def test_a_code_of_another_version_is_told_as_one() -> None:
    assert errors_of(bytes([1, 0x11, 0]) + DIGEST + WAY) == {MISTAKE, ""}
    assert errors_of(bytes([1, 0x31, 0]) + DIGEST + WAY) == {MISTAKE, "this invite code is of another version of shoal"}


@pytest.mark.parametrize(
    "data",
    [
        bytes([2, 0x11, 0]) + DIGEST + WAY,
        bytes([1, 0x11, 2]) + DIGEST + WAY,
        bytes([1, 0x21, 0]) + DIGEST + WAY,  # of a closed swarm, without its key
        bytes([1, 0x11, 1]) + DIGEST + WAY,
        bytes([1, 0x10, 0]) + DIGEST,
        bytes([1, 0x10, 0]) + DIGEST + WAY,
        bytes([1, 0x18, 0]) + DIGEST + WAY * 8,
        bytes([1, 0x11, 0]) + DIGEST + WAY + b"\0",
        bytes([1, 0x11, 0]) + DIGEST + WAY[:-1],
        bytes([1, 0x12, 0]) + DIGEST + WAY,
        bytes([1, 0x11]),
        b"\1",
    ],
    ids=bytes.hex,
)
def test_a_code_of_another_form_is_refused_although_its_last_characters_fit(data: bytes) -> None:
    assert errors_of(data) == {MISTAKE}
