"""Tallies: signed records, which expire, in which some servers of a shard say how many servers it has.

    record = signature (64 bytes) | JSON body

Their rules are those of announcements (`shoal.net.records`): the key follows from the body, the subkey is the peer. A
peer can report on its own shards only, and its digest decides which these are.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.net.identity import SIGNATURE_BYTES, Identity, verify
from shoal.net.records import MAX_RECORD_BYTES, Block, Duration, Name, Speed, four_digits, tallies_key
from shoal.peers import ModelInfo
from shoal.policy.census.histogram import MAX_CELLS, Cell, Tally, shortened
from shoal.policy.census.levels import MAX_LEVEL, MOST, Shard, bucket_of, shard_of
from shoal.protocol import MAX_BLOCKS
from shoal.spans import Span

MAX_TALLIED = 8 * MOST
"""The servers of one tally: more than a shard has while its servers change to another level."""
_DOMAIN = b"shoal tally 1\0"

Length = Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
Number = Annotated[int, Field(ge=1, le=MAX_TALLIED)]
Few = Annotated[int, Field(ge=0, le=MAX_TALLIED)]
Row = Annotated[tuple[Block, Length, Number, Few, Length, Speed, Speed, Speed, Duration], Field(strict=False)]
"""A `Cell`: the first block and the length of the span, then the other fields in their order."""


class ShardTally(BaseModel):
    """The body of a record. Its fields are strict; unknown fields, which a later version may add, are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    peer: Annotated[str, Field(max_length=64)]
    expires: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
    model: Name
    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    bucket: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    level: Annotated[int, Field(ge=0, le=MAX_LEVEL)]
    rows: Annotated[tuple[Row, ...], Field(max_length=MAX_CELLS, strict=False)]

    @model_validator(mode="after")
    def _rows_are_possible(self) -> ShardTally:
        spans = [(start, start + length) for start, length, *_ in self.rows]
        if len(set(spans)) < len(spans):
            raise ValueError("a span twice")
        if any(bucket_of(start) != self.bucket or end > self.num_blocks for start, end in spans):
            raise ValueError("a span outside of the bucket or the model")
        if any(movable > number for _, _, number, movable, *_ in self.rows):
            raise ValueError("more servers may move than there are")
        if sum(number for _, _, number, *_ in self.rows) > MAX_TALLIED:
            raise ValueError("more servers than a shard has")
        return self

    @classmethod
    def of(cls, peer: str, model: ModelInfo, shard: Shard, tally: Tally, *, expires: float) -> ShardTally:
        """The record of a tally until the Unix time `expires`. Raises `ValueError` for a field out of bounds."""
        return cls(
            peer=peer,
            expires=expires,
            model=model.key,
            num_blocks=model.num_blocks,
            bucket=shard.bucket,
            level=shard.level,
            rows=_rows(shortened(tally, MAX_CELLS)),
        )

    @property
    def shard(self) -> Shard:
        """The shard on which the peer reports. It is the peer's own."""
        return shard_of(self.peer, self.bucket, self.level)

    @property
    def tally(self) -> Tally:
        """What the record says."""
        return tuple(Cell(Span(row[0], row[0] + row[1]), *row[2:]) for row in self.rows)

    @property
    def dht_keys(self) -> tuple[str, ...]:
        """All keys under which this record is valid."""
        return (tallies_key(self.model, self.bucket),)


def _rows(tally: Tally) -> tuple[Row, ...]:
    return tuple(
        (
            cell.span.start,
            len(cell.span),
            cell.count,
            cell.movable,
            cell.max_blocks,
            four_digits(cell.block_speed),
            four_digits(cell.single_speed),
            four_digits(cell.network_speed),
            four_digits(cell.load_seconds),
        )
        for cell in tally
    )


def seal_tally(identity: Identity, tally: ShardTally) -> bytes:
    """The signed record of a tally, with fewer spans if it would be too long (`shortened`).

    Raises `ValueError` if it is another peer's.
    """
    if tally.peer != identity.peer:
        raise ValueError("a peer reports on its own shard")
    while True:
        body = tally.model_dump_json().encode()
        if SIGNATURE_BYTES + len(body) <= MAX_RECORD_BYTES:
            return identity.sign(_DOMAIN + body) + body
        fewer = shortened(tally.tally, len(tally.rows) - 4)
        tally = tally.model_copy(update={"rows": _rows(fewer)})


def unseal_tally(record: bytes) -> ShardTally | None:
    """The tally in a record; None unless the peer that it names signed it. The time is not checked."""
    if not SIGNATURE_BYTES < len(record) <= MAX_RECORD_BYTES:
        return None
    signature, body = record[:SIGNATURE_BYTES], record[SIGNATURE_BYTES:]
    try:
        tally = ShardTally.model_validate_json(body)
    except ValidationError:
        return None
    return tally if verify(tally.peer, _DOMAIN + body, signature) else None
