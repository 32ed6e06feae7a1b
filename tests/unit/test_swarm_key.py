"""The key of a closed swarm: its file, and the proofs that only those who have it can make."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.net.swarm_key import KEY_BYTES, SWARM_KEY, SwarmKey, key_in

keys = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES).map(SwarmKey)
words = st.text(st.characters(categories=["L", "N"]), max_size=8)


@given(keys)
def test_a_key_comes_back_from_its_text_and_is_in_no_log(key: SwarmKey) -> None:
    assert SwarmKey.parse(key.text) == key
    assert SwarmKey.parse(key.text + "\n") == key
    assert repr(key) == "SwarmKey()"


@given(
    st.text(max_size=60) | st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", max_size=40).map("shoal-swarm-key-1 ".__add__)
)
def test_other_text_is_no_key(text: str) -> None:
    try:
        key = SwarmKey.parse(text)
    except ValueError:
        return
    assert len(key.secret) == KEY_BYTES
    assert text.split()[0] == "shoal-swarm-key-1"


def test_keys_are_random() -> None:
    assert len({SwarmKey.generate() for _ in range(100)}) == 100


@given(keys, keys, st.tuples(words, words, words), st.tuples(words, words, words))
def test_a_proof_is_of_use_to_its_sender_with_its_receiver_for_its_purpose(
    key: SwarmKey, other: SwarmKey, one: tuple[str, str, str], two: tuple[str, str, str]
) -> None:
    proof = key.proof(*one)
    assert key.accepts(proof, *two) == (one == two)
    assert other.accepts(proof, *one) == (key == other)
    assert not key.accepts(proof[:-1], *one)
    assert not key.accepts(b"", *one)


def test_a_new_swarm_gets_a_key_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "team.key"
    with pytest.raises(UserError, match="does not exist") as missing:
        key_in(path)
    assert "shoal up --swarm-key" in str(missing.value.hint)
    key = key_in(path, create=True)
    assert key is not None
    assert key_in(path) == key_in(str(path), create=True) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_environment_names_a_file_where_the_user_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SWARM_KEY, raising=False)
    assert key_in(None) is None
    one, other = (key_in(tmp_path / name, create=True) for name in ("one", "other"))
    monkeypatch.setenv(SWARM_KEY, str(tmp_path / "one"))
    assert key_in(None) == one
    assert key_in(tmp_path / "other") == other
    assert key_in("") is None


def test_a_file_that_holds_no_key_is_refused_in_a_line_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    for content in (b"another secret\n", b"\xff" * 1000, b"shoal-swarm-key-1 ABC\n", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a swarm key") as refused:
            key_in(path)
        assert "another secret" not in f"{refused.value} {refused.value.hint}"
    with pytest.raises(UserError, match="cannot be used"):
        key_in(tmp_path)
