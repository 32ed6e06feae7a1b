"""The work of clients while servers come and go. Results are compared with the model in one piece."""

# B sequences, T new tokens, S all tokens, D hidden size, V vocabulary

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import torch
from torch import Tensor

from shoal.client.decoding.session import Session
from shoal.client.decoding.session_inputs import StepInputs
from shoal.client.training.pass_plan import PassPlan
from shoal.client.training.remote_passes import RemotePasses
from shoal.model.peft.factors import ActiveAdapters

from ..parity import assert_equal
from .bed import Client
from .oracle import loss, oracle, positions_of
from .tuning import tuned, tuning


class Reading:
    """A session, the tokens that it has read, and which of them are padding."""

    def __init__(self, client: Client, session: Session, batch_size: int) -> None:
        self._client = client
        self._session = session
        self._ids_BS = torch.zeros(batch_size, 0, dtype=torch.long)
        self._mask_BS = self._ids_BS
        self._ahead: list[tuple[Tensor, StepInputs]] = []

    @property
    def num_tokens(self) -> int:
        return self._ids_BS.shape[1]

    @torch.no_grad()
    async def read(self, ids_BT: Tensor, mask_BT: Tensor | None = None, *, ahead: Sequence[Tensor] = ()) -> Tensor:
        """Read more tokens; returns the likeliest next token, [B, 1]. Those `ahead` may be read next."""
        position, num_new = self.num_tokens, ids_BT.shape[1]
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        self._ids_BS = torch.cat((self._ids_BS, ids_BT), dim=1)
        self._mask_BS = torch.cat((self._mask_BS, mask_BT), dim=1)
        padded = not self._mask_BS.all()
        known = {id(ids): step for ids, step in self._ahead}
        self._ahead = [(ids, known.get(id(ids)) or self._inputs_of(ids)) for ids in ahead]
        outputs_BTD = await self._session.step(
            known[id(ids_BT)].hidden_BTD if id(ids_BT) in known else self._client.whole.embed(ids_BT),
            position,
            positions_of(self._mask_BS)[:, -num_new:] if padded else None,
            mask_BT.to(torch.uint8) if padded else None,
            ahead=[step for _, step in self._ahead],
        )
        assert isinstance(outputs_BTD, Tensor)
        logits_BTV = self._client.whole.head(outputs_BTD)
        expected_BTV = self._client.whole.logits(self._ids_BS, self._mask_BS)[:, -num_new:]
        assert_equal(logits_BTV[mask_BT.bool()], expected_BTV[mask_BT.bool()])
        likeliest, right = logits_BTV[:, -1:].argmax(dim=-1), expected_BTV[:, -1:].argmax(dim=-1)
        assert likeliest.tolist() == right.tolist()
        return likeliest

    def _inputs_of(self, ids_BT: Tensor) -> StepInputs:
        return StepInputs(self._client.whole.embed(ids_BT), None)

    async def say(self, first_B1: Tensor, num_tokens: int) -> Tensor:
        """Read a token and then the likeliest ones, `num_tokens` in all; returns the likeliest next token."""
        self._client.enters("decode")
        for _ in range(num_tokens):
            first_B1 = await self.read(first_B1)
        return first_B1

    def crop(self, num_tokens: int) -> None:
        self._session.crop(num_tokens)
        self._ids_BS, self._mask_BS = self._ids_BS[:, :num_tokens], self._mask_BS[:, :num_tokens]

    def select_rows(self, rows: Sequence[int]) -> None:
        self._session.select_rows(rows)
        self._ids_BS, self._mask_BS = self._ids_BS[list(rows)], self._mask_BS[list(rows)]


@contextlib.asynccontextmanager
async def reading(client: Client, *, batch_size: int = 1, max_length: int = 48) -> AsyncIterator[Reading]:
    """A session that begins with a prompt, and is closed at the end."""
    session = Session(client.swarm, client.span, batch_size=batch_size, max_length=max_length)
    client.enters("prefill")
    try:
        yield Reading(client, session, batch_size)
    finally:
        client.enters("close")
        await session.close()


def prompt(batch_size: int, num_tokens: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, oracle().vocabulary, (batch_size, num_tokens), generator=generator)


PADDED = torch.tensor([[0, 0, 5, 17, 42], [7, 8, 9, 10, 11]])
MASK = (PADDED != 0).long()


async def short(client: Client) -> None:
    """A few tokens after a short prompt."""
    async with reading(client) as text:
        await text.say(await text.read(prompt(1, 5)), 6)


async def paged(client: Client) -> None:
    """A prompt whose first pages have names, and then tokens beyond the next page."""
    async with reading(client, max_length=64) as text:
        await text.say(await text.read(prompt(1, 37)), 14)


