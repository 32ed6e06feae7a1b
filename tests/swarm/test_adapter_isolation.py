"""Clients who train and generate on the same servers at the same time: each gets what it would get alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel
from transformers import PreTrainedModel

from shoal.model.remote_cache import RemoteCache
from shoal.policy.batching.engine_limits import Limits
from shoal.server.training.adapter_store import LAYER_BYTES

from .harness import Swarm, swarm_of
from .intruder import num_sessions, num_streams
from .test_adapters import adapted, close

CONFIGS = (
    lambda: LoraConfig(r=3, target_modules="all-linear"),
    lambda: LoraConfig(r=2, use_dora=True, target_modules=["v_proj", "down_proj"]),
    lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
)
SMALL = Limits(activation_bytes=60_000, adapter_bytes=36_000 + 22 * LAYER_BYTES)
"""Room for a few of the graphs of one pass, and for one version of each client's factors: 22 layers in two blocks."""
NONE = Limits(activation_bytes=0)


def factors_of(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@dataclass
class Answered:
    """A forward pass whose gradients nobody has asked for yet, and what they are on one machine."""

    loss: torch.Tensor
    expected: list[torch.Tensor]


@dataclass
class Text:
    """A session, the tokens in it, and the factors that it was opened with."""

    session: Any
    factors: list[torch.Tensor]
    ids: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.long))


class Tenant:
    """A client, and the same on one machine."""

    def __init__(self, swarm: Swarm, whole: PreTrainedModel, number: int) -> None:
        self.model = swarm.model()
        self.ours = adapted(self.model, CONFIGS[number](), seed=number)
        self._theirs = adapted(copy.deepcopy(whole), CONFIGS[number](), seed=number)
        self._answered: list[Answered] = []
        self._text: Text | None = None
        self._generator = torch.Generator().manual_seed(number)

    def forward(self) -> None:
        ids = torch.randint(3, 97, (2, 5), generator=self._generator)
        expected = self._alone(self._now())(input_ids=ids, labels=ids).loss
        found = self.ours(input_ids=ids, labels=ids).loss
        assert close(found, expected)
        gradients = torch.autograd.grad(expected, factors_of(self._theirs))
        self._answered.append(Answered(found, list(gradients)))

    def backward(self) -> None:
        """Of the oldest of all that were answered."""
        if not self._answered:
            self.forward()
        answered = self._answered.pop(0)
        found = torch.autograd.grad(answered.loss, factors_of(self.ours))
        assert all(close(*each) for each in zip(found, answered.expected, strict=True))

    def update(self) -> None:
        """A step of some optimizer."""
        for parameter in factors_of(self.ours):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=self._generator)

    @torch.no_grad()
    def read(self) -> None:
        """More tokens in a session, which keeps the factors with which it began."""
        if self._text is None:
            self._text = Text(self.model.inference_session(max_length=64), self._now())
        text, ids = self._text, torch.randint(3, 97, (1, 3), generator=self._generator)
        text.ids = torch.cat((text.ids, ids), dim=1)
        found = self.ours(input_ids=ids, past_key_values=RemoteCache(text.session), use_cache=True).logits
        assert close(found, self._alone(text.factors)(input_ids=text.ids).logits[:, -3:])
        if text.ids.shape[1] > 50:
            self.end()

    def end(self) -> None:
        if self._text is not None:
            self._text.session.close()
            self._text = None

    def _now(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in factors_of(self.ours)]

    def _alone(self, factors: list[torch.Tensor]) -> PeftModel:
        for parameter, value in zip(factors_of(self._theirs), factors, strict=True):
            parameter.data = value.clone()
        return self._theirs


ACTS = [Tenant.forward, Tenant.forward, Tenant.backward, Tenant.backward, Tenant.update, Tenant.read, Tenant.end]
acts = st.tuples(st.integers(0, 2), st.sampled_from(ACTS)) | st.sampled_from(["s0", "s1"])
"""What one of the clients does; or a server that forgets what it was sent and what it has kept."""


def forgets(swarm: Swarm, name: str) -> None:
    engine = swarm.servers[name].engine
    for peer in swarm.network.peers:
        swarm.call(engine.passes.release, peer)


def check_empty(swarm: Swarm, name: str) -> None:
    """Nothing of any client is left on a server."""
    swarm.settle(lambda: not num_streams(swarm, name))
    engine = swarm.servers[name].engine
    assert engine.adapters.num_bytes == 0
    assert len(engine.passes.activations) == 0
    assert engine.passes.activations.budget.used_bytes == 0
    assert not num_sessions(swarm, name)
    assert engine.cache_tokens_left == engine.cache_tokens


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(story=st.lists(acts, min_size=12, max_size=30), limits=st.sampled_from([Limits(), SMALL, NONE]))
def test_clients_who_train_and_generate_do_not_notice_each_other(
    folder: Path, whole: PreTrainedModel, story: list[Any], limits: Limits
):
    with swarm_of(folder, "0:2", "2:4", limits=limits) as swarm:
        tenants = [Tenant(swarm, whole, number) for number in range(len(CONFIGS))]
        for each in story:
            if isinstance(each, str):
                forgets(swarm, each)
            else:
                number, act = each
                act(tenants[number])
            for server in swarm.servers.values():
                assert server.engine.adapters.num_bytes <= limits.adapter_bytes
        for tenant in tenants:
            tenant.end()
            tenant.model.close()
        for name in swarm.servers:
            check_empty(swarm, name)
