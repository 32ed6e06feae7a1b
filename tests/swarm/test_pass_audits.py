"""Servers that lie in passes without a cache are found, and an audited pass is right. In virtual time."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.client.options.client_options import ClientOptions
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan
from shoal.client.training.remote_passes import RemotePasses
from shoal.events import Event, Observers, PassesDoubtful, ServerAudited
from shoal.model.peft.factors import ActiveAdapters
from shoal.policy.audits.audit_budget import AuditLevel
from shoal.spans import Span
from shoal.tensors import TensorName

from .lies import Liars, Lie, noise, shifted
from .schedules.bed import PASS_SECONDS, Bed, Client
from .schedules.oracle import oracle, positions_of
from .schedules.tuning import DROPOUT, SEED, adapters, computed, version
from .virtual_time import run

IDS = torch.randint(3, oracle().vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
FASTEST = 4 / PASS_SECONDS
"""The speed of a server that every route takes, if it holds the blocks."""
MOST_CALLS = 20
"""A lie is found within this many calls at the level "high"."""

Act = Callable[["Training"], Awaitable[None]]


@dataclass
class Training:
    """A client that trains adapters, what it was told, and what it should have found."""

    bed: Bed
    client: Client
    passes: RemotePasses
    liars: Liars
    num_calls: int = 0
    audits: list[ServerAudited] = field(default_factory=list)
    doubts: list[PassesDoubtful] = field(default_factory=list)

    def told(self, event: Event) -> None:
        match event:
            case ServerAudited():
                self.audits.append(event)
            case PassesDoubtful():
                self.doubts.append(event)

    @property
    def blamed(self) -> frozenset[str]:
        return self.client.swarm.audits.liars

    @property
    def findings(self) -> set[tuple[str, str]]:
        return {(each.peer, each.finding) for each in self.audits}

    async def start(self, span: Span, lie: Lie | None = None, *, speed: float = FASTEST, **options: Any) -> str:
        """One more server, by its name. It may lie."""
        name = self.bed.start(span, speed=speed).name
        if lie is not None:
            self.liars.add(name, lie, **options)
        await asyncio.sleep(2.0)  # it is announced and measured
        return name

    async def forward(self) -> tuple[list[list[MicrobatchPiece]], bool]:
        """The pieces of a pass, and whether its outputs are those of one machine."""
        self.num_calls += 1
        assert self.num_calls <= MOST_CALLS
        found, pieces = await self.passes.forward(self._plan, oracle().embed(IDS), positions_of(MASK), _mask())
        return pieces, _close(found[MASK.bool()], _expected()[0][MASK.bool()])

    async def backward(self, pieces: list[list[MicrobatchPiece]]) -> bool:
        """Whether its gradients are those of one machine."""
        found = await self.passes.backward(self._plan, pieces, _grad())
        assert found.inputs_BTD is not None
        _, inputs, factors = _expected()
        return _close(found.inputs_BTD, inputs) and _close(
            torch.cat([found.factors[block].values for block in sorted(found.factors)]), factors
        )

    @property
    def _plan(self) -> PassPlan:
        tuning = version(0, dropout=DROPOUT)
        return PassPlan(self.client.span, tuning, inputs_wanted=True, wanted_from=0, seed=SEED)


def _mask() -> Tensor:
    return MASK.to(torch.uint8)


def _grad() -> Tensor:
    grad = torch.randn(*IDS.shape, oracle().hidden_size, generator=torch.Generator().manual_seed(1))
    return grad * MASK[..., None]


@functools.cache
def _expected() -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, and the gradients of the inputs and of all factors, on one machine."""
    own, inputs_BTD = adapters(0, DROPOUT), oracle().embed(IDS).clone().requires_grad_(True)
    outputs_BTD = computed(inputs_BTD, MASK, own, seed=SEED)
    parameters = [parameter for block in sorted(own) for parameter in own[block].parameters]
    grads, *factors = torch.autograd.grad(outputs_BTD, [inputs_BTD, *parameters], _grad())
    return outputs_BTD.detach(), grads, torch.cat([each.flatten() for each in factors])


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-4 * expected.norm())


