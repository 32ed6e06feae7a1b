"""The records that this peer stores for the directory, within a budget of memory.

hivemind's own storage has no limit but time: it keeps what any peer sends until it expires, and an entry in a heap for
each time that it was sent. It also hands out its dictionaries, into which a look-up then merges what others answered.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.timed_storage import ValueWithExpiration

from shoal.policy.network.table_room import Held, Origin, gives_way, shown

MAX_TABLE_BYTES = 24 << 20
"""All records in memory: those of 6,000 servers if this peer stores all of theirs, or of many more in a swarm where
more peers store records."""
MAX_KEY_BYTES = 1 << 20
"""The records of one key in memory: 700 of the usual size, ten times what a shard has. Twice what an answer has."""
MAX_OWNER_RECORDS = 32
"""The records of one peer, under different keys. A server has up to five, and for some minutes as many at its old
level or bucket."""
SWEEP_SECONDS = 10.0
"""The interval in which records that have expired are removed. Before that they are not shown."""
ENTRY_BYTES = 128
"""The most that the DHT adds to a record in an answer: its subkey, its expiration time, and lengths."""


@dataclass(frozen=True)
class TableLimits:
    """What a table may hold: bytes in all, bytes of one key, records of one peer."""

    table_bytes: int = MAX_TABLE_BYTES
    key_bytes: int = MAX_KEY_BYTES
    owner_records: int = MAX_OWNER_RECORDS


class RecordTable:
    """Records by key and owner, in place of hivemind's `DHTLocalStorage`. `clock` gives the Unix time.

    A full key and a full table make room as `shoal.policy.network.table_room` says.
    """

    def __init__(self, limits: TableLimits | None = None, clock: Callable[[], float] = time.time) -> None:
        self._limits = limits or TableLimits()
        self._clock = clock
        self._keys: dict[int, dict[str, Held]] = {}
        self._key_bytes: dict[int, int] = defaultdict(int)
        self._owners: dict[str, set[int]] = defaultdict(set)
        self._num_bytes = 0
        self._swept_at = clock()

    @property
    def num_bytes(self) -> int:
        """What the records take in memory."""
        return self._num_bytes

    def __len__(self) -> int:
        return sum(map(len, self._keys.values()))

    # -- writing ------------------------------------------------------------------------------------------------------

    def is_newer(self, key: int, owner: str, expires: float) -> bool:
        """Whether a record that expires then would replace the owner's record under this key, or is the first."""
        held = self._keys.get(key, {}).get(owner)
        return expires > self._clock() and (held is None or expires > held.expires)

    def take(self, key: int, owner: str, value: bytes, expires: float, *, origin: Origin | None) -> bool:
        """Store a valid record of `owner`, which came from `origin`. Returns whether it is in the table now.

        It is not if the table has a later one, or if there is no room for it.
        """
        if not self.is_newer(key, owner, expires):
            return False
        now = self._clock()
        if now - self._swept_at > SWEEP_SECONDS:
            self._sweep(now)
        before = self._keys.get(key, {}).get(owner)
        since = before.since if before is not None and before.expires > now else now
        if before is not None:
            self._remove(before)
        self._add(key, Held(key, owner, origin, value, since, expires))
        self._make_room(key, owner, is_own=origin is None)
        return owner in self._keys.get(key, {})

    def store(self, key: int, value: bytes, expiration_time: float, subkey: str | None = None) -> bool:
        """What hivemind calls for this peer's own records."""
        return subkey is not None and self.take(key, subkey, value, expiration_time, origin=None)

    def _make_room(self, key: int, owner: str, *, is_own: bool) -> None:
        if len(self._owners[owner]) > self._limits.owner_records and not is_own:
            self._remove(min((self._keys[each][owner] for each in self._owners[owner]), key=lambda held: held.expires))
        if self._key_bytes[key] > self._limits.key_bytes:
            for held in gives_way(self._keys[key].values(), most_bytes=self._limits.key_bytes):
                self._remove(held)
        if self._num_bytes > self._limits.table_bytes:
            for held in gives_way(self.records(), most_bytes=self._limits.table_bytes):
                self._remove(held)

    def _sweep(self, now: float) -> None:
        self._swept_at = now
        for held in [each for each in self.records() if each.expires <= now]:
            self._remove(held)

    def records(self) -> Iterator[Held]:
        """All that is stored."""
        return (held for records in self._keys.values() for held in records.values())

    def _add(self, key: int, held: Held) -> None:
        self._keys.setdefault(key, {})[held.owner] = held
        self._owners[held.owner].add(key)
        self._key_bytes[key] += held.size
        self._num_bytes += held.size

    def _remove(self, held: Held) -> None:
        key = held.key
        del self._keys[key][held.owner]
        self._owners[held.owner].discard(key)
        self._key_bytes[key] -= held.size
        self._num_bytes -= held.size
        if not self._keys[key]:
            del self._keys[key], self._key_bytes[key]
        if not self._owners[held.owner]:
            del self._owners[held.owner]

    # -- reading ------------------------------------------------------------------------------------------------------

    def get(self, key: int) -> ValueWithExpiration | None:
        """All records of a key, as hivemind asks for them: a dictionary of its own; `None` if there are none."""
        return self.part(key, most_bytes=self._limits.key_bytes * 2)

    def part(self, key: int, *, most_bytes: int) -> ValueWithExpiration | None:
        """Records of a key that take at most `most_bytes` in an answer; `None` if there are none.

        If not all fit, those of all networks have the same chance, and repeated look-ups find every record.
        """
        now = self._clock()
        records = [each for each in self._keys.get(key, {}).values() if each.expires > now]
        random.shuffle(records)
        chosen = DictionaryDHTValue()
        for each in shown(records, most_bytes=most_bytes, overhead=ENTRY_BYTES):
            chosen.store(each.owner, each.value, each.expires)
        return ValueWithExpiration(chosen, chosen.latest_expiration_time) if chosen.data else None
