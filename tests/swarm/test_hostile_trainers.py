"""A server may answer uploads and passes with anything: losses and gradients are those of one machine."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from shoal import MissingBlocks
from shoal.net.wire import codec
from shoal.protocol import Adapter, AnyMessage, Backward, Forward

from .harness import Swarm
from .intruder import Raw, raw
from .test_adapters import adapted, close
from .test_hostile_servers import IMPATIENT, Answer, Rogue, failure

TOKENS = torch.tensor([[5, 17, 42, 9, 33]])
NOBODYS = "0123456789abcdef" * 2


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "down_proj"])


class Trainer:
    """Learns what it is sent, computes nothing, and answers backward passes with as many numbers as it should."""

    def __init__(
        self,
        *,
        stores: Callable[[], list[Raw]] = lambda: [raw("adapter_stored")],
        forward: Callable[[torch.Tensor], list[Raw]] = lambda hidden: [raw("pass_result", {"hidden": hidden})],
        backward: Callable[[torch.Tensor, int], list[Raw]] | None = None,
    ) -> None:
        self._stores, self._forward, self._backward = stores, forward, backward
        self._num_factors: dict[int, int] = {}

    def __call__(self, message: AnyMessage, tensors: codec.Tensors) -> list[Raw]:
        match message:
            case Adapter():
                self._num_factors[message.block] = len(tensors["factors"])
                return self._stores()
            case Forward():
                return self._forward(tensors["hidden"])
            case Backward() if self._backward is not None:
                return self._backward(tensors["grad"], sum(self._num_factors.values()))
        return [failure("broken")]


def asks(*names: str, kept: bool = False) -> Callable[..., list[Raw]]:
    return lambda *_: [raw("not_cached", adapters=names, kept=kept)]


ANSWERS: dict[str, tuple[Answer, str]] = {
    "nothing stored, but computed": (
        Trainer(stores=lambda: [raw("pass_result")]),
        "'pass_result', which was not asked for",
    ),
    "learned, three times": (
        Trainer(stores=lambda: [raw("adapter_stored")] * 3),
        "'adapter_stored', which was not asked for",
    ),
    "it has no room": (Trainer(stores=lambda: [failure("misrouted")]), "rogue cannot do this: because"),
    "it offers no training": (Trainer(forward=lambda _: [failure("misrouted")]), "rogue cannot do this: because"),
    "an adapter that it does not know": (
        Trainer(stores=lambda: [raw("not_cached")]),
        "'not_cached', which was not asked for",
    ),
    "it lacks what it was sent, for ever": (Trainer(forward=asks()), "rogue has no room for these adapters"),
    "it misses what no server has": (Trainer(forward=asks(NOBODYS)), "rogue has no room for these adapters"),
    "it lacks inputs that it was just sent": (Trainer(forward=asks(kept=True)), "it lacks what it was just sent"),
    "a name that is none": (Trainer(forward=asks("q_proj")), "rogue is lost: not a valid message"),
    "learned, unasked": (
        Trainer(forward=lambda _: [raw("adapter_stored")]),
        "'adapter_stored', which was not asked for",
    ),
}


def gradients(*, name: str = "factor_grads", **changes: Any) -> Callable[[torch.Tensor, int], list[Raw]]:
    """As many as there are factors, but for some changes."""

    def answer(grad: torch.Tensor, num_factors: int) -> list[Raw]:
        found = torch.ones(num_factors + changes.get("more", 0), dtype=changes.get("dtype", torch.float32))
        return [raw("pass_result", {"grad": grad, name: found.view(changes.get("shape", (-1,)))})]

    return answer


LATE_ANSWERS: dict[str, tuple[Answer, str]] = {
    "no gradients of factors": (
        Trainer(backward=lambda grad, _: [raw("pass_result", {"grad": grad})]),
        "answered something else than was asked",
    ),
    "too few": (Trainer(backward=gradients(more=-1)), "answered something else than was asked"),
    "too many": (Trainer(backward=gradients(more=1)), "answered something else than was asked"),
    "integers": (Trainer(backward=gradients(dtype=torch.int64)), "answered something else than was asked"),
    "in two dimensions": (Trainer(backward=gradients(shape=(2, -1))), "answered something else than was asked"),
    "under another name": (Trainer(backward=gradients(name="hidden")), "answered something else than was asked"),
    "in a sum that it was not asked for": (
        Trainer(backward=lambda grad, _: [raw("pass_result", {"grad": grad}, summed=True)]),
        "answered something else than was asked",
    ),
    "no gradient of the inputs": (
        Trainer(backward=lambda _, num: [raw("pass_result", {"factor_grads": torch.ones(num)})]),
        "answered something else than was asked",
    ),
    "it lacks the adapters, for ever": (Trainer(backward=asks(NOBODYS)), "rogue has no room for these adapters"),
    "it lacks the inputs, for ever": (Trainer(backward=asks(kept=True)), "it lacks what it was just sent"),
}


def step(model: Any, embeds: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    loss = model(inputs_embeds=embeds, labels=TOKENS).loss
    loss.backward()
    return loss, {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize(("answer", "reason"), ANSWERS.values(), ids=ANSWERS.keys())
def test_a_server_that_cannot_compute_an_adapter_is_left(
    swarm: Callable[..., Swarm], whole: PreTrainedModel, caplog: pytest.LogCaptureFixture, answer: Answer, reason: str
):
    honest = swarm("0:4")
    rogue = Rogue(honest, answer)
    caplog.set_level(logging.INFO, logger="shoal.client")
    embeds = whole.get_input_embeddings()(TOKENS).detach()
    loss, found = step(adapted(honest.model(config=IMPATIENT), lora()), embeds)
    right, expected = step(adapted(copy.deepcopy(whole), lora()), embeds)
    assert rogue.asked
    assert close(loss, right)
    assert all(close(found[name], gradient) for name, gradient in expected.items())
    told = [record.getMessage() for record in caplog.records if re.match("rogue ", record.getMessage())]
    assert re.search(reason, told[0])
    assert all(line.isprintable() and len(line) < 500 for line in told)


@pytest.mark.parametrize(("answer", "reason"), LATE_ANSWERS.values(), ids=LATE_ANSWERS.keys())
def test_gradients_of_another_shape_are_computed_by_another_server(
    swarm: Callable[..., Swarm], whole: PreTrainedModel, caplog: pytest.LogCaptureFixture, answer: Answer, reason: str
):
    """The rogue's outputs were believed: it returns its inputs. The gradients that follow are the honest server's."""
    honest = swarm("0:4")
    rogue = Rogue(honest, answer)
    caplog.set_level(logging.INFO, logger="shoal.client")
    model, plain = adapted(honest.model(config=IMPATIENT), lora()), adapted(copy.deepcopy(whole), lora())
    embeds = whole.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
    output = model.base_model.model.blocks(embeds)
    assert torch.equal(output, embeds)
    grad = torch.ones_like(output)
    mine = [each for each in model.parameters() if each.requires_grad]
    found = torch.autograd.grad(output, [embeds, *mine], grad)
    theirs = [each for each in plain.parameters() if each.requires_grad]
    plain.base_model.model.model.norm = torch.nn.Identity()
    expected = torch.autograd.grad(
        plain.base_model.model.model(inputs_embeds=embeds).last_hidden_state, [embeds, *theirs], grad
    )
    assert rogue.asked[-1] == "backward"
    assert all(close(*each) for each in zip(found, expected, strict=True))
    told = [record.getMessage() for record in caplog.records if re.match("rogue ", record.getMessage())]
    assert re.search(reason, told[0])


def test_if_no_server_has_room_for_an_adapter_the_error_says_so(swarm: Callable[..., Swarm]):
    honest = swarm("0:4")
    Rogue(honest, Trainer(forward=asks(NOBODYS)))
    honest.kill("s0")
    with pytest.raises(MissingBlocks, match="rogue has no room for these adapters") as missing:
        step(adapted(honest.model(config=IMPATIENT), lora()), torch.ones(1, 5, 32))
    assert "\n" not in str(missing.value)