async def long(client: Client) -> None:
    """A prompt that takes more than one message."""
    async with reading(client, batch_size=4, max_length=320) as text:
        await text.say(await text.read(prompt(4, 300)), 3)


async def padded(client: Client) -> None:
    """Two prompts of different lengths."""
    async with reading(client, batch_size=2) as text:
        await text.say(await text.read(PADDED, MASK), 5)


async def beams(client: Client) -> None:
    """Three sequences that continue each other, and are cropped in the arrangement that they have then."""
    async with reading(client) as text:
        await text.read(prompt(1, 18))
        client.enters("decode")
        text.select_rows([0, 0, 0])
        for step, rows in enumerate(([0, 0, 1], [2, 1, 0], [1, 1, 1], [0, 2, 2], [2, 0, 1])):
            await text.read(prompt(3, 1, seed=step))
            text.select_rows(rows)
        text.select_rows([0, 1, 1])
        text.crop(text.num_tokens - 1)
        for step in range(3):
            await text.read(prompt(3, 2, seed=step + 5))
        text.select_rows([2, 1])
        await text.read(prompt(2, 1, seed=9))


async def guesses(client: Client) -> None:
    """Several tokens at once, some of which are taken back."""
    async with reading(client) as text:
        await text.read(prompt(1, 14))
        client.enters("decode")
        for step, num_kept in enumerate((2, 0, 4, 1, 3)):
            before = text.num_tokens
            await text.read(prompt(1, 4, seed=step))
            text.crop(before + num_kept)
        text.crop(3)
        await text.read(prompt(1, 5, seed=9))


async def rounds(client: Client) -> None:
    """Several steps under way at once. Some of them turn out to be wrong, and are taken back."""
    async with reading(client, max_length=80) as text:  # two rows of it fit into the tightest cache
        await text.read(prompt(1, 14))
        client.enters("decode")
        steps = [prompt(1, 1 + index % 4, seed=index) for index in range(24)]
        for index in range(5):
            await text.read(steps[index], ahead=steps[index + 1 : index + 4])
        text.crop(text.num_tokens - 1)  # the last token of a step is wrong, and so is all behind it
        await text.read(steps[8], ahead=steps[9:12])
        await text.read(steps[9], ahead=steps[10:12])
        await text.read(steps[12], ahead=steps[13:15])  # behind a right one, another step than was thought
        await text.read(steps[13], ahead=[steps[14]])
        await text.read(steps[14])
        await text.read(steps[15], ahead=steps[16:19])
        text.select_rows([0, 0])
        await text.read(prompt(2, 2, seed=30))
        text.crop(5)
        await text.read(prompt(2, 3, seed=31))


async def turns(client: Client) -> None:
    """An answer, a long pause, and another answer in the same session."""
    async with reading(client) as text:
        await text.say(await text.read(prompt(1, 5)), 3)
        client.enters("idle")
        await asyncio.sleep(30)
        client.enters("prefill")
        await text.say(await text.read(prompt(1, 4, seed=1)), 3)


async def training(client: Client) -> None:
    """A forward and a backward pass, twice."""
    for _ in range(2):
        await _gradient(client, PADDED, MASK)


async def microbatches(client: Client) -> None:
    """A batch that goes through the swarm in two parts."""
    ids = prompt(3, 350)
    await _gradient(client, ids, torch.ones_like(ids))


async def _gradient(client: Client, ids_BS: Tensor, mask_BS: Tensor) -> None:
    client.enters("forward")
    async with RemotePasses(client.swarm) as passes:
        await _pass(client, passes, ids_BS, mask_BS)


async def _pass(client: Client, passes: RemotePasses, ids_BS: Tensor, mask_BS: Tensor) -> None:
    is_padded = not mask_BS.all()
    plan = PassPlan(client.span, ActiveAdapters(), inputs_wanted=True, wanted_from=client.span.start)
    output_BSD, pieces = await passes.forward(
        plan,
        oracle().embed(ids_BS),
        positions_of(mask_BS) if is_padded else None,
        mask_BS.to(torch.uint8) if is_padded else None,
    )
    output_BSD.requires_grad_(True)
    logits_BSV = oracle().head(output_BSD)
    assert_equal(logits_BSV[mask_BS.bool()], oracle().logits(ids_BS, mask_BS)[mask_BS.bool()])
    (grad_BSD,) = torch.autograd.grad(loss(logits_BSV, mask_BS), output_BSD)
    client.enters("backward")
    assert_equal((await passes.backward(plan, pieces, grad_BSD)).inputs_BTD, oracle().gradient(ids_BS, mask_BS))


WORK: Mapping[str, Callable[[Client], Awaitable[None]]] = {
    work.__name__: work
    for work in (short, paged, padded, beams, guesses, rounds, turns, training, tuned, tuning, long, microbatches)
}
"""By name; the quicker and simpler first."""
SLOW = frozenset({"long", "microbatches"})
