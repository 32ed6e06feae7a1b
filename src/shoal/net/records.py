"""Announcements: what a server says of itself, signed, for a while.

    record = signature (64 bytes) | JSON body

One announcement is stored under one key for each of its blocks and one key of the list of models. The body names the
peer, the model, the span and the moment when it ends, and the keys follow from these; so one signature covers all of
its copies, none can be moved elsewhere, made to last longer or be published by another. Whoever stores and whoever
reads checks the same things, here.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.adapters import HostedName
from shoal.net.addresses import peer_of
from shoal.net.identity import SIGNATURE_BYTES, Identity, verify
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import MAX_HOSTED_ADAPTERS, MAX_NEIGHBORS, ModelInfo, ServerInfo, ServerState
from shoal.protocol import MAX_BLOCKS
from shoal.spans import Span

MAX_RECORD_BYTES = 4096
CLOCK_SKEW = 5.0
"""Seconds that clocks may differ by: a record that has just ended in transit is not a forgery."""
REGISTRY_SHARDS = 16
"""The list of models is spread over so many keys: what is under one key travels as one message of at most 4 MiB."""
_DOMAIN = b"shoal announcement 1\0"


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("control characters")
    return text


# Strangers' words end up on terminals, so they hold no escape sequences.
Text = Annotated[str, Field(max_length=128), AfterValidator(_printable)]
Word = Annotated[str, Field(max_length=16), AfterValidator(_printable)]
Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
Speed = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Block = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
Short = Annotated[str, Field(min_length=1, max_length=12), AfterValidator(_printable)]
Seconds = Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)]
Address = Annotated[str, Field(max_length=300), AfterValidator(_printable)]


class Announcement(BaseModel):
    """The body of a record. Fields that a later version may add are ignored, those of this one are strict."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    peer: Annotated[str, Field(max_length=64)]
    expires: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
    model: Name
    model_name: Name
    family: Text
    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    start: Block
    end: Block
    state: Annotated[ServerState, Field(strict=False)]
    fingerprint: Text
    decode_speed: Speed | None
    prefill_speed: Speed | None
    cache_tokens_left: Count
    dtype: Text
    quantization: Text
    version: Text
    name: Text = ""
    addresses: Annotated[tuple[Address, ...], Field(max_length=8, strict=False)] = ()
    encodings: Annotated[tuple[Word, ...], Field(max_length=8, strict=False)] = ()
    queue_length: Count = 0
    head: bool = False
    training: bool = True
    adapters: Annotated[tuple[HostedName, ...], Field(max_length=MAX_HOSTED_ADAPTERS, strict=False)] = ()
    round_trips: Annotated[dict[Short, Seconds], Field(max_length=MAX_NEIGHBORS)] = {}

    @model_validator(mode="after")
    def _span_is_in_the_model(self) -> Announcement:
        if not self.start < self.end <= self.num_blocks:
            raise ValueError("a span outside of the model")
        return self

    @classmethod
    def of(cls, model: ModelInfo, info: ServerInfo, *, expires: float) -> Announcement:
        """Raises `ValueError` for what no peer would accept."""
        return cls(
            peer=info.peer,
            expires=expires,
            model=model.key,
            model_name=model.name,
            family=model.family,
            num_blocks=model.num_blocks,
            start=info.span.start,
            end=info.span.end,
            state=info.state,
            fingerprint=info.fingerprint,
            decode_speed=None if info.decode_speed is None else float(info.decode_speed),
            prefill_speed=None if info.prefill_speed is None else float(info.prefill_speed),
            cache_tokens_left=info.cache_tokens_left,
            dtype=info.dtype,
            quantization=info.quantization,
            version=info.version,
            name=info.name,
            addresses=info.addresses[:8],
            encodings=info.encodings,
            queue_length=info.queue_length,
            head=info.head,
            training=info.training,
            adapters=info.adapters,
            round_trips={peer: _precise(seconds) for peer, seconds in info.round_trips},
        )

    @property
    def model_info(self) -> ModelInfo:
        return ModelInfo(self.model, self.model_name, self.family, self.num_blocks)

    @property
    def server_info(self) -> ServerInfo:
        return ServerInfo(
            peer=self.peer,
            span=Span(self.start, self.end),
            state=self.state,
            fingerprint=self.fingerprint,
            decode_speed=self.decode_speed,
            prefill_speed=self.prefill_speed,
            cache_tokens_left=self.cache_tokens_left,
            dtype=self.dtype,
            quantization=self.quantization,
            version=self.version,
            name=self.name,
            # Hints only, and never somebody else's place.
            addresses=tuple(address for address in self.addresses if peer_of(address) == self.peer),
            encodings=self.encodings,
            queue_length=self.queue_length,
            head=self.head,
            training=self.training,
            adapters=self.adapters,
            round_trips=tuple(self.round_trips.items()),
        )

    @property
    def table_keys(self) -> tuple[str, ...]:
        """Every key that this announcement belongs under, and no other."""
        blocks = (block_key(self.model, block) for block in range(self.start, self.end))
        return (registry_key(shard_of(self.peer)), *blocks)


def _precise(seconds: float) -> float:
    """To a hundredth of a millisecond: more digits would say nothing, and take room."""
    return max(round(seconds, 5), 1e-5)


def block_key(model: str, block: int) -> str:
    return f"shoal:1:{model}:{block}"


def registry_key(shard: int) -> str:
    return f"shoal:1::models:{shard}"


def shard_of(peer: str) -> int:
    return hashlib.sha256(peer.encode()).digest()[0] % REGISTRY_SHARDS


def seal(identity: Identity, announcement: Announcement) -> bytes:
    """The record of an announcement. Raises `ValueError` when it is not the identity's own, or too long."""
    if announcement.peer != identity.peer:
        raise ValueError("a peer announces itself")
    body = announcement.model_dump_json().encode()
    record = identity.sign(_DOMAIN + body) + body
    if len(record) > MAX_RECORD_BYTES:
        raise ValueError(f"an announcement of {len(record)} bytes")
    return record


@lru_cache(maxsize=4096)
def unseal(record: bytes) -> Announcement | None:
    """The announcement that its peer signed; None for anything else, whoever made it up. The time is not looked at."""
    if not SIGNATURE_BYTES < len(record) <= MAX_RECORD_BYTES:
        return None
    signature, body = record[:SIGNATURE_BYTES], record[SIGNATURE_BYTES:]
    try:
        announcement = Announcement.model_validate_json(body)
    except ValidationError:
        return None
    return announcement if verify(announcement.peer, _DOMAIN + body, signature) else None


def is_timely(announcement: Announcement, *, now: float) -> bool:
    """Whether it has not ended, and does not claim to last longer than any may."""
    return now - CLOCK_SKEW <= announcement.expires <= now + MAX_LIFETIME + CLOCK_SKEW
