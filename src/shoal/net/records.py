"""Announcements: signed records, which expire, in which a server describes itself.

    record = signature (64 bytes) | JSON body

One record is stored in the DHT under the keys of one or two shards of the bucket of its first block
(`shoal.policy.census.levels`), and perhaps under one key of the list of models. The body holds the peer, the model, the
span, the level and the expiration time, and the keys follow from these. So one signature covers all copies: no copy can
be moved to another key, made to last longer, or be published by another peer. The peer that stores a record and the
peer that reads it make the same checks, which are here.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Annotated, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.adapters import HostedName
from shoal.net.addressing.addresses import peer_of
from shoal.net.identity import SIGNATURE_BYTES, Identity, verify
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import (
    MAX_HOSTED_ADAPTERS,
    MAX_NEIGHBORS,
    MAX_SPANS_ON_DISK,
    MAX_SPEED_POINTS,
    Capacity,
    ModelInfo,
    ServerInfo,
    ServerState,
)
from shoal.policy.census.levels import MAX_LEVEL, Shard, is_sampled, shards_of
from shoal.protocol import MAX_BLOCKS
from shoal.spans import Span

MAX_RECORD_BYTES = 4096
"""Enough for all addresses, adapters and neighbors that an announcement may have."""
CLOCK_SKEW = 5.0
"""Seconds by which the clocks of two peers may differ."""
REGISTRY_SHARDS = 16
"""The list of models is spread over this number of keys, because the records of one key travel in one message of at
most 4 MiB."""
_DOMAIN = b"shoal announcement 2\0"


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("control characters")
    return text


# Text from other peers is printed on terminals, so it must not hold escape sequences.
Text = Annotated[str, Field(max_length=128), AfterValidator(_printable)]
Word = Annotated[str, Field(max_length=16), AfterValidator(_printable)]
Zone = Annotated[str, Field(max_length=32), AfterValidator(_printable)]
Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
Speed = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Block = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
Short = Annotated[str, Field(min_length=1, max_length=12), AfterValidator(_printable)]
Seconds = Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)]
Address = Annotated[str, Field(max_length=300), AfterValidator(_printable)]
Duration = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Time = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Pair = Annotated[tuple[Block, Block], Field(strict=False)]


class AnnouncedCapacity(BaseModel):
    """`Capacity` in a record. Its speeds are positive, and for growing lengths of spans of the model."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    max_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    block_speeds: Annotated[
        tuple[Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_BLOCKS)], Positive], Field(strict=False)], ...],
        Field(min_length=1, max_length=MAX_SPEED_POINTS, strict=False),
    ]
    network_speed: Positive | None
    load_seconds: Duration
    disk_seconds: Duration
    on_disk: Annotated[tuple[Pair, ...], Field(max_length=MAX_SPANS_ON_DISK, strict=False)] = ()

    @model_validator(mode="after")
    def _lengths_grow(self) -> AnnouncedCapacity:
        if any(one >= other for (one, _), (other, _) in pairwise(self.block_speeds)):
            raise ValueError("the lengths of spans do not grow")
        if any(start >= end for start, end in self.on_disk):
            raise ValueError("an empty span")
        return self

    def fits(self, num_blocks: int) -> bool:
        """Whether it speaks of no more blocks than a model has."""
        ends = [self.max_blocks, self.block_speeds[-1][0], *(end for _, end in self.on_disk)]
        return max(ends) <= num_blocks

    @classmethod
    def of(cls, capacity: Capacity) -> AnnouncedCapacity:
        """The same capacity, its figures rounded to four digits to keep the record small."""
        return cls(
            max_blocks=capacity.max_blocks,
            block_speeds=tuple((length, four_digits(speed)) for length, speed in capacity.block_speeds),
            network_speed=None if capacity.network_speed is None else four_digits(capacity.network_speed),
            load_seconds=four_digits(capacity.load_seconds),
            disk_seconds=four_digits(capacity.disk_seconds),
            on_disk=tuple((span.start, span.end) for span in capacity.on_disk),
        )

    @property
    def capacity(self) -> Capacity:
        """What the record says."""
        return Capacity(
            max_blocks=self.max_blocks,
            block_speeds=self.block_speeds,
            network_speed=self.network_speed,
            load_seconds=self.load_seconds,
            disk_seconds=self.disk_seconds,
            on_disk=tuple(Span(start, end) for start, end in self.on_disk),
        )


