"""A schedule: the servers, the work of the clients, and the failures. Equal schedules go the same way, in virtual time.

Every block keeps a sound server: a new one joins where the last one is about to fail. So everything that clients
compute has to be right, nothing may hang, and no stream and no page may be left over.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.audit_book import AuditBook
from shoal.policy.audits.receipt_verdict import ReceiptVerdict

from ..virtual_time import run
from .bed import PATIENT, Bed
from .failures import NONSENSE, Director, Failure
from .work import WORK

CALM_SECONDS = 400.0
TROUBLE_SECONDS = 400.0
"""How long one failure may delay a client: a server that keeps saying that it works is believed for five minutes."""
CACHE_PAGES = 160


@dataclass(frozen=True)
class Schedule:
    """What is played. Equal schedules go the same way."""

    spans: Sequence[str]
    work: Sequence[str]
    failures: Sequence[Failure] = ()
    seed: int = 0
    cache_pages: int = CACHE_PAGES
    reserves: Sequence[str] = ()
    """The spans of servers that announce less speed, so that clients use them only in place of others."""
    standby: bool = False
    drain_seconds: float = 0.0

    def __str__(self) -> str:
        reserves = f", and reserves of {', '.join(self.reserves)}" if self.reserves else ""
        lines = [
            f"servers of {', '.join(self.spans)}{reserves}, each with {self.cache_pages} pages"
            + (f", that take {self.drain_seconds:g} s to leave" if self.drain_seconds else ""),
            *(
                f"client{number}: {work}{', with standbys' if self.standby else ''}"
                for number, work in enumerate(self.work)
            ),
            *map(str, self.failures),
        ]
        return "\n".join(lines)


def play(schedule: Schedule) -> list[str]:
    """Returns the story. Raises the first error of a client or a server, with the schedule and the story in a note."""
    random.seed(schedule.seed)
    story: list[str] = []
    try:
        run(_play(schedule, story))
    except BaseException as error:
        error.add_note(f"-- the schedule:\n{schedule}\n-- what happened:\n" + "\n".join(story))
        raise
    return story


async def _play(schedule: Schedule, story: list[str]) -> None:
    async with Bed(
        schedule.spans, schedule.reserves, cache_pages=schedule.cache_pages, drain_seconds=schedule.drain_seconds
    ) as bed:
        bed.story = story
        config = replace(PATIENT, standby=schedule.standby)
        Director(bed, schedule.failures)
        async with asyncio.timeout(CALM_SECONDS + TROUBLE_SECONDS * len(schedule.failures)):
            try:
                async with asyncio.TaskGroup() as group:
                    for number, work in enumerate(schedule.work):
                        group.create_task(_work(bed, f"client{number}", work, config))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None


def _check_receipts(audits: AuditBook, bed: Bed) -> None:
    """No receipt of an honest server is wrong, unless the network has changed what it said."""
    assert not audits.liars
    if not any(nonsense in event for nonsense in NONSENSE for event in bed.story):
        assert set(audits.receipts) <= {ReceiptVerdict.AGREES}, audits.receipts


async def _work(bed: Bed, name: str, work: str, config: ClientOptions) -> None:
    client = bed.client(name, config)
    try:
        await WORK[work](client)
        client.check_streams()
        _check_receipts(client.swarm.audits, bed)
    except Exception as error:
        bed.tell(f"{name} fails: {error!r}")
        raise
    finally:
        await client.close()
    bed.tell(f"{name} is done")
