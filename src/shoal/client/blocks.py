"""The model's blocks as a module, wherever they run: called, sliced, differentiated, or stepped through."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import nn

from shoal.client.active import active_session
from shoal.client.call_inputs import check_inputs, mask_of, positions_of
from shoal.client.inference_session import InferenceSession, note_opened
from shoal.client.options.config_attributes import ConfigAttributes
from shoal.client.runtime import Hold, Runtime
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.autograd import NoGradient, PassCall, SwarmFunction
from shoal.client.training.pass_plan import PassPlan
from shoal.client.training.remote_passes import RemotePasses
from shoal.errors import UserError
from shoal.model.copying import NotPickled
from shoal.model.head import HeadCache, NotBegun
from shoal.model.peft.factors import Tuned, Tuning, tuned_block, unmeasured
from shoal.model.peft.prompts import PROMPT
from shoal.spans import Span

DEFAULT_SESSION_LENGTH = 2048
"""What a session is expected to get long if its user has not said."""


class RemoteSequential(NotPickled, nn.Module):
    """The blocks of a span, served by others. Slices like a list: `blocks[3:6]`."""

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
        """Whose a session is: that of these blocks, and not of those that were cut from them."""
        self.num_prompt_tokens = 0
        """Before the tokens of a sequence come so many that its callers do not count: those of a soft prompt."""
        self._hosted: Mapping[str, str] = {}
        """What servers may host: by the name of a block's factors, the adapter that these belong to."""
        self._adapters: Mapping[str, Any] = {}
        self._measuring = threading.Lock()
        self._attributes: ConfigAttributes | None = None
        self._hold = Hold(runtime)
        self._swarm = swarm
        self._passes = passes or _remote_passes(runtime, swarm)
        self.register_state_dict_pre_hook(_measure_before)
        self.mount(skeletons)

    @property
    def _runtime(self) -> Runtime:
        """Where this model's network lives. Raises `UserError` once the model is closed."""
        return self._hold.runtime

    def watch(self, attributes: ConfigAttributes) -> None:
        """Follow what the user sets on the model's config."""
        self._attributes = attributes

    def _follow(self) -> None:
        if self._attributes is not None:
            self._attributes.follow()

    def mount(self, skeletons: Sequence[nn.Module]) -> None:
        """Let these stand for the blocks, wherever somebody looks for their layers: PEFT puts its own around them."""
        for block, skeleton in zip(self.span, skeletons, strict=False):
            self.add_module(str(block), skeleton)

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int | slice) -> RemoteSequential:
        """Some of the blocks, counted from this span's first. Steps other than 1 are refused."""
        blocks = range(self.span.start, self.span.end)[index]
        if isinstance(blocks, int):
            blocks = range(blocks, blocks + 1)
        if blocks.step != 1 or not blocks:
            raise UserError(f"blocks run in order, and at least one of them: not {index}")
        return self._like(Span(blocks.start, blocks.stop), dict(self.named_children()))

    def _like(self, span: Span, skeletons: Mapping[str, nn.Module]) -> RemoteSequential:
        blocks = RemoteSequential(
            self._runtime,
            self._swarm,
            span,
            max_length=self.max_length,
            passes=self._passes,
            skeletons=[skeletons[str(block)] for block in span if str(block) in skeletons],
        )
        blocks._hosted, blocks._measuring = self._hosted, self._measuring
        blocks._hold, blocks._attributes, blocks._adapters = self._hold, self._attributes, self._adapters
        return blocks

    def __iter__(self) -> Iterator[RemoteSequential]:
        return (self[index] for index in range(len(self)))

    def extra_repr(self) -> str:
        return f"{self.span} of {self._swarm.model.name}, in the swarm"

    @torch.compiler.disable(reason="blocks are computed by servers")  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_BTD: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HeadCache | Literal["active"] | None = "active",
    ) -> torch.Tensor:
        """Hidden states [B, T, D] after the blocks.

        `attention_mask` [B, S] is 0 where a token is padding; `position_ids` are [B, T]. With `past_key_values` the
        tokens are appended to its session, and so they are to the session of these blocks in whose `with` block this
        is called. Without, the call is differentiable with respect to the hidden states.
        """
        self._follow()
        if past_key_values == "active":
            session = active_session(self.owner)
            past_key_values = None if session is None else HeadCache(session)
        if past_key_values is not None and not isinstance(past_key_values.session, NotBegun):
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
        work = PassCall(self._runtime, self._passes, self._plan(tuned, hidden_BTD), tuned, positions, mask)
        output = cast(torch.Tensor, SwarmFunction.apply(hidden_BTD, work, *self._parameters_of(tuned)))
        if past_key_values is not None:  # whoever asks for more has the same numbers computed again, in a session
            session = self._session(1, max_length=None, expected_length=1, tuning=work.plan.tuning)
            session.in_call = True
            session.defer(hidden_BTD, positions_BT=positions, mask_BT=mask)
            past_key_values.session = session
        return output

    @staticmethod
    def _parameters_of(tuned: Sequence[Tuned]) -> list[torch.Tensor]:
        return [parameter for each in tuned for parameter in each.parameters]

    def note_hosted(self, adapter: str) -> None:
        """What these blocks have now, and nothing that becomes of it, is the adapter that servers host by this name."""
        self._hosted = {each.factors().name: adapter for each in self._described()}

    def _tuned(self) -> list[Tuned]:
        """What the caller has added to the blocks, as it is now."""
        self.measure()
        return self._described()

    def _described(self) -> list[Tuned]:
        found = (
            tuned_block(int(name), skeleton, getattr(skeleton, PROMPT, None))
            for name, skeleton in self.named_children()
        )
        return [each for each in found if each is not None]

    def _tuning(self, tuned: Sequence[Tuned]) -> Tuning:
        found = (each.factors() for each in tuned)
        return Tuning({each.block: replace(each, hosted=self._hosted.get(each.name)) for each in found})

    def note_adapters(self, configs: Mapping[str, Any]) -> None:
        """PEFT has added these adapters, and may add more to the same mapping."""
        self._adapters = configs

    def measure_new(self) -> None:
        """Find the magnitudes of adapters that are not about to be loaded. Raises `SwarmError`s."""
        self.measure([name for name, config in self._adapters.items() if config.inference_mode])

    def measure(self, loaded: Collection[str] = ()) -> None:
        """Find the magnitudes with which DoRA begins: those of the weights, which servers hold."""
        for name, skeleton in self.named_children():
            with self._measuring:  # whoever waited finds them measured: a parameter that changes ends others' gradients
                if new := unmeasured(skeleton, loaded=loaded):
                    sizes = [len(magnitudes) for magnitudes in new.values()]
                    norms = self._runtime.run(self._passes.norms(int(name), list(new), sum(sizes)))
                    with torch.no_grad():
                        for magnitudes, found in zip(new.values(), norms.split(sizes), strict=True):
                            magnitudes.copy_(found)

    def _plan(self, tuned: Sequence[Tuned], hidden_BTD: torch.Tensor) -> PassPlan:
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
            seed=int(torch.randint(1 << 32, ())) << 20 if tuning.drops else None,
        )

    def inference_session(self, *, max_length: int | None = None, batch_size: int = 1) -> InferenceSession:
        """A session on these blocks, for up to `max_length` tokens; use it as a context manager.

        Without a `max_length`, the model sets the limit. What has been added to the blocks stays, in this session, as
        it is now.
        """
        expected = max_length or min(self.max_length, DEFAULT_SESSION_LENGTH)
        return self._session(batch_size, max_length=max_length, expected_length=expected)

    def new_session(self, *, batch_size: int, max_length: int) -> InferenceSession:
        """The session of one `generate()`, which expects `max_length` tokens; others that use it may go on."""
        session = self._session(batch_size, max_length=None, expected_length=max_length)
        session.in_call = True  # who has opened it knows its tokens
        note_opened(session)
        return session

    def active_session(self) -> InferenceSession | None:
        """That in whose `with` block this is called."""
        return active_session(self.owner)

    def _session(
        self, batch_size: int, *, max_length: int | None, expected_length: int, tuning: Tuning | None = None
    ) -> InferenceSession:
        self._follow()
        return InferenceSession(
            self._runtime,
            self._swarm,
            self.span,
            batch_size=batch_size,
            max_length=max_length or self.max_length - self.num_prompt_tokens,
            expected_length=expected_length,
            num_prompt_tokens=self.num_prompt_tokens,
            tuning=self._tuning(self._tuned()) if tuning is None else tuning,
            owner=self.owner,
        )

    def close(self) -> None:
        """Leave the swarm, with all that belongs to this model, once its copies do too. May be called twice."""
        self._hold.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteSequential:
        blocks = self._like(self.span, {name: copy.deepcopy(child, memo) for name, child in self.named_children()})
        blocks._hold, blocks._attributes = self._hold.another(), copy.deepcopy(self._attributes, memo)
        blocks.num_prompt_tokens = self.num_prompt_tokens  # slices have none: the prompt stands before all blocks
        return blocks


def _measure_before(blocks: RemoteSequential, *_: Any) -> None:
    """Before the state of the blocks is read: what DoRA begins with is a part of it."""
    blocks.measure_new()


def _remote_passes(runtime: Runtime, swarm: Swarm) -> RemotePasses:
    """Single passes, until the network is closed."""
    passes = RemotePasses(swarm)
    runtime.resources.push_async_callback(passes.close)
    return passes
