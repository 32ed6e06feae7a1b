"""Decides which records this peer stores for others, and which ones it accepts from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

from hivemind.dht.crypto import DHTRecord
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import RecordValidatorBase
from hivemind.utils import MSGPackSerializer

from shoal.net.libp2p.hash_table.opened_records import OpenedRecords
from shoal.net.records import MAX_RECORD_BYTES, Announcement, is_timely
from shoal.net.tallies import ShardTally


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Accepts only signed announcements and tallies, under their own keys, with the peer that signed them as subkey.

    hivemind calls it before it stores a record and again when it reads one. A value without a subkey and a key that is
    not shoal's are refused, because any peer could overwrite them. `on_valid` is called with each valid announcement;
    `opened` opens the records.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        on_valid: Callable[[Announcement], None] = lambda _: None,
        opened: OpenedRecords | None = None,
    ) -> None:
        self._clock = clock
        self._on_valid = on_valid
        self._opened = opened or OpenedRecords()

    def validate(self, record: DHTRecord) -> bool:
        """Whether the record may be stored and read."""
        value = unpack_bytes(record.value)
        opened: Announcement | ShardTally | None = None
        if value is not None:
            opened = self._opened.announcement(value) or self._opened.tally(value)
        if (
            opened is None
            or record.expiration_time != opened.expires
            or record.subkey != MSGPackSerializer.dumps(opened.peer)
            or not is_timely(opened, now=self._clock())
            or record.key not in _hashed(opened.dht_keys)
        ):
            return False
        if isinstance(opened, Announcement):
            self._on_valid(opened)
        return True


@lru_cache(maxsize=1 << 12)
def _hashed(keys: tuple[str, ...]) -> frozenset[bytes]:
    """The keys in the DHT's form: their hashes."""
    return frozenset(DHTID.generate(key).to_bytes() for key in keys)


def unpack_bytes(raw: object) -> bytes | None:
    """The byte string of which `raw` is the msgpack encoding; None for anything else, which is not decoded at all."""
    if not isinstance(raw, bytes) or len(raw) > MAX_RECORD_BYTES + 3:
        return None
    for value in raw[2:], raw[3:]:  # behind a type byte and a length of one byte or two
        if MSGPackSerializer.dumps(value) == raw:
            return value
    return None
