"""What a client knows of its servers' honesty: which of them passed audits, and which were found lying."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shoal.host.whole_files import replacing
from shoal.policy.audits.audit_budget import (
    FIRST_AUDIT_TOKENS,
    MOST_FAILED,
    PASS_TOKENS,
    AuditBudget,
    Candidate,
    audits_pass,
    next_audit,
)
from shoal.policy.audits.receipt_verdict import ReceiptVerdict

log = logging.getLogger(__name__)

MAX_EVIDENCE_BYTES = 4096
MAX_LIARS = 4096
"""The most servers whose evidence is read at the start: the folder is not to slow it down."""

Purse = Literal["outputs", "sums"]
"""What pays for an audit: each kind has a budget of its own. An audit of sums costs as much as many passes, and those
would leave nothing for it."""


@dataclass(frozen=True)
class Evidence:
    """Why a server was shut out: what was compared, how far apart it was, and who computed it again.

    `typical` and `largest` are the distances that were found, `allowed_typical` and `allowed_largest` those of honest
    servers. `found_at` is a Unix time. `position` is the first token of the text that is doubtful; 0 for passes without
    a cache. A server that signed something else than it did has no distances and no witnesses, but its `receipt`: JSON
    with what it signed, and the digest of the outputs that the client `got` from it.
    """

    peer: str
    model: str
    blocks: str
    position: int
    num_tokens: int
    found_at: float
    typical: float = 0.0
    largest: float = 0.0
    allowed_typical: float = 0.0
    allowed_largest: float = 0.0
    witnesses: tuple[str, ...] = ()
    receipt: str | None = None

    @property
    def reason(self) -> str:
        """What the server has done, in a few words."""
        if self.receipt is not None:
            return f"for blocks {self.blocks}, it signed that it pushed other outputs than it answered"
        others = ", ".join(self.witnesses)
        return (
            f"outputs of blocks {self.blocks} are {self.typical:.3g} from those of {others} "
            f"(allowed: {self.allowed_typical:.3g})"
        )

    def against(self, witness: str, accused: str) -> Evidence:
        """The same as evidence against a witness, which differs from the `accused` and from a second witness."""
        others = tuple(peer for peer in (accused, *self.witnesses) if peer != witness)
        return replace(self, peer=witness, witnesses=others)


class AuditBook:
    """The audits of all sessions and passes of a model. `folder` keeps the evidence against servers.

    `audit_one` is held by the session or the pass that is audited: one at a time.
    """

    def __init__(self, rate: float, *, rng: random.Random, folder: Path) -> None:
        self.audit_one = asyncio.Lock()
        self.receipts = Counter[ReceiptVerdict]()
        """How many receipts have shown what, those of all servers."""
        self._budgets: dict[Purse, AuditBudget] = {"outputs": AuditBudget(rate), "sums": AuditBudget(rate)}
        self._folder = folder
        self._rng = rng
        self._num_clean = Counter[str]()
        self._num_used = Counter[str]()  # decoded tokens of each server
        self._num_failed = Counter[str]()  # audits of each server in a row whose witnesses failed
        self._due_after: dict[str, int] = {}
        self._liars = _read(folder)

    @property
    def is_on(self) -> bool:
        """Whether servers are audited."""
        return self._budgets["outputs"].rate > 0

    @property
    def liars(self) -> frozenset[str]:
        """The servers that were found lying: no route goes over them."""
        return frozenset(self._liars)

    def is_liar(self, peer: str) -> bool:
        """Whether a server was found lying."""
        return peer in self._liars

    def shut_out(self, evidence: Evidence) -> None:
        """A server lied. It is not used again until its evidence is deleted."""
        log.warning("%s lies, and is not used any more: %s", evidence.peer, evidence.reason)
        self._liars[evidence.peer] = evidence
        _write(self._folder, evidence)

    def record_clean(self, peer: str) -> None:
        """A server passed an audit."""
        self._num_clean[peer] += 1
        self._num_failed.pop(peer, None)

    def record_use(self, peers: Sequence[str], *, num_decoded: int) -> None:
        """Servers have computed `num_decoded` tokens one at a time."""
        for peer in peers:
            self._num_used[peer] += num_decoded

    def record_pass(self, peer: str) -> None:
        """A server is asked for a pass without a cache."""
        self._num_used[peer] += PASS_TOKENS

    def earn(self, num_tokens: float, num_blocks: int, *, by: Purse = "outputs") -> None:
        """`num_tokens` were decoded through `num_blocks`: audits may cost a part of that."""
        self._budgets[by] = self._budgets[by].earned(num_tokens, num_blocks)

    def spend(self, cost: float, *, by: Purse = "outputs") -> None:
        """An audit of this cost begins."""
        self._budgets[by] = self._budgets[by].spent(cost)

    def candidate(self, peer: str, *, num_tokens: int, cost: float) -> Candidate:
        """A server of which `num_tokens` could be audited at this cost."""
        due_after = self._due_after.setdefault(peer, self._rng.randint(1, FIRST_AUDIT_TOKENS))
        return Candidate(num_tokens, cost, self._num_clean[peer], self._num_used[peer] >= due_after)

    def postpone(self, peer: str) -> None:
        """An audit of a server led to nothing. A new server is due again after some more tokens."""
        self._due_after[peer] = self._num_used[peer] + self._rng.randint(1, FIRST_AUDIT_TOKENS)
        self._num_failed.pop(peer, None)

    def record_failed(self, peer: str) -> None:
        """The witnesses of a server have failed. It is still due, for others are asked now, unless that was often."""
        self._num_failed[peer] += 1
        if self._num_failed[peer] == MOST_FAILED:
            self.postpone(peer)

    def any_of(self, number: int) -> int:
        """One of the numbers below this one, which no server can foresee."""
        return self._rng.randrange(number)

    def postpone_long(self, peer: str) -> None:
        """The same after a pass whose audits settle nothing: repeated ones are to cost no more than others."""
        self.postpone(peer)
        self._due_after[peer] += round(PASS_TOKENS / self._budgets["outputs"].rate)

    def audits_pass(self, candidate: Candidate, *, by: Purse = "outputs") -> bool:
        """Whether to audit a pass of a server while it is computed, or a sum of what several have found."""
        return not self.audit_one.locked() and audits_pass(candidate, self._budgets[by], self._rng)

    def choose(self, candidates: Sequence[Candidate]) -> int | None:
        """The index of the server to audit now, if any."""
        return next_audit(candidates, self._budgets["outputs"], self._rng)


def _read(folder: Path) -> dict[str, Evidence]:
    """The evidence in a folder; files that are none are left out, and named in the log."""
    found: dict[str, Evidence] = {}
    with contextlib.suppress(OSError):
        for file in sorted(folder.glob("*.json"))[:MAX_LIARS]:
            try:
                if file.stat().st_size > MAX_EVIDENCE_BYTES:
                    raise ValueError("it is too large")
                fields: dict[str, Any] = json.loads(file.read_text())
                evidence = Evidence(**{**fields, "witnesses": tuple(fields["witnesses"])})
                if file.stem != evidence.peer:
                    raise ValueError("its name is not the peer's")
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                log.warning("%s is no evidence against a server: %s", file, error)
            else:
                found[evidence.peer] = evidence
    return found


def _write(folder: Path, evidence: Evidence) -> None:
    try:
        with replacing(folder / f"{evidence.peer}.json") as draft:
            draft.write_text(json.dumps(asdict(evidence), indent=1))
    except OSError as error:
        log.warning("the evidence against %s cannot be kept: %s", evidence.peer, error)
