"""The model's blocks as one PyTorch module, which servers compute: call it, slice it, or differentiate through it."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import nn

from shoal.client.active import active_session
from shoal.client.call_inputs import check_inputs, mask_of, on_cpu, positions_of
from shoal.client.config_attributes import ConfigAttributes
from shoal.client.inference_session import InferenceSession, note_opened
from shoal.client.runtime import Hold, Runtime
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.autograd import NoGradient, PassCall, SwarmFunction
from shoal.client.training.pass_plan import PassPlan
from shoal.client.training.remote_passes import RemotePasses
from shoal.errors import UserError
from shoal.model.copying import NotPicklable
from shoal.model.peft.factors import ActiveAdapters
from shoal.model.peft.peft_layers import ClientAdapter, find_adapter, unset_magnitudes
from shoal.model.peft.prompts import PROMPT
from shoal.model.remote_cache import RemoteCache, UnopenedSession
from shoal.spans import Span

DEFAULT_SESSION_LENGTH = 2048
"""The tokens that a session without a `max_length` asks its servers to have room for. It may grow beyond that."""


class RemoteSequential(NotPicklable, nn.Module):
    """The blocks of a span, computed by servers. It slices like a list: `blocks[3:6]`.

    `max_length` is how many tokens a sequence may have. A `skeleton` stands for each block: a module with the block's
    layers and without its weights, for PEFT to put adapters into.
    """

    def __init__(
        self,
        runtime: Runtime,
        swarm: Swarm,
        span: Span,
        *,
        max_length: int,
        passes: RemotePasses | None = None,
        skeletons: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.span = span
        self.max_length = max_length
        self.owner = object()
        """Identifies these blocks as the owner of sessions. A slice is another owner."""
        self.num_prompt_tokens = 0
        """The length of the soft prompt that stands before every sequence. Callers do not count these tokens."""
        self._hosted: Mapping[str, str] = {}
        """Adapters that servers may host already, by the content name of a block's factors."""
        self._adapters: Mapping[str, Any] = {}
        self._measuring = threading.Lock()
        self._attributes: ConfigAttributes | None = None
        self._hold = Hold(runtime)
        self.swarm = swarm
        """What the client knows of the servers. It belongs to the runtime's thread."""
        self.passes = passes or _remote_passes(runtime, swarm)
        """Single passes through the blocks. They belong to the runtime's thread too."""
        self.register_state_dict_pre_hook(_measure_before)
        self.mount(skeletons)

    @property
    def runtime(self) -> Runtime:
        """The runtime of this model. Raises `UserError` once the model is closed."""
        return self._hold.runtime

    def watch(self, attributes: ConfigAttributes) -> None:
        """From now on, apply what the user sets on the model's config before each call."""
        self._attributes = attributes

    def _follow(self) -> None:
        if self._attributes is not None:
            self._attributes.follow()

    def mount(self, skeletons: Sequence[nn.Module]) -> None:
        """Register a skeleton for each block, in order."""
        for block, skeleton in zip(self.span, skeletons, strict=False):
            self.add_module(str(block), skeleton)

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int | slice) -> RemoteSequential:
        """A part of the blocks, counted from the first of this span.

        Raises `UserError` for an empty part, and for a slice with another step than 1.
        """
        blocks = range(self.span.start, self.span.end)[index]
        if isinstance(blocks, int):
            blocks = range(blocks, blocks + 1)
        if blocks.step != 1 or not blocks:
            raise UserError(
                f"blocks cannot be indexed with {index}", hint="a slice has at least one block and the step 1"
            )
        return self._like(Span(blocks.start, blocks.stop), dict(self.named_children()))

    def _like(self, span: Span, skeletons: Mapping[str, nn.Module]) -> RemoteSequential:
        blocks = RemoteSequential(
            self.runtime,
            self.swarm,
            span,
            max_length=self.max_length,
            passes=self.passes,
            skeletons=[skeletons[str(block)] for block in span if str(block) in skeletons],
        )
        blocks._hosted, blocks._measuring = self._hosted, self._measuring
        blocks._hold, blocks._attributes, blocks._adapters = self._hold, self._attributes, self._adapters
        return blocks

    def __iter__(self) -> Iterator[RemoteSequential]:
        return (self[index] for index in range(len(self)))

    def extra_repr(self) -> str:
        return f"{self.span} of {self.swarm.model.name}, in the swarm"

    @torch.compiler.disable(reason="blocks are computed by servers")  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_BTD: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RemoteCache | Literal["active"] | None = "active",
    ) -> torch.Tensor:
        """Hidden states [B, T, D] after the blocks.

        `attention_mask` [B, S] is 0 where a token is padding; `position_ids` are [B, T]. With `past_key_values`, or
        inside the `with` block of a session, the tokens are appended to that session. Otherwise the call is
        differentiable with respect to the hidden states and to what was added to the blocks.

        Raises `UserError` for inputs of another shape, and `SwarmError` if the servers cannot compute it now.
        """
        self._follow()
        if past_key_values == "active":
            session = active_session(self.owner)
            past_key_values = None if session is None else RemoteCache(session)
        if past_key_values is not None and not isinstance(past_key_values.session, UnopenedSession):
            session = cast(InferenceSession, past_key_values.session)
            output = session.step(
                hidden_BTD,
                attention_mask=attention_mask,
                position_ids=position_ids,
                head_call=past_key_values.head_call,
            )
            if not torch.is_grad_enabled():
                return output
            return cast(torch.Tensor, NoGradient.apply(output, *self._parameters_of(self._described())))
        check_inputs(hidden_BTD)
        mask = mask_of(attention_mask, hidden_BTD)
        positions = positions_of(position_ids, hidden_BTD)
        tuned = self._tuned()
        work = PassCall(self.runtime, self.passes, self._plan(tuned, hidden_BTD), tuned, positions, mask)
        output = cast(torch.Tensor, SwarmFunction.apply(hidden_BTD, work, *self._parameters_of(tuned)))
        if past_key_values is not None:  # it begins without a server, which computes these tokens only if others follow
            session = self._session(1, max_length=None, expected_length=1, tuning=work.plan.tuning)
            session.in_call = True
            session.defer(hidden_BTD, positions_BT=positions, mask_BT=mask)
            past_key_values.session = session
        return output

    async def computed(self, hidden_BTD: torch.Tensor, *, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The same without a cache and without gradients, on the CPU, for callers in an event loop of their own.

        It ends when it is cancelled. Raises what `forward` raises.
        """
        check_inputs(hidden_BTD)
        plan = await asyncio.to_thread(self._forward_plan, hidden_BTD)  # it may read and digest large adapters
        positions = positions_of(position_ids, hidden_BTD)
        outputs, _ = await self.runtime.awaited(self.passes.forward(plan, on_cpu(hidden_BTD), positions, None))
        return outputs

    @torch.no_grad()
    def _forward_plan(self, hidden_BTD: torch.Tensor) -> PassPlan:
        self._follow()
        return self._plan(self._tuned(), hidden_BTD)

    @staticmethod
    def _parameters_of(tuned: Sequence[ClientAdapter]) -> list[torch.Tensor]:
        return [parameter for each in tuned for parameter in each.parameters]

    @property
    def is_tuned(self) -> bool:
        """Whether anything is added to these blocks."""
        return self.num_prompt_tokens > 0 or bool(self._described())

    def note_hosted(self, adapter: str) -> None:
        """Record that what is added to these blocks now is the adapter that servers may host by this name."""
        self._hosted = {each.factors().name: adapter for each in self._described()}

    def _tuned(self) -> list[ClientAdapter]:
        """What the caller has added to the blocks, with its present values."""
        self.measure()
        return self._described()

    def _described(self) -> list[ClientAdapter]:
        found = (
            find_adapter(int(name), skeleton, getattr(skeleton, PROMPT, None))
            for name, skeleton in self.named_children()
        )
        return [each for each in found if each is not None]

    def _tuning(self, tuned: Sequence[ClientAdapter]) -> ActiveAdapters:
        found = (each.factors() for each in tuned)
        return ActiveAdapters({each.block: replace(each, hosted=self._hosted.get(each.name)) for each in found})

    def note_adapters(self, configs: Mapping[str, Any]) -> None:
        """Keep the configs of PEFT's adapters, by name. PEFT adds more to the same mapping."""
        self._adapters = configs

    def measure_new(self) -> None:
        """Set the initial magnitudes of new DoRA adapters that are not loaded from a file. Raises `SwarmError`."""
        self.measure([name for name, config in self._adapters.items() if config.inference_mode])

    def measure(self, loaded: Collection[str] = ()) -> None:
        """Set the initial magnitudes of DoRA adapters: the norms of the weights, which the servers hold.

        `loaded` are adapters whose magnitudes come from a file. Raises `SwarmError`.
        """
        for name, skeleton in self.named_children():
            with self._measuring:  # each is set once: changing a parameter in place would break a backward pass
                if new := unset_magnitudes(skeleton, loaded=loaded):
                    sizes = [len(magnitudes) for magnitudes in new.values()]
                    norms = self.runtime.run(self.passes.norms(int(name), list(new), sum(sizes)))
                    with torch.no_grad():
                        for magnitudes, found in zip(new.values(), norms.split(sizes), strict=True):
                            magnitudes.copy_(found)

    def _plan(self, tuned: Sequence[ClientAdapter], hidden_BTD: torch.Tensor) -> PassPlan:
        tuning = self._tuning(tuned)
        trainable = [each.block for each in tuned if any(own.requires_grad for own in each.parameters)]
        frozen = frozenset(each.block for each in tuned).difference(trainable)
        inputs_wanted = hidden_BTD.requires_grad and torch.is_grad_enabled()
        wanted = [self.span.start] * inputs_wanted + trainable * torch.is_grad_enabled()
        return PassPlan(
            self.span,
            tuning,
            inputs_wanted=inputs_wanted,
            wanted_from=min(wanted, default=None),
            frozen=frozen,
            seed=int(torch.randint(1 << 32, ())) << 20 if tuning.has_dropout else None,
        )

    def inference_session(self, *, max_length: int | None = None, batch_size: int = 1) -> InferenceSession:
        """A session on these blocks, for up to `max_length` tokens; use it as a context manager.

        Default: as many tokens as the model allows. The session computes with what is added to the blocks now, even if
        that changes later. Raises `UserError` for a length or a batch beyond the protocol's limits.
        """
        expected = max_length or min(self.max_length, DEFAULT_SESSION_LENGTH)
        return self._session(batch_size, max_length=max_length, expected_length=expected)

    def new_session(self, *, batch_size: int, max_length: int, salt: str | None = None) -> InferenceSession:
        """The session of one call of `generate()`, expected to reach `max_length` tokens. It may grow beyond that.

        It shares prefixes with sessions of the same `salt`, by default the model's.
        """
        session = self._session(batch_size, max_length=None, expected_length=max_length, salt=salt)
        session.in_call = True  # Transformers keeps account of the tokens
        note_opened(session)
        return session

    def active_session(self) -> InferenceSession | None:
        """The session whose `with` block the caller is in, or `None`."""
        return active_session(self.owner)

    def _session(
        self,
        batch_size: int,
        *,
        max_length: int | None,
        expected_length: int,
        tuning: ActiveAdapters | None = None,
        salt: str | None = None,
    ) -> InferenceSession:
        self._follow()
        return InferenceSession(
            self.runtime,
            self.swarm,
            self.span,
            batch_size=batch_size,
            max_length=max_length or self.max_length - self.num_prompt_tokens,
            expected_length=expected_length,
            num_prompt_tokens=self.num_prompt_tokens,
            tuning=self._tuning(self._tuned()) if tuning is None else tuning,
            owner=self.owner,
            salt=salt,
        )

    def close(self) -> None:
        """Leave the swarm, once all copies of the model are closed too. May be called twice."""
        self._hold.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteSequential:
        blocks = self._like(self.span, {name: copy.deepcopy(child, memo) for name, child in self.named_children()})
        blocks._hold, blocks._attributes = self._hold.another(), copy.deepcopy(self._attributes, memo)
        blocks.num_prompt_tokens = self.num_prompt_tokens  # slices have none: the prompt stands before all blocks
        return blocks


def _measure_before(blocks: RemoteSequential, *_: Any) -> None:
    """Set the initial magnitudes of DoRA before the state of the blocks is read, which they are part of."""
    blocks.measure_new()


def _remote_passes(runtime: Runtime, swarm: Swarm) -> RemotePasses:
    """Single passes, until the network is closed."""
    return runtime.run(runtime.resources.enter_async_context(RemotePasses(swarm)))
