"""What an audit finds: a server is compared with a witness and, if they differ, with a second one."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from shoal.client.swarm.audit_book import Evidence
from shoal.peers import ServerInfo
from shoal.policy.audits.likeness import Allowed, Form, allowed_among, are_alike, form_of, typical
from shoal.policy.audits.verdict import Verdict, verdict
from shoal.spans import Span
from shoal.tensors import Encoding

T = TypeVar("T")


@dataclass(frozen=True)
class Testimony(Generic[T]):
    """What servers have computed, one after another. `peers` and `forms` are theirs, in order."""

    answer: T
    peers: tuple[str, ...]
    forms: tuple[Form, ...]

    @classmethod
    def of(cls, answer: T, servers: Iterable[ServerInfo]) -> Testimony[T]:
        """What these servers have computed."""
        known = tuple(servers)
        return cls(answer, tuple(each.peer for each in known), tuple(form_of(each) for each in known))


@dataclass(frozen=True)
class Findings:
    """What an audit found: the distances of what is audited from what the first of the `witnesses` computed.

    `accuser` is the only server of the first testimony, and `None` if that came from several.
    """

    verdict: Verdict
    distances: tuple[float, ...]
    allowed: Allowed
    witnesses: tuple[str, ...]
    accuser: str | None

    def evidence(
        self, peer: str, model: str, span: Span, *, position: int, num_tokens: int, found_at: float
    ) -> Evidence:
        """The findings as evidence against a server, for the blocks of `span`."""
        return Evidence(
            peer=peer,
            model=model,
            blocks=str(span),
            position=position,
            num_tokens=num_tokens,
            typical=typical(self.distances),
            largest=max(self.distances),
            allowed_typical=self.allowed.typical,
            allowed_largest=self.allowed.largest,
            witnesses=self.witnesses,
            found_at=found_at,
        )


def allowed_between(ones: Sequence[Form], others: Sequence[Form], *, encoding: Encoding) -> Allowed:
    """How far apart the outputs of two honest routes are at most; `encoding` is the smallest on their way."""
    return functools.reduce(Allowed.either, [allowed_among(form, others, encoding=encoding) for form in ones])


async def compare(
    claimed: Testimony[T],
    first: Testimony[T],
    second: Callable[[], Awaitable[Testimony[T] | None]],
    *,
    apart: Callable[[T, T], list[float]],
    allowed: Callable[[Sequence[Form], Sequence[Form]], Allowed],
) -> Findings:
    """Compare what a server claims with a first testimony and, if they differ, with a `second` one, if there is one.

    `apart` are the distances of two answers, `allowed` is how far apart those of honest servers of these forms are.
    """
    found, limit = apart(claimed.answer, first.answer), allowed(claimed.forms, first.forms)
    witnesses, result = first.peers, verdict(like_witness=are_alike(found, limit))
    if result is not Verdict.CLEAN and (other := await second()) is not None:
        witnesses = (*first.peers, *other.peers)
        result = verdict(
            like_witness=False,
            like_second=are_alike(apart(claimed.answer, other.answer), allowed(claimed.forms, other.forms)),
            witnesses_alike=are_alike(apart(other.answer, first.answer), allowed(first.forms, other.forms)),
        )
    accuser = first.peers[0] if len(first.peers) == 1 else None
    return Findings(result, tuple(found), limit, witnesses, accuser)
