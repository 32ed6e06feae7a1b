"""Looks at the receipts of the servers of a ring, and acts on what they show.

         inputs  ┌────────┐  answered ═ inputs of B   a receipt of A has all three digests
client ─────────▶│   A    │──────────────▶ client
                 └───┬────┘
                     │ pushed                         A says that it pushed something else: A is shut out
                     ▼
                 ┌────────┐  inputs
                 │   B    │                           A says the same, B does not: they are no pair any more
                 └────────┘
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from shoal.client.decoding.receipts.doubt import Doubt
from shoal.client.decoding.receipts.stage_receipts import ReceiptFinding
from shoal.client.decoding.stage import Stage
from shoal.client.swarm.audit_book import Evidence
from shoal.client.swarm.swarm import Swarm
from shoal.net.signing.receipt_signatures import is_signed, statement
from shoal.policy.audits.receipt_verdict import ReceiptVerdict
from shoal.protocol import Receipt

log = logging.getLogger(__name__)


class ReceiptCheck:
    """Compares what servers sign with what the client has sent and got."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._doubts: list[Doubt] = []

    def take_doubts(self) -> list[Doubt]:
        """What receipts have made doubtful since the last call, without the outputs of servers that are shut out."""
        found, self._doubts = self._doubts, []
        return found

    def check(self, stages: Sequence[Stage]) -> None:
        """Look at what has come from the servers of a ring, once their answers have been taken."""
        for upstream, downstream in pairwise(stages):
            downstream.receipts.pushed(upstream.receipts.take_answers(), by=upstream.peer)
        if stages:
            stages[-1].receipts.take_answers()
        for stage in stages:
            session = stage.receipts.session
            if session is not None and stage.connection is not None and stage.receipts.num_waiting:
                check = partial(is_signed, self._swarm.node.transport, session=session, server=stage.peer)
                for finding in stage.receipts.findings(check):
                    self._act_on(finding, stage, session)

    def _act_on(self, finding: ReceiptFinding, stage: Stage, session: str) -> None:
        assert stage.connection is not None
        verdict, receipt = finding.verdict, finding.receipt
        self._swarm.audits.receipts[verdict] += 1
        if verdict.is_fault:
            error = stage.connection.wrong(f"with a receipt that is wrong: {verdict.value}")
            stage.connection.fail(error)
            self._doubt(stage, receipt, str(error))
        elif verdict is ReceiptVerdict.PUSHED_OTHERS:
            self._swarm.audits.shut_out(self._evidence(finding, stage, session))
        elif verdict is ReceiptVerdict.MISLED:
            if any(self._swarm.audits.is_liar(peer) for peer in finding.pushers):
                return  # what follows from its outputs is computed again anyway
            reason = f"{' or '.join((*finding.pushers, stage.peer))} signs something else than it has sent or got"
            log.warning("%s: the client sends all itself", reason)
            self._doubt(stage, receipt, reason)
            for upstream in finding.pushers:
                self._swarm.measurements.broken_pairs.add_for_good(upstream, stage.peer)
        else:
            log.debug("%s has signed tokens %d:%d", stage.peer, receipt.first, receipt.end)

    def _doubt(self, stage: Stage, receipt: Receipt, reason: str) -> None:
        self._doubts.append(Doubt(stage.hop.span, receipt.first, reason))

    def _evidence(self, finding: ReceiptFinding, stage: Stage, session: str) -> Evidence:
        receipt = finding.receipt
        said = statement(receipt, session=session, server=stage.peer, client=self._swarm.node.transport.peer)
        return Evidence(
            peer=stage.peer,
            model=self._swarm.model.name,
            blocks=str(stage.hop.span),
            position=receipt.first,
            num_tokens=receipt.end - receipt.first,
            found_at=time.time(),
            receipt=json.dumps({**said, "signature": receipt.signature, "got": finding.got}),
        )
