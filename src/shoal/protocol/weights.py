"""The messages with which a machine joins: what a swarm serves, and the pieces of the model's files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shoal.protocol.limits import MAX_INVITATION, MAX_LISTING_BYTES
from shoal.protocol.message import Message

InvitationDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
ManifestName = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class GetInvitation(Message):
    """What does a swarm serve? `digest` names one invitation (`shoal.joining.invitation`); without it, any will do.

    Answered by an `InvitationText`, or by a `Failure` if this server does not know it.
    """

    kind: Literal["get_invitation"] = "get_invitation"
    digest: InvitationDigest | None = None


class InvitationText(Message):
    """An invitation as it is written down."""

    kind: Literal["invitation"] = "invitation"
    text: Annotated[str, Field(max_length=MAX_INVITATION)]


class GetManifest(Message):
    """The manifest of this name (`shoal.model.weights.pieces.manifest`). Answered by `Content`, or by a `Failure`."""

    kind: Literal["get_manifest"] = "get_manifest"
    manifest: ManifestName


class GetHeld(Message):
    """Which pieces of a manifest are there? Answered by `Content`, a bit for each piece, or by a `Failure`."""

    kind: Literal["get_held"] = "get_held"
    manifest: ManifestName


class GetPiece(Message):
    """One piece of a manifest. Answered by `Content`, or by a `Failure`."""

    kind: Literal["get_piece"] = "get_piece"
    manifest: ManifestName
    piece: Annotated[int, Field(ge=0, lt=1 << 18)]


class Content(Message):
    """Tensor: `content` [N] uint8, the bytes that were asked for."""

    carries = ("content",)
    kind: Literal["content"] = "content"

    @model_validator(mode="after")
    def _is_not_too_large(self) -> Content:
        if self.payload_bytes > MAX_LISTING_BYTES:
            raise ValueError("too many bytes")
        return self
