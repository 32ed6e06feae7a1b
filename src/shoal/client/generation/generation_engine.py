"""One task for all generations of a model: it sends steps, and takes what comes back to the next ones.

    a generation begins ──▶ embed its prompt ──────────┐
                                                        ▼
        ┌──────────────────── its session takes a step (servers compute it with those of others)
        ▼
    outputs are here: with those of all others that are, one call of norm and head, a token for each, one call of the
    embeddings, and the next steps, which may carry guesses (`shoal.client.generation.speculation`)

Tensors are touched on one thread of the engine, and the event loop stays free for the streams to the servers. What one
generation does wrong, or whose servers are lost, is its own affair: the others do not wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from shoal.client.continuation import Continuation
from shoal.client.decoding.session_inputs import StepInputs
from shoal.client.generation.generation import Generation, Token, rounds_of_all
from shoal.client.generation.model_ends import Embedded, ModelEnds
from shoal.client.generation.next_token import choose_tokens
from shoal.client.generation.speculating import NO_GUESSES, Guesses
from shoal.client.generation.token_stream import Mailbox, TokenStream
from shoal.client.head.logits import Logits, LogitsRequest
from shoal.client.runtime import Runtime
from shoal.concurrency import owned_task
from shoal.errors import UserError

COMPANY_SECONDS = 0.002
"""How long outputs wait for those of others. The head takes nearly as long for one row as for many."""


@dataclass(frozen=True, eq=False)
class _Round:
    """A step: what it guesses, what it sends, and what it asks a server's head for. `was_ahead` says when it was sent:
    before the one before it was judged."""

    guesses: Guesses
    sends: StepInputs
    logits_request: LogitsRequest | None
    was_ahead: bool = False


@dataclass(eq=False)
class _Running:
    """A generation, its caller's mailbox, the task of its present step, and what that returned.

    Of its `rounds`, the first is the present step, and the others are ahead.
    `turn` is what the engine's thread does for it, or did last.
    """

    generation: Generation
    mailbox: Mailbox
    step: asyncio.Task[None] | None = None
    turn: asyncio.Future[Any] | None = None
    rounds: tuple[_Round, ...] = ()
    sent_at: float | None = None
    answer: Tensor | Logits | None = None

    @property
    def guesses(self) -> Guesses:
        """Those of the present step."""
        return self.rounds[0].guesses if self.rounds else NO_GUESSES


@dataclass(frozen=True)
class _Next:
    """What the engine's thread has found for a generation: its newest tokens, and the rounds that are under way now.

    An `error` has kept it from more tokens. `goes_on` says that the rounds which were ahead count.
    """

    tokens: tuple[Token, ...] = ()
    error: Exception | None = None
    rounds: tuple[_Round, ...] = ()
    goes_on: bool = False

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.error is not None or (bool(self.tokens) and self.tokens[-1].finish_reason is not None)


class GenerationEngine:
    """The generations of one model. It is a context on the event loop of the model's runtime.

    When the context is left, all generations end with an error. Any thread may call `stream`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._ends: ModelEnds | None = None
        self._running: dict[Mailbox, _Running] = {}
        self._ready: list[_Running] = []
        self._news = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shoal-generate")
        self._stack = AsyncExitStack()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model gets an engine of its own, when it first needs one."""

    async def __aenter__(self) -> Self:
        self._stack.callback(self._thread.shutdown, wait=False, cancel_futures=True)
        self._stack.callback(self._end_all, UserError("the model was closed while it was in use"))
        await self._stack.enter_async_context(owned_task(self._serve()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def num_running(self) -> int:
        """How many generations have not ended."""
        return len(self._running)

    def stream(self, generation: Generation) -> TokenStream:
        """Begin to generate. Raises `UserError` when the model is closed."""
        mailbox = Mailbox()
        self._runtime.run(self._begin(generation, mailbox))
        cancel = partial(self._cancel, mailbox)
        return TokenStream(mailbox, self._runtime, generation.session, cancel, generation.speculation)

    async def _begin(self, generation: Generation, mailbox: Mailbox) -> None:
        running = self._running[mailbox] = _Running(generation, mailbox)
        self._ready.append(running)
        self._news.set()

    async def _cancel(self, mailbox: Mailbox) -> None:
        """Stop a generation, if it has not ended. Its session ends at once; one of the caller's can be used again.

        Waits until neither the loop nor the engine's thread does anything for it any more.
        """
        if (running := self._running.get(mailbox)) is not None:
            self._end(running, None)
            if present := [each for each in (running.step, running.turn) if each is not None]:
                await asyncio.wait(present)

    # -- the loop ------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            try:
                await self._gather()
                await self._take_turn()
            except Exception as error:  # a mistake of the engine's own: its callers hear of it, and others may begin
                self._ready.clear()
                self._end_all(error)

    async def _take_turn(self) -> None:
        """The next tokens of all whose outputs are here. Nothing of them, such as their model, is kept afterwards."""
        ready, self._ready = [each for each in self._ready if each.mailbox in self._running], []
        if not ready:
            return
        turn = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, ready)
        for running in ready:
            running.turn = turn
        try:
            found = await turn
        except Exception as error:  # one of many is not known to be at fault: all of these end
            for running in ready:
                self._end(running, error)
            return
        for running, each in zip(ready, found, strict=True):
            if running.mailbox not in self._running:  # it was cancelled meanwhile
                continue
            try:
                self._continue(running, each)
            except Exception as error:
                self._end(running, error)

    async def _gather(self) -> None:
        """Wait for outputs, and a moment longer for those of others that are on their way."""
        loop = asyncio.get_running_loop()
        while not self._ready:
            if (reading := self._behind()) is not None:
                await self._read_piece(reading)
                continue
            self._news.clear()
            await self._news.wait()
        deadline = loop.time() + COMPANY_SECONDS
        while len(self._ready) < len(self._running):
            self._news.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
            except TimeoutError:
                return

    def _behind(self) -> _Running | None:
        """One whose drafter has to read more before it guesses. It does so while all wait for servers."""
        for running in list(self._running.values()):
            try:
                if (speculation := running.generation.speculation) is not None and speculation.is_behind:
                    return running
            except Exception as error:  # what a drafter does wrong is the affair of its text
                self._end(running, error)
        return None

    async def _read_piece(self, running: _Running) -> None:
        if (speculation := running.generation.speculation) is not None:
            running.turn = asyncio.get_running_loop().run_in_executor(self._thread, speculation.read_piece)
            try:
                await running.turn
            except Exception as error:
                self._end(running, error)

    def _compute(self, ready: Sequence[_Running]) -> list[_Next]:
        """On the engine's thread: tokens for those whose outputs are here, and what all of them send next."""
        model = ready[0].generation.model
        if self._ends is None:
            self._ends = ModelEnds(model)
        found: dict[_Running, _Next] = {each: _Next() for each in ready}
        answered = [each for each in ready if each.answer is not None]
        if answered:
            answers = [(each.answer, 1 + len(each.guesses.tokens)) for each in answered if each.answer is not None]
            logits = self._ends.logits(model, answers)
            found.update(_chosen(dict(zip(answered, logits, strict=True))))
        for running in answered:
            found[running] = self._with_states(model, running, found[running])
        found, plans = _with_guesses(found, most=self._ends.most_logits(model) - 1)
        texts = [text for each, plan in plans.items() for text in _texts(each.generation, plan, found[each].rounds)]
        embedded = iter(self._ends.embed(model, texts))
        for running, plan in plans.items():
            known = found[running].rounds
            new = [
                self._round(model, next(embedded), guesses, is_ahead=index > 0)
                for index, guesses in enumerate(plan)
                if index >= len(known)
            ]
            found[running] = replace(found[running], rounds=(*known, *new))
        return list(found.values())

    def _with_states(self, model: Any, running: _Running, found: _Next) -> _Next:
        """Show drafters the hidden states behind its newest tokens. Where one fails, its text ends."""
        speculation, answer = running.generation.speculation, running.answer
        if found.is_last or speculation is None or not speculation.reads_states or not isinstance(answer, Tensor):
            return found
        assert self._ends is not None
        num_wrong = 1 + len(running.guesses.tokens) - len(found.tokens)
        try:
            speculation.read_states(self._ends.hidden_states(model, answer[0, : answer.shape[1] - num_wrong]))
        except Exception as error:
            return replace(found, error=error)
        return found

    def _round(self, model: Any, sends: Embedded, guesses: Guesses, *, is_ahead: bool) -> _Round:
        assert self._ends is not None
        num_tokens = len(guesses.tokens) + (not is_ahead)
        request = self._ends.logits_request(model, sends.hidden_1TD, num_tokens=num_tokens)
        return _Round(guesses, StepInputs(sends.hidden_1TD, sends.positions_1T), request, is_ahead)

    def _continue(self, running: _Running, found: _Next) -> None:
        """Deliver the tokens, and take the next step or end."""
        generation = running.generation
        if running.answer is not None and not found.goes_on:
            generation.forget_guesses()
        if found.is_last and found.error is None:
            generation.finish(generation.ids_1S)
        for token in found.tokens:
            running.mailbox.put(token)
        if not found.rounds or found.error is not None or running.mailbox.reader_is_gone:
            self._end(running, found.error)
            return
        now = asyncio.get_running_loop().time()
        if generation.speculation is not None and running.sent_at is not None:
            was_ahead = running.rounds[0].was_ahead
            generation.speculation.timed(running.guesses, len(found.tokens), now - running.sent_at, was_ahead=was_ahead)
        running.sent_at = now if found.tokens else None  # how long a prompt takes says nothing of later steps
        running.rounds, running.answer = found.rounds, None
        running.step = asyncio.create_task(self._step(running, *found.rounds))

    async def _step(self, running: _Running, present: _Round, *ahead: _Round) -> None:
        session = running.generation.session
        try:
            running.answer = await session.step_on_loop(
                present.sends.hidden_BTD,
                position_ids=present.sends.positions_BT,
                logits_request=present.logits_request,
                ahead=[each.sends for each in ahead],
            )
        except Exception as error:
            running.step = None
            self._end(running, error)
        else:
            self._ready.append(running)
            self._news.set()

    def _end(self, running: _Running, error: BaseException | None) -> None:
        """The generation is over: by itself, because it was cancelled, or with an error."""
        if self._running.pop(running.mailbox, None) is None:
            return
        if running.step is not None:
            running.step.cancel()
        session = running.generation.session
        if not running.generation.keeps_session:
            session.abandon()
        elif session.in_call:
            Continuation.abandon(session)
        running.mailbox.put(error)

    def _end_all(self, error: Exception) -> None:
        for running in list(self._running.values()):
            self._end(running, error)


