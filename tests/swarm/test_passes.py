"""Passes of training: which gradients are found and which servers are asked, wherever a route is cut."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from peft import LoraConfig

from shoal.client.training.gradients import Gradients
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan
from shoal.client.training.remote_passes import RemotePasses
from shoal.net.memory import Frame
from shoal.spans import Span

from .harness import Swarm
from .test_adapters import adapted

HIDDEN = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
GRAD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


class AskedPasses:
    """Which passes each server was asked for."""

    def __init__(self, swarm: Swarm) -> None:
        self.passes: list[str] = []
        swarm.network.on_frame = self._note

    def _note(self, frame: Frame) -> Frame:
        kind = json.loads(bytes(frame.header))["kind"]
        if kind in ("forward", "backward"):
            self.passes.append(f"{kind} {frame.receiver}")
        return frame


class Trained:
    """A client whose adapter is frozen in the blocks before `first`."""

    def __init__(self, swarm: Swarm, *, first: int) -> None:
        self._runtime = swarm.runtime
        tuned = adapted(swarm.model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        self.blocks = tuned.base_model.model.blocks
        for block, skeleton in self.blocks.named_children():
            skeleton.requires_grad_(int(block) >= first)
        self.passes: RemotePasses = self.blocks.passes
        # A call makes its plan and runs it at once. The tests run the plan on pieces of their own.
        self.plan: PassPlan = self.blocks._plan(self.blocks._tuned(), HIDDEN)

    @torch.no_grad()
    def pieces(self, row: int, *spans: Span) -> list[MicrobatchPiece]:
        """A microbatch of one sequence as it went through these spans, on servers that are gone."""
        hidden, found = HIDDEN[row : row + 1], []
        for span in spans:
            found.append(MicrobatchPiece(span, hidden, None, None))
            hidden = self.blocks[span.start : span.end](hidden)
        return found

    def gradients(self, *batches: list[MicrobatchPiece]) -> Gradients:
        return self._runtime.run(self.passes.backward(self.plan, batches, GRAD[: len(batches)]))


def test_microbatches_that_are_cut_in_other_places_have_gradients_of_the_same_blocks(swarm: Callable[..., Swarm]):
    client = Trained(swarm("0:4"), first=2)
    one = client.pieces(1, Span(0, 2), Span(2, 4))
    expected = client.gradients(client.pieces(0, Span(0, 2), Span(2, 4)), one).factors
    assert expected.keys() == {2, 3}
    for spans in ([Span(0, 3), Span(3, 4)], [Span(0, 4)], [Span(0, 1), Span(1, 4)]):
        found = client.gradients(client.pieces(0, *spans), one).factors
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[block].values, expected[block].values) for block in expected)


def test_microbatches_are_as_many_as_the_servers_that_train_can_share(swarm: Callable[..., Swarm]):
    net = swarm("0:4")
    for _ in range(7):
        net.start("0:4", training=False)
    model, asked = net.model(), AskedPasses(net)
    model(inputs_embeds=torch.zeros(8, 256, 32))
    assert asked.passes == ["forward s0"] * 2


def test_servers_before_the_first_wanted_block_are_not_asked_for_gradients(swarm: Callable[..., Swarm]):
    net = swarm("0:2", "2:4")
    client = Trained(net, first=2)
    pieces = client.pieces(0, Span(0, 4))
    asked = AskedPasses(net)
    assert client.gradients(pieces).factors.keys() == {2, 3}
    assert sorted(asked.passes) == ["backward s1", "forward s0", "forward s1"]  # a ring is asked all at once
