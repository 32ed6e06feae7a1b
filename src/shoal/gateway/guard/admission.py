"""Who may ask, how often, and how many at once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from shoal.gateway.error_objects import Refused, later
from shoal.prefix import DrawnSalt


def digest(key: str) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode()).digest()


@dataclass
class Allowance:
    """What a key may still use: it refills evenly, up to a minute's worth. `None` is no limit."""

    per_minute: float | None
    clock: Callable[[], float]
    _left: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._at = self.per_minute or 0.0, self.clock()

    def seconds_until(self, amount: float) -> float:
        """Seconds until this amount is there; 0 if it is."""
        if self.per_minute is None:
            return 0.0
        now = self.clock()
        self._left = min(self.per_minute, self._left + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, (min(amount, self.per_minute) - self._left) * 60 / self.per_minute)

    def use(self, amount: float) -> None:
        """Take this amount, even if that leaves a debt: how many tokens an answer has is known only afterwards."""
        self._left -= amount


@dataclass
class Account:
    """One key's limits, and the salt of its prefixes: without the same one, no other finds out what they are."""

    requests: Allowance
    tokens: Allowance
    salt: str = field(repr=False)


class Admitted:
    """A request that has been admitted, with the salt of its key. It waits until the first of its texts has room."""

    def __init__(self, admission: Admission, account: Account) -> None:
        self.salt = account.salt
        self.waits = True
        self._admission = admission

    @contextlib.asynccontextmanager
    async def text(self) -> AsyncIterator[None]:
        """Entered while one of the request's texts is computed: it waits for room."""
        async with self._admission.room():
            self.waits = False
            yield


class Admission:
    """Checks keys and limits, and lets at most `max_running` texts be computed, while at most `max_waiting` requests
    wait.

    A request may have several texts. They take their turns, in the order in which all texts came.

    Without `keys`, all may ask, and share prefixes with each other. The holders of keys share them only with a common
    `salt`; by default, each key has a secret one. Raises `ValueError` for an empty key: requests without a key have
    that.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        max_running: int = 64,
        max_waiting: int = 256,
        salt: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        def account() -> Account:
            own = DrawnSalt.draw() if salt is None else salt
            return Account(Allowance(requests_per_minute, clock), Allowance(tokens_per_minute, clock), own)

        keys = tuple(keys)
        if not all(keys):
            raise ValueError("an empty API key")
        self._accounts = {digest(key): account() for key in keys}
        self._without_key = account()
        self._room = asyncio.Semaphore(max_running)
        self._num_free = max_running
        self._max_waiting = max_waiting
        self._requests: set[Admitted] = set()

    @property
    def num_waiting(self) -> int:
        """How many requests wait: none of their texts had room yet."""
        return sum(each.waits for each in self._requests)

    @property
    def num_running(self) -> int:
        """How many requests run."""
        return len(self._requests) - self.num_waiting

    def account(self, authorization: str | None, api_key: str | None = None) -> Account:
        """The account of a request with these headers. Raises `Refused` for a wrong or missing key."""
        if not self._accounts:
            return self._without_key
        scheme, _, key = (authorization or "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else (api_key or "")
        found = self._accounts.get(digest(given))
        if found is None:
            message = "this gateway needs an API key" if not given else "this API key is not known"
            raise Refused(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found

    @contextlib.asynccontextmanager
    async def admitted(self, account: Account) -> AsyncIterator[Admitted]:
        """While a request waits and runs. Raises `Refused` if too many wait, or the key has used what it may."""
        for allowance, what in ((account.requests, "requests"), (account.tokens, "tokens")):
            if seconds := allowance.seconds_until(1):
                raise later(
                    f"this key may not use more {what} this minute",
                    status=429,
                    kind="rate_limit_error",
                    code="rate_limit_exceeded",
                    seconds=math.ceil(seconds),
                )
        if self.num_waiting >= self._max_waiting + self._num_free:
            raise later("too many requests wait already", status=429, kind="rate_limit_error", code="queue_full")
        account.requests.use(1)
        request = Admitted(self, account)
        self._requests.add(request)
        try:
            yield request
        finally:
            self._requests.discard(request)

    @contextlib.asynccontextmanager
    async def room(self) -> AsyncIterator[None]:
        """While a text is computed: it waits for its turn."""
        async with self._room:
            self._num_free -= 1
            try:
                yield
            finally:
                self._num_free += 1