def _chosen(logits: Mapping[_Running, Tensor]) -> dict[_Running, _Next]:
    """The tokens that follow, by the logits [N, V] of each: behind the first, as long as the guesses are right."""
    tokens: dict[_Running, list[Token]] = {each: [] for each in logits}
    failed: dict[_Running, Exception] = {}
    going_on, index = list(logits), 0
    while going_on:
        rows_RV = torch.stack([logits[each][index] for each in going_on])
        chosen = choose_tokens([each.generation for each in going_on], rows_RV)
        right = []
        for running, token in zip(going_on, chosen, strict=True):
            if isinstance(token, Exception):
                failed[running] = token
                continue
            appended = _appended(running.generation, token)
            tokens[running].append(appended)
            is_right = running.guesses.tokens[index : index + 1] == (token.id,)
            if is_right and appended.finish_reason is None:
                right.append(running)
        going_on, index = right, index + 1
    ahead = {each: _still_ahead(each, its) for each, its in tokens.items()}
    return {each: _Next(tuple(its), failed.get(each), ahead[each], bool(ahead[each])) for each, its in tokens.items()}


def _still_ahead(running: _Running, tokens: Sequence[Token]) -> tuple[_Round, ...]:
    """The rounds that count, now that the present one has given these tokens: all that are ahead, or none."""
    ahead, speculation = running.rounds[1:], running.generation.speculation
    if speculation is not None:
        ids, guesses = [token.id for token in tokens], [each.guesses for each in ahead]
        if speculation.judged(running.guesses, ids, ahead=guesses) and tokens[-1].finish_reason is None:
            return (replace(ahead[0], guesses=ahead[0].guesses.reached()), *ahead[1:])
    return ()