def play(act: Act, *spans: str, folder: Path, audits: AuditLevel = "high", seed: int = 0) -> None:
    """Let a client train in a swarm of these spans."""

    async def scene() -> None:
        async with Bed(spans, cache_pages=64, drain_seconds=0.0) as bed:
            liars = Liars(bed.network)
            config = ClientOptions(patience_seconds=60.0, audits=audits, evidence_folder=folder)
            client = bed.client("client", config)
            async with RemotePasses(client.swarm) as passes:
                training = Training(bed, client, passes, liars)
                client.swarm.events = Observers(direct=[training.told])
                await act(training)
            await client.close()

    random.seed(seed)
    run(scene())


def test_honest_passes_are_those_of_one_machine_and_no_server_is_blamed(tmp_path: Path):
    async def act(training: Training) -> None:
        for _ in range(6):
            pieces, is_right = await training.forward()
            assert is_right
            assert await training.backward(pieces)
        assert {finding for _, finding in training.findings} == {"clean"}
        assert len(training.audits) >= 4
        assert max(each.distance for each in training.audits) < 1e-5
        assert not training.doubts
        assert not training.blamed

    play(act, "0:2", "2:4", "0:2", "2:4", folder=tmp_path)


@pytest.mark.parametrize(
    ("lie", "seed"), [(noise(0.05), 0), (shifted, 1), (torch.zeros_like, 2)], ids=["noise", "shifted", "zeros"]
)
@pytest.mark.parametrize(
    ("span", "tensor"), [("0:2", "hidden"), ("2:4", "hidden"), ("2:4", "grad"), ("0:2", "factor_grads")]
)
def test_a_liar_is_found_and_the_audited_pass_is_right_and_the_wrong_ones_before_are_counted(
    tmp_path: Path, span: str, tensor: TensorName, lie: Lie, seed: int
):
    async def act(training: Training) -> None:
        liar = await training.start(Span.parse(span), lie, tensor=tensor)
        num_passes, num_wrong = 0, 0
        while liar not in training.blamed:
            pieces, is_right = await training.forward()
            is_found = liar in training.blamed
            assert is_right == (tensor != "hidden" or is_found)
            num_wrong += not is_right
            if not is_found:
                num_passes += 1
                is_right = await training.backward(pieces)
                is_found = liar in training.blamed
                assert is_right == is_found or tensor == "hidden"
                num_passes += not is_found
                num_wrong += not is_right and tensor != "hidden"  # else it is computed from wrong inputs
        assert training.blamed == {liar}
        assert (liar, "lied") in training.findings
        if num_passes:
            (doubt,) = training.doubts
            assert (doubt.peer, doubt.reason) == (liar, f"{liar} was found lying")
            assert num_wrong <= doubt.num_passes <= num_passes  # those since its last clean audit
        else:
            assert not training.doubts
        pieces, is_right = await training.forward()
        assert is_right
        assert await training.backward(pieces)
        assert all(piece.hop is None or piece.hop.server.peer != liar for each in pieces for piece in each)

    play(act, "0:2", "2:4", "0:2", "2:4", folder=tmp_path, seed=seed)


def test_the_first_audit_of_a_server_that_always_lied_counts_all_passes_before_it(tmp_path: Path):
    async def act(training: Training) -> None:
        liar = await training.start(Span(0, 4), shifted)
        num_passes = 0
        while liar not in training.blamed:
            await training.forward()
            num_passes += 1
        assert [each.num_passes for each in training.doubts] == [num_passes - 1] * (num_passes > 1)
        assert num_passes <= 4

    for seed in range(3):
        folder = tmp_path / str(seed)
        play(act, "0:4", "0:4", folder=folder, seed=seed)


def test_a_gradient_that_a_liar_has_promised_is_asked_of_others_once_it_is_found(tmp_path: Path):
    async def act(training: Training) -> None:
        liar = await training.start(Span(0, 4), shifted)
        while liar not in training.blamed:
            pieces, is_right = await training.forward()
        assert is_right
        assert [piece.hop is not None and piece.hop.server.peer for (piece,) in pieces] == [liar]
        assert await training.backward(pieces)

    play(act, "0:4", "0:4", folder=tmp_path)


