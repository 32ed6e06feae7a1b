"""An invitation comes back from its text, and no other text is one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import SwarmError
from shoal.joining.invitation import Invitation
from shoal.protocol import MAX_INVITATION

INVITATION = Invitation(
    model="Llama-3.1-8B",
    key="llama-32x4096-1a2b3c4d",
    fingerprint="0" * 32,
    dtype="bfloat16",
    quantization="none",
    manifest="f" * 64,
    hub="meta-llama/Llama-3.1-8B",
    revision="a" * 40,
)
CONTENT = json.loads(INVITATION.text)

texts = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=20) | st.just("🐟" * 256)
invitations = st.builds(
    Invitation,
    model=texts.filter(bool),
    key=texts,
    fingerprint=texts,
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    quantization=st.sampled_from(["none", "int8", "nf4"]),
    manifest=st.from_regex(r"([0-9a-f]{64})?", fullmatch=True),
    hub=st.sampled_from(["", "gpt2", "meta-llama/Llama-3.1-8B"]),
    revision=st.from_regex(r"([0-9a-f]{40})?", fullmatch=True),
)


def text_of(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


@given(invitations)
def test_an_invitation_comes_back_with_its_digest(invitation: Invitation) -> None:
    again = Invitation.parse(invitation.text)
    assert again == invitation
    assert again.digest == invitation.digest
    assert invitation.text.isascii()
    assert len(invitation.digest) == 16


@pytest.mark.parametrize("field", asdict(INVITATION))
def test_an_invitation_that_differs_in_one_field_has_another_digest(field: str) -> None:
    other = replace(INVITATION, **{field: asdict(INVITATION)[field][:-1] + "x"})
    assert other.digest != INVITATION.digest


def test_the_digest_is_that_of_the_text() -> None:
    assert text_of(CONTENT) == INVITATION.text
    assert INVITATION.digest == hashlib.sha256(INVITATION.text.encode()).hexdigest()[:16]


def test_an_invitation_with_usual_names_fits_into_a_message() -> None:
    most = replace(INVITATION, model="名" * 85, hub="h" * 96, revision="a" * 40)
    assert len(most.text) <= MAX_INVITATION
    assert Invitation.parse(most.text) == most


@pytest.mark.parametrize(
    "change",
    [
        {"model": ""},
        {"dtype": "float64"},
        {"dtype": "auto"},
        {"quantization": "int4"},
        {"manifest": "../../etc"},
        {"manifest": "f" * 63},
        {"hub": "/home/me/private"},
        {"hub": "../private"},
        {"hub": "a/b/c"},
        {"revision": "main"},
    ],
)
def test_what_no_server_would_invite_with_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(SwarmError, match="a member sent an invitation that is none"):
        Invitation.parse(replace(INVITATION, **change).text)


@pytest.mark.parametrize("version", [0, 2, -1, "1", None, [], {}, 1.5, 10**30])
def test_another_version_is_refused_and_told(version: Any) -> None:
    with pytest.raises(SwarmError, match="is of another version of shoal") as caught:
        Invitation.parse(text_of(CONTENT | {"version": version}))
    assert caught.value.hint == "use the same version"


def test_another_version_is_told_whatever_else_it_has() -> None:
    for content in ({"version": 2}, {"version": 2, "models": ["a", "b"]}):
        with pytest.raises(SwarmError, match="is of another version of shoal"):
            Invitation.parse(text_of(content))


@pytest.mark.parametrize("field", CONTENT)
def test_an_invitation_without_a_field_is_refused(field: str) -> None:
    with pytest.raises(SwarmError, match="an invitation that is none"):
        Invitation.parse(text_of({name: value for name, value in CONTENT.items() if name != field}))


@pytest.mark.parametrize("field", asdict(INVITATION))
@pytest.mark.parametrize(
    "value",
    [None, 1, True, 1.0, [], ["a"], {}, "a" * 257, "a\nb", "\x1b[31m", "\0", "\u202e", "\ud800", "\u2028", "a\tb"],
    ids=lambda value: ascii(value)[:12],
)
def test_a_value_that_is_no_line_of_text_is_refused(field: str, value: Any) -> None:
    with pytest.raises(SwarmError, match="an invitation that is none"):
        Invitation.parse(text_of(CONTENT | {field: value}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "1",
        "1.5",
        '"version"',
        "[]",
        '["version"]',
        "{}",
        "NaN",
        "{",
        INVITATION.text[:-1],
        INVITATION.text + "}",
        INVITATION.text + INVITATION.text,
        text_of(CONTENT | {"more": "text"}),
        text_of([CONTENT]),
        text_of(INVITATION.text),
        "[" * 100_000,
        '{"version":' * 100_000,
        "9" * 10_000,
        "\ud800",
        "\ufeff" + INVITATION.text,
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_any_other_json_and_what_is_none_are_refused(text: str) -> None:
    with pytest.raises(SwarmError, match="an invitation that is none"):
        Invitation.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CONTENT),
        INVITATION.text + "\n",
        text_of(dict(reversed(CONTENT.items()))).replace('"version":1', '"version":true'),
        INVITATION.text.replace('"version":1', '"version":1.0'),
        INVITATION.text.replace('"version":1', '"version":2,"version":1'),
        INVITATION.text.replace("Llama", "\\u004clama"),
    ],
)
def test_the_same_invitation_in_other_words_is_refused(text: str) -> None:
    """There is one text for each digest."""
    assert text != INVITATION.text
    with pytest.raises(SwarmError, match="an invitation that is none"):
        Invitation.parse(text)


@given(st.text(max_size=100))
def test_noise_is_refused(text: str) -> None:
    with pytest.raises(SwarmError):
        Invitation.parse(text)