def _appended(generation: Generation, token: Token) -> Token:
    """The generation with one more token, which may be its last."""
    generation.append(token.id)
    reason = generation.finish_reason()
    return token if reason is None else token.ending(reason)


def _with_guesses(
    found: Mapping[_Running, _Next], *, most: int
) -> tuple[dict[_Running, _Next], dict[_Running, list[Guesses]]]:
    """The same, and what the rounds of each guess from now on, `most` tokens each at most.

    Where a drafter fails, its text ends.
    """
    after, plans = dict(found), {}
    going_on = [running for running, now in found.items() if not now.is_last]
    texts = [(running.generation, [each.guesses for each in found[running].rounds]) for running in going_on]
    for running, plan in zip(going_on, rounds_of_all(texts, most), strict=True):
        if isinstance(plan, Exception):
            after[running] = replace(found[running], error=plan)
        else:
            plans[running] = plan
    return after, plans


def _texts(generation: Generation, plan: Sequence[Guesses], known: Sequence[_Round]) -> list[tuple[Tensor, int]]:
    """For each round that is not known, the text with all guesses up to its last, [1, S], and how many of its tokens
    were sent before."""
    texts, ids_1S, num_sent = [], generation.ids_1S, generation.num_read
    for guesses in plan:
        ids_1S = torch.cat((ids_1S, ids_1S.new_tensor([guesses.tokens], dtype=ids_1S.dtype)), dim=1)
        texts.append((ids_1S, num_sent))
        num_sent = ids_1S.shape[1]
    return texts[len(known) :]
