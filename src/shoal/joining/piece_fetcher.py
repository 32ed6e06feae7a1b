"""Gets missing pieces of a model from several members at once, nearest first."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from shoal.concurrency import owned_task
from shoal.errors import CheckpointError, ShoalError, SwarmError
from shoal.joining.requests import Member, NoAnswer, member
from shoal.model.weights.pieces.piece_store import PieceStore
from shoal.net.ping import measure_round_trips
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo

log = logging.getLogger(__name__)

MAX_STREAMS = 6
"""Pieces that are asked for at the same time."""
STREAMS_PER_MEMBER = 2
"""So that the next piece is on its way while one is checked."""
MAX_ASKED = 2
"""Members that are asked for the same piece, when there is no other left to ask for, and more when these are slow."""
STALE_SECONDS = 5.0
"""The time after which a member that was asked counts as slow."""
LOOK_SECONDS = 1.0
"""How often a member that has nothing to give looks for what others have not given."""
SAVED_BYTES = 1 << 26
"""What may be fetched again after a crash."""
RETRY_SECONDS = 3.0
"""The pause before all members are asked again, when none of them gives what is missing."""
PATIENCE_SECONDS = 120.0
"""How long nothing may come from any member, before it is given up."""
BUSY_PATIENCE_SECONDS = 1800.0
"""The same while members say that they give to others first."""
PING_SECONDS = 3.0

Report = Callable[[int, int], None]
"""Called with the bytes that have come, and those that are wanted."""


class PieceFetcher:
    """Fills a store with pieces from the servers of a model.

    A member that sends a wrong piece is named in the log and not asked again. One that is busy, breaks off or is slow
    is asked again later. `report` is called when bytes have come.
    """

    def __init__(
        self,
        node: Node,
        model: ModelInfo,
        store: PieceStore,
        *,
        report: Report = lambda come, wanted: None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._node = node
        self._model = model
        self._store = store
        self._report = report
        self._patience = patience
        self._liars: set[str] = set()
        self._failures = Counter[str]()
        self._round_trips: dict[str, float | None] = {}
        self._one_at_a_time = asyncio.Lock()

    async def fetch(self, pieces: Sequence[int]) -> None:
        """Get these pieces into the store. Raises `CheckpointError` if no member gives one of them, and `UserError` if
        the disk does not take them."""
        async with self._one_at_a_time:
            await self._fetch(pieces)

    async def _fetch(self, pieces: Sequence[int]) -> None:
        work = _Work(self._store, pieces, self._report)
        reason = "no member has been found"
        while work.missing:
            before = work.come
            reasons = await self._round(work)
            reason = next(iter(reasons), reason)
            if work.missing and work.seconds_without > (BUSY_PATIENCE_SECONDS if work.met_busy else self._patience):
                raise CheckpointError(
                    f"no member of the swarm gives {len(work.missing)} pieces of the weights: {reason}",
                    hint="what has come is kept; try again later, or name a folder or the model's id on the hub",
                )
            if work.missing and work.come == before:
                log.warning("waiting for members that have %d pieces of the weights: %s", len(work.missing), reason)
                await asyncio.sleep(RETRY_SECONDS)

    async def _round(self, work: _Work) -> list[str]:
        """Ask members until each has given what it can. Returns why those that gave nothing did not."""
        try:
            servers = await self._node.directory.servers(self._model)
        except SwarmError as error:
            return [str(error)]
        others = [each for each in servers if each.peer not in {self._node.transport.peer, *self._liars}]
        nearest = deque(await self._nearest_first(others) * STREAMS_PER_MEMBER)
        reasons: list[str] = []
        errors: list[ShoalError] = []  # of this machine, such as a full disk

        async def ask_one_after_another() -> None:
            while nearest and work.missing and not errors:
                server = nearest.popleft()
                if server.peer in self._liars:
                    continue
                try:
                    await self._ask(server, work)
                except NoAnswer as failure:
                    log.debug("%s gives no more pieces: %s", server.peer, failure)
                    reasons.append(f"{server.name or server.peer}: {failure}")
                    if failure.retry_after is None:
                        self._failures[server.peer] += 1
                    else:
                        work.met_busy = True
                        await asyncio.sleep(min(failure.retry_after, RETRY_SECONDS))
                except ShoalError as error:
                    errors.append(error)

        async with asyncio.TaskGroup() as group:
            for _ in range(MAX_STREAMS):
                group.create_task(ask_one_after_another())
        if errors:
            raise errors[0]
        return reasons

    async def _nearest_first(self, servers: Sequence[ServerInfo]) -> list[ServerInfo]:
        """Those that have failed least first, and of these the nearest. Round trips are measured once."""
        new = [each for each in servers if each.peer not in self._round_trips]
        if new:
            transport = self._node.transport
            self._round_trips |= await measure_round_trips(transport, new, max_concurrent=8, seconds=PING_SECONDS)

        def rank(server: ServerInfo) -> tuple[int, float]:
            seconds = self._round_trips.get(server.peer)
            return self._failures[server.peer], float("inf") if seconds is None else seconds

        return sorted(servers, key=rank)

    async def _ask(self, server: ServerInfo, work: _Work) -> None:
        """Take all pieces from a member that it has and that others do not bring first. Raises `NoAnswer`."""
        async with member(self._node.transport, server.peer, server.addresses) as giver:
            held = await giver.held(self._store.manifest)
            while (piece := await work.next(server.peer, held)) is not None:
                content = await _unless_it_comes(giver, work, piece)
                if content is None:
                    raise NoAnswer("others were faster")
                if not await asyncio.to_thread(self._store.put, piece, content):
                    if server.peer not in self._liars:
                        log.warning("%s sent a wrong piece of the weights: it is not asked again", server.peer)
                    self._liars.add(server.peer)
                    work.failed(server.peer, piece)
                    raise NoAnswer("it sent a wrong piece")
                if work.is_due_to_be_saved(piece):
                    await asyncio.to_thread(self._store.save)
                work.came(piece)


class FetchFromThreads:
    """Fetches for threads other than that of the event loop, which this is made on. They wait."""

    def __init__(self, fetcher: PieceFetcher) -> None:
        self._fetcher = fetcher
        self._loop = asyncio.get_running_loop()
        self._running: set[concurrent.futures.Future[None]] = set()
        self._stopped = threading.Event()

    def __call__(self, pieces: Sequence[int]) -> None:
        """Get these pieces. Raises `CheckpointError`, also after `stop`, and `UserError`, as `PieceFetcher.fetch`."""
        if self._stopped.is_set():
            raise CheckpointError("this machine is leaving the swarm")
        future = asyncio.run_coroutine_threadsafe(self._fetcher.fetch(pieces), self._loop)
        self._running.add(future)
        if self._stopped.is_set():  # meanwhile
            future.cancel()
        try:
            future.result()
        except concurrent.futures.CancelledError:
            raise CheckpointError("this machine is leaving the swarm") from None
        finally:
            self._running.discard(future)

    def stop(self) -> None:
        """Let no thread wait any longer. To be called on the event loop."""
        self._stopped.set()
        for future in [*self._running]:
            future.cancel()


async def _unless_it_comes(giver: Member, work: _Work, piece: int) -> memoryview | None:
    """The content of a piece, or `None` if another member brought it first."""
    try:
        async with owned_task(giver.piece(work.manifest, piece)) as asking, owned_task(work.arrival(piece)) as arrival:
            await asyncio.wait({asking, arrival}, return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else None
    except NoAnswer:
        work.failed(giver.peer, piece)
        raise


class _Work:
    """The pieces that are wanted: those that are missing, and those that some member is asked for now."""

    def __init__(self, store: PieceStore, pieces: Sequence[int], report: Report) -> None:
        self.manifest = store.manifest
        self.missing = dict.fromkeys(store.missing(pieces))
        self._unasked = dict(self.missing)
        self.come = 0  # bytes
        self._wanted = sum(self.manifest.place(piece).length for piece in self.missing)
        self._asked: dict[int, dict[str, float]] = {}  # of which members, and when
        self._unsaved = 0  # bytes
        self._came_at = self._now()
        self.met_busy = False  # a member would give more later
        self._arrivals: dict[int, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._report = report
        report(0, self._wanted)

    async def next(self, peer: str, held: bytes) -> int | None:
        """The next piece to ask a member for that says that it has these; it counts as asked for.

        When all are asked for, those are asked for once more that are missing still, and again when the members that
        were asked are slow: no member can hold up all. None if the member has nothing that is missing.
        """
        while self._has_any(self.missing, held):
            slow = (each for each, asked in self._asked.items() if peer not in asked and self._is_slow(asked))
            piece = next(self._of(self._unasked, held), None)
            piece = next(self._of(slow, held), None) if piece is None else piece
            if piece is not None:
                self._unasked.pop(piece, None)
                self._asked.setdefault(piece, {})[peer] = self._now()
                return piece
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    self._changed.clear()
                    await self._changed.wait()
        return None

    @staticmethod
    def _of(pieces: Iterable[int], held: bytes) -> Iterator[int]:
        return (piece for piece in pieces if held[piece // 8] >> piece % 8 & 1)

    def _has_any(self, pieces: Iterable[int], held: bytes) -> bool:
        return any(True for _ in self._of(pieces, held))

    def _is_slow(self, asked: Mapping[str, float]) -> bool:
        """Whether one more member may be asked: those that were asked long ago may never answer."""
        return sum(self._now() - at < STALE_SECONDS for at in asked.values()) < MAX_ASKED

    @property
    def seconds_without(self) -> float:
        """How long ago anything came, or was asked for first."""
        return self._now() - self._came_at

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def came(self, piece: int) -> None:
        """A piece is in the store."""
        self._came_at, self.met_busy = self._now(), False
        if self.missing.pop(piece, 0) is None:
            self.come += self.manifest.place(piece).length
            self._report(self.come, self._wanted)
        self._asked.pop(piece, None)
        self._changed.set()
        if event := self._arrivals.pop(piece, None):
            event.set()

    def failed(self, peer: str, piece: int) -> None:
        """A member that was asked for a piece did not give it."""
        self._changed.set()
        others = {each: at for each, at in self._asked.pop(piece, {}).items() if each != peer}
        if others:
            self._asked[piece] = others
        elif piece in self.missing:
            self._unasked[piece] = None

    def is_due_to_be_saved(self, piece: int) -> bool:
        """Whether so much has come with this piece that it should count after a crash."""
        self._unsaved += self.manifest.place(piece).length
        is_due = self._unsaved >= SAVED_BYTES
        if is_due:
            self._unsaved = 0
        return is_due

    async def arrival(self, piece: int) -> None:
        """Wait until a piece is in the store."""
        if piece in self.missing:
            await self._arrivals.setdefault(piece, asyncio.Event()).wait()