def test_a_witness_that_lies_is_found_instead(tmp_path: Path):
    async def act(training: Training) -> None:
        honest = await training.start(Span(0, 4))
        witness = await training.start(Span(0, 4), shifted, speed=FASTEST / 2)  # the best of the others
        while not training.blamed:
            pieces, is_right = await training.forward()
            assert is_right
            assert await training.backward(pieces)
        assert training.blamed == {witness}
        assert (honest, "witness_lied") in training.findings
        assert training.findings <= {(honest, "witness_lied"), (honest, "clean")}  # it lies in forward passes only
        assert not training.doubts

    play(act, "0:4", folder=tmp_path)


def test_witnesses_of_several_hops_compute_gradients_one_after_another(tmp_path: Path):
    async def act(training: Training) -> None:
        liar = await training.start(Span(0, 4), shifted, tensor="grad")
        while liar not in training.blamed:
            pieces, is_right = await training.forward()
            assert is_right
            is_right = await training.backward(pieces)
        assert is_right
        assert training.blamed == {liar}
        assert {len(each.witnesses) for each in training.audits if each.finding == "lied"} == {3}

    play(act, "0:4", "0:2", "2:4", folder=tmp_path)


def test_if_two_servers_differ_and_there_is_no_third_no_one_is_blamed_and_the_user_is_told(tmp_path: Path):
    async def act(training: Training) -> None:
        liar = await training.start(Span(0, 4), shifted)
        num_passes = 0
        while not training.doubts:
            await training.forward()
            num_passes += 1
        assert num_passes <= 4
        (doubt,) = training.doubts
        assert doubt.num_passes == num_passes
        assert doubt.reason == f"{liar} and s0 differ, and no other server decides"
        assert f"up to {num_passes} passes of {liar} may be wrong" in doubt.line
        assert training.findings == {(liar, "unsettled")}
        assert not training.blamed

    play(act, "0:4", folder=tmp_path)


def test_a_witness_that_is_silent_or_dead_costs_no_pass(tmp_path: Path):
    async def act(training: Training) -> None:
        await training.start(Span(0, 4))
        silent = training.bed.members[0]
        for number in range(6):
            pieces, is_right = await training.forward()
            assert is_right
            assert await training.backward(pieces)
            if number == 1:
                silent.executor.thawed.clear()
            if number == 3:
                training.bed.kill(silent)
        assert not training.doubts
        assert not training.blamed

    play(act, "0:4", folder=tmp_path)


def test_passes_without_gradients_are_audited_too(tmp_path: Path):
    async def act(training: Training) -> None:
        liar = await training.start(Span(0, 4), noise(0.05))
        plan, ids = PassPlan(training.client.span, ActiveAdapters()), IDS[1:]
        expected = computed(oracle().embed(ids), MASK[1:], {}, seed=None)
        for _ in range(4):
            found, _ = await training.passes.forward(plan, oracle().embed(ids), None, None)
            if training.blamed:
                break
        assert training.blamed == {liar}
        assert _close(found, expected)

    play(act, "0:4", "0:4", folder=tmp_path)


def test_passes_of_few_tokens_are_not_audited(tmp_path: Path):
    async def act(training: Training) -> None:
        plan = PassPlan(training.client.span, ActiveAdapters())
        for num_tokens, num_audits in ((7, 0), (8, 1)):  # the first four of each sequence do not count
            for _ in range(4):
                await training.passes.forward(plan, oracle().embed(IDS[:2, :num_tokens]), None, None)
            assert len(training.audits) >= num_audits
            assert bool(training.audits) == bool(num_audits)

    play(act, "0:4", "0:4", folder=tmp_path)


def test_audits_that_are_off_ask_no_other_server(tmp_path: Path):
    async def act(training: Training) -> None:
        fastest = await training.start(Span(0, 4))
        for _ in range(6):
            pieces, _ = await training.forward()
            await training.backward(pieces)
        assert {member.name for member in training.bed.members if member.engine.num_passes} == {fastest}
        assert not training.audits

    play(act, "0:4", "0:4", folder=tmp_path, audits="off")
