"""What joining machines may ask for: digests and pieces that there can be, and no more bytes than there is room for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from shoal.model.weights.pieces.manifest import MAX_MANIFEST_BYTES, MAX_PIECES, PIECE_BYTES
from shoal.protocol import (
    MAX_INVITATION,
    MAX_LISTING_BYTES,
    Content,
    GetHeld,
    GetInvitation,
    GetManifest,
    GetPiece,
    InvitationText,
)
from shoal.tensors import TensorSpec

NAME = "0123456789abcdef" * 4
NO_NAMES = [
    "",
    NAME[:-1],
    NAME + "0",
    NAME + "\n",
    "\n" + NAME,
    NAME.upper(),
    "g" * 64,
    "../" + NAME[3:],
    None,
    7,
    b"0" * 64,
]


def content(*shape: int, name: Any = "content", dtype: Any = "uint8") -> Content:
    return Content(tensors=(TensorSpec(name=name, dtype=dtype, shape=shape),))


def test_what_can_be_asked_for_is_accepted() -> None:
    assert GetInvitation().digest is None
    assert GetInvitation(digest="0123456789abcdef").digest == "0123456789abcdef"
    assert GetManifest(manifest=NAME).manifest == GetHeld(manifest=NAME).manifest == NAME
    assert [GetPiece(manifest=NAME, piece=piece).piece for piece in (0, MAX_PIECES - 1)] == [0, MAX_PIECES - 1]


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: repr(name)[:12])
def test_a_name_that_no_manifest_has_is_refused(name: Any) -> None:
    for ask in (GetManifest, GetHeld, lambda *, manifest: GetPiece(manifest=manifest, piece=0)):
        with pytest.raises(ValidationError):
            ask(manifest=name)


@pytest.mark.parametrize(
    "digest", ["", "0" * 15, "0" * 17, "0" * 16 + "\n", "ABCDEF0123456789", "x" * 16, 7, b"0" * 16]
)
def test_a_digest_that_no_code_has_is_refused(digest: Any) -> None:
    with pytest.raises(ValidationError):
        GetInvitation(digest=digest)


@pytest.mark.parametrize("piece", [-1, MAX_PIECES, 1 << 64, True, 1.0, "1", None])
def test_a_piece_that_no_manifest_has_is_refused(piece: Any) -> None:
    with pytest.raises(ValidationError):
        GetPiece(manifest=NAME, piece=piece)


def test_an_invitation_has_a_limited_length() -> None:
    assert len(InvitationText(text="a" * MAX_INVITATION).text) == MAX_INVITATION
    with pytest.raises(ValidationError):
        InvitationText(text="a" * (MAX_INVITATION + 1))


def test_content_has_room_for_each_piece_and_the_longest_list_and_for_no_more() -> None:
    assert PIECE_BYTES < MAX_MANIFEST_BYTES <= MAX_LISTING_BYTES
    assert content(MAX_LISTING_BYTES).payload_bytes == MAX_LISTING_BYTES
    for shape in ((MAX_LISTING_BYTES + 1,), (4097, 4096), (1 << 26, 1 << 26, 1 << 26, 1 << 26)):
        with pytest.raises(ValidationError, match="too many bytes"):
            content(*shape)
    with pytest.raises(ValidationError, match="too many bytes"):
        content(MAX_LISTING_BYTES // 4, dtype="int64")


def test_content_carries_nothing_else_and_requests_carry_nothing() -> None:
    with pytest.raises(ValidationError, match="carries no hidden"):
        content(3, name="hidden")
    spec = TensorSpec(name="content", dtype="uint8", shape=(3,))
    with pytest.raises(ValidationError, match="carries no content"):
        GetPiece(manifest=NAME, piece=0, tensors=(spec,))
    with pytest.raises(ValidationError, match="declared twice"):
        Content(tensors=(spec, spec))