class Announcement(BaseModel):
    """The body of a record. Its fields are strict; unknown fields, which a later version may add, are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    peer: Annotated[str, Field(max_length=64)]
    expires: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
    model: Name
    model_name: Name
    family: Text
    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    start: Block
    end: Block
    level: Annotated[int, Field(ge=0, le=MAX_LEVEL)]
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
    unreached: Annotated[tuple[Short, ...], Field(max_length=MAX_NEIGHBORS, strict=False)] = ()
    capacity: AnnouncedCapacity | None = None
    pinned: bool = False
    wants: Pair | None = None
    zone: Zone = ""
    up_since: Time | None = None
    ready_at: Time | None = None
    reason: Text = ""
    attention: Text = ""
    protocol: Annotated[int, Field(ge=0, le=1 << 16)] = 8

    @model_validator(mode="after")
    def _span_is_in_the_model(self) -> Announcement:
        if not self.start < self.end <= self.num_blocks:
            raise ValueError("a span outside of the model")
        if self.wants is not None and not self.wants[0] < self.wants[1] <= self.num_blocks:
            raise ValueError("it wants a span outside of the model")
        if self.capacity is not None and not self.capacity.fits(self.num_blocks):
            raise ValueError("a capacity for more blocks than the model has")
        return self

    @classmethod
    def of(cls, model: ModelInfo, info: ServerInfo, *, expires: float, level: int = 0) -> Announcement:
        """The announcement of `info` until the Unix time `expires`, at this level of the directory.

        Raises `ValueError` for a field out of bounds.
        """
        return cls(
            peer=info.peer,
            expires=expires,
            model=model.key,
            model_name=model.name,
            family=model.family,
            num_blocks=model.num_blocks,
            start=info.span.start,
            end=info.span.end,
            level=level,
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
            round_trips={peer: _rounded(seconds) for peer, seconds in info.round_trips},
            unreached=info.unreached,
            capacity=None if info.capacity is None else AnnouncedCapacity.of(info.capacity),
            pinned=info.pinned,
            wants=None if info.wants is None else (info.wants.start, info.wants.end),
            zone=info.zone,
            up_since=info.up_since,
            ready_at=info.ready_at,
            reason=info.reason,
            attention=info.attention,
            protocol=info.protocol,
        )

    @property
    def model_info(self) -> ModelInfo:
        """The model that the server serves."""
        return ModelInfo(self.model, self.model_name, self.family, self.num_blocks)

    @property
    def server_info(self) -> ServerInfo:
        """The server's description of itself."""
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
            # Addresses are hints, and only those of the peer itself count.
            addresses=tuple(address for address in self.addresses if peer_of(address) == self.peer),
            encodings=self.encodings,
            queue_length=self.queue_length,
            head=self.head,
            training=self.training,
            adapters=self.adapters,
            round_trips=tuple(self.round_trips.items()),
            unreached=self.unreached,
            capacity=None if self.capacity is None else self.capacity.capacity,
            pinned=self.pinned,
            wants=None if self.wants is None else Span(*self.wants),
            zone=self.zone,
            up_since=self.up_since,
            ready_at=self.ready_at,
            reason=self.reason,
            attention=self.attention,
            protocol=self.protocol,
        )

    @property
    def dht_keys(self) -> tuple[str, ...]:
        """All keys under which this announcement is valid."""
        shards = shards_of(self.peer, self.start, self.level)
        listed = (registry_key(registry_shard(self.peer)),) if is_sampled(self.peer, self.level) else ()
        return (*listed, *(shard_key(self.model, shard) for shard in shards))


def _rounded(seconds: float) -> float:
    """Rounded to 10 microseconds, which is more precise than the measurement, to keep the record small."""
    return max(round(seconds, 5), 1e-5)


def four_digits(number: float) -> float:
    """Rounded to four digits, to keep records small."""
    return float(f"{number:.4g}")


def shard_key(model: str, shard: Shard) -> str:
    """The DHT key of a shard of the servers of the model with this key."""
    return f"shoal:2:{model}:{shard.bucket}:{shard.level}:{shard.index}"


def tallies_key(model: str, bucket: int) -> str:
    """The DHT key of the tallies of a bucket's shards (`shoal.net.tallies`)."""
    return f"shoal:2:{model}:{bucket}:tallies"


def registry_key(shard: int) -> str:
    """The DHT key of one part of the list of models."""
    return f"shoal:2::models:{shard}"


def registry_shard(peer: str) -> int:
    """The part of the list of models in which a peer announces itself, if it does: in a crowded swarm only some do."""
    return hashlib.sha256(peer.encode()).digest()[0] % REGISTRY_SHARDS


def seal(identity: Identity, announcement: Announcement) -> bytes:
    """The signed record of an announcement. Raises `ValueError` if it is about another peer, or too long."""
    if announcement.peer != identity.peer:
        raise ValueError("a peer announces itself")
    body = announcement.model_dump_json().encode()
    record = identity.sign(_DOMAIN + body) + body
    if len(record) > MAX_RECORD_BYTES:
        raise ValueError(f"an announcement of {len(record)} bytes")
    return record


def unseal(record: bytes) -> Announcement | None:
    """The announcement in a record; None unless the peer that it is about signed it. The time is not checked."""
    if not SIGNATURE_BYTES < len(record) <= MAX_RECORD_BYTES:
        return None
    signature, body = record[:SIGNATURE_BYTES], record[SIGNATURE_BYTES:]
    try:
        announcement = Announcement.model_validate_json(body)
    except ValidationError:
        return None
    return announcement if verify(announcement.peer, _DOMAIN + body, signature) else None


class Expiring(Protocol):
    """Any record."""

    @property
    def expires(self) -> float:
        """The Unix time until which it is valid."""
        ...


def is_timely(record: Expiring, *, now: float) -> bool:
    """Whether it has not expired at the Unix time `now`, and does not last longer than `MAX_LIFETIME`."""
    return now - CLOCK_SKEW <= record.expires <= now + MAX_LIFETIME + CLOCK_SKEW
