"""`shoal demo`: a whole swarm on this machine, one of whose servers is killed while it tells a story."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from rich.text import Text

from shoal.bundled import STORIES
from shoal.cli import options
from shoal.cli.console import hush_transformers, start_logging, stdout, waiting
from shoal.cli.generate import load_tokenizer, seed_everything
from shoal.cli.rates import tokens_per_second
from shoal.cli.story import Page, Teller
from shoal.client.options.client_options import ClientOptions
from shoal.errors import SwarmError
from shoal.processes import Child, Children, interruptible
from shoal.spans import Span

if TYPE_CHECKING:
    from shoal.client import InferenceSession

NUM_BLOCKS = 12
PROMPT = "Once upon a time"
MAX_NEW_TOKENS = 300
KILL_AFTER_TOKENS = 40
START_SECONDS = 180.0


@dataclass
class Kill:
    """What became of the server that was killed, and who took its place."""

    child: Child
    blocks: Span
    seconds: float | None = None  # from the kill to the next token


def command(
    servers: Annotated[int, typer.Option(min=4, max=2 * NUM_BLOCKS, metavar="N", help="So many servers.")] = 6,
    kill: Annotated[bool, typer.Option("--kill/--no-kill", help="Kill one of them in mid-sentence.")] = True,
    seed: options.Seed = None,
    verbose: options.Verbose = False,
) -> None:
    """See a whole swarm at work on this machine.

    Its servers are processes, and its model is a small one that comes with shoal. One of them is killed with SIGKILL in
    mid-sentence. The story goes on, and is compared with what the whole model says on one machine. With --seed the
    story is sampled; without, it is the likeliest.
    """
    start_logging(verbose=verbose)
    started = time.monotonic()
    with interruptible() as check, Children() as children:
        is_same = _demonstrate(children, servers, check, kill=kill, seed=seed)
    left = psutil.Process().children(recursive=True)
    ending = "nothing is left running" if not left else f"still running: {', '.join(str(p.pid) for p in left)}"
    stdout.print(f"\n{ending}; all of it took {time.monotonic() - started:.0f} s", style="dim")
    if not is_same:
        raise SwarmError("the swarm's story differs from the whole model's", hint="this should never be: report it")


def _demonstrate(
    children: Children, num_servers: int, check: Callable[[], None], *, kill: bool, seed: int | None
) -> bool:
    """The demo itself; returns whether the swarm said what the whole model says."""
    stdout.print(f"A swarm of {num_servers} servers and a bootstrap node, each a process of its own", style="bold")
    local = ("--host", "127.0.0.1")
    computing = ("--dtype", "float32", "--device", "cpu")  # as the whole model does, to which the story is compared
    with waiting("Starting a bootstrap node, and importing PyTorch") as wait:
        bootstrap = children.start("bootstrap", "dht", *local, "--identity", str(children.folder / "bootstrap"))
        import torch

        from shoal.cli.render import render
        from shoal.cli.status import look
        from shoal.client import AutoDistributedModelForCausalLM

        hush_transformers()
        # Servers want the other cores.
        torch.set_num_threads(1)
        for _ in children.wait_for([bootstrap], seconds=START_SECONDS):
            pass
        address = bootstrap.facts["address"]
        holders = [
            children.start(
                *(name, "serve", str(STORIES), "--name", name, "--blocks", str(span), *computing, *local),
                *("--initial-peers", address, "--identity", str(children.folder / name)),
            )
            for name, span in plan(num_servers)
        ]
        pids = " ".join(f"{child.name}={child.process.pid}" for child in (bootstrap, *holders))
        wait.stop()
        stdout.print(Text(f"processes {pids}\n", style="dim"), soft_wrap=True)
        stdout.file.flush()
        for missing in children.wait_for(holders, seconds=START_SECONDS):
            names = ", ".join(child.name for child in missing)
            wait.for_(f"Starting {num_servers} servers; waiting for {names}")
        wait.for_("Asking the swarm who holds what")
        (status,) = asyncio.run(look(ClientOptions(initial_peers=(address,))))
    for part in render(status.model, status.view, width=stdout.width):
        stdout.print(part)
    stdout.print()
    stdout.file.flush()

    with waiting("Joining the swarm as a client"):
        llm = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=[address], dtype="float32")
        tokenizer = load_tokenizer(str(STORIES))
    try:
        inputs = tokenizer(PROMPT, return_tensors="pt")
        chosen = options.sampling(None if seed is None else 0.8, None, None, seed) | {"max_new_tokens": MAX_NEW_TOKENS}
        num_prompt = inputs.input_ids.shape[1]
        with llm.inference_session(max_length=num_prompt + MAX_NEW_TOKENS) as session:
            telling = _Telling(tokenizer, session, holders if kill else [], num_prompt, check)
            seed_everything(seed)
            ids = llm.generate(**inputs, **chosen, session=session, streamer=telling.teller)
    finally:
        llm.close()

    with waiting("Running the whole model in this process, for comparison"):
        expected, local_speed = _on_one_machine(inputs, chosen, seed)
    is_same: bool = ids.tolist() == expected.tolist()
    telling.summarize(is_same=is_same, local_speed=local_speed)
    if kill and telling.kill is None:
        raise SwarmError("the story was over before anybody could be killed", hint="try another --seed")
    return is_same


def plan(num_servers: int) -> Iterator[tuple[str, Span]]:
    """Names and spans of servers: two rows of them, each of which holds every block once."""
    number = 0
    for row in ((num_servers + 1) // 2, num_servers // 2):
        for index in range(row):
            number += 1
            yield f"s{number}", Span(index * NUM_BLOCKS // row, (index + 1) * NUM_BLOCKS // row)


class _Telling:
    """The story while it is told: where it comes from, and the one who dies."""

    def __init__(
        self,
        tokenizer: Any,
        session: InferenceSession,
        victims: Sequence[Child],
        num_prompt: int,
        check: Callable[[], None],
    ) -> None:
        self.kill: Kill | None = None
        self._check = check
        self._page = Page(stdout)
        self._page.write(PROMPT, style="bold")
        self._session = session
        self._victims = {child.facts["peer"]: child for child in victims}
        self._num_prompt = num_prompt
        self.teller = Teller(tokenizer, self._page, before=self._greet_heirs, after=self._perhaps_kill)

    def _greet_heirs(self, teller: Teller) -> None:
        """Before the first words that come after the kill, say who took over."""
        kill = self.kill
        if kill is None or kill.seconds is not None:
            return
        kill.seconds = teller.times[-1] - teller.times[-2]
        heirs = [
            f"{hop.server.name} (blocks {hop.span})"
            for hop in self._session.hops
            if hop.span in kill.blocks or kill.blocks in hop.span
        ]
        num_replayed = self._num_prompt + len(teller.token_ids) - 1
        self._page.note(
            f"↻ {' and '.join(heirs)} took over after {kill.seconds:.2f} s, replaying {num_replayed} tokens",
            style="green",
        )

    def _perhaps_kill(self, teller: Teller) -> None:
        """In mid-sentence, kill a server that the story comes through."""
        self._check()
        is_time = self.kill is None and len(teller.token_ids) >= KILL_AFTER_TOKENS and teller.is_mid_sentence
        if self._victims and is_time:
            hop = self._session.hops[len(self._session.hops) // 2]
            child = self._victims[hop.server.peer]
            child.kill()
            self.kill = Kill(child, hop.span)
            self._page.note(
                f"✂ killed server {child.name} (blocks {hop.span}), process {child.process.pid}, with SIGKILL",
                style="bold red",
            )

    def summarize(self, *, is_same: bool, local_speed: float) -> None:
        times = self.teller.times
        steps = [after - before for before, after in pairwise(times)]
        num_tokens, usual = len(self.teller.token_ids), statistics.median(steps)
        facts = [
            ("through the swarm", f"{tokens_per_second(1 / usual)} by {len(self._session.hops)} servers in a chain")
        ]
        facts.append(("on one machine", tokens_per_second(local_speed)))
        if self.kill is not None and self.kill.seconds is not None:
            facts.append(("the kill cost", f"{self.kill.seconds:.2f} s; a token usually takes {usual:.3f} s"))
        stdout.print()
        verdict = ("yes", "bold green") if is_same else ("NO", "bold red")
        title = "the same as the whole model on one machine: "
        stdout.print(Text.assemble(title, verdict, f" ({num_tokens} tokens)"))
        for fact, value in facts:
            stdout.print(f"{fact:<19}{value}")


def _on_one_machine(inputs: Any, chosen: dict[str, Any], seed: int | None) -> tuple[Any, float]:
    """What plain Transformers says with the whole model, and how many tokens per second."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")
    seed_everything(seed)
    start = time.perf_counter()
    ids = whole.generate(**inputs, **chosen)
    return ids, (ids.shape[1] - inputs.input_ids.shape[1]) / (time.perf_counter() - start)
