"""`shoal demo`: a whole swarm on this machine. One of its servers is killed while the swarm tells a story."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from shoal.bundled import STORIES
from shoal.cli import options
from shoal.cli.generate import load_tokenizer, seed_everything
from shoal.cli.terminal.console import hush_transformers, start_logging, stdout, tokens_per_second, waiting
from shoal.cli.terminal.story import StoryStreamer, WrappedWriter
from shoal.client.options.client_options import ClientOptions
from shoal.errors import SwarmError
from shoal.host.large_imports import large_imports
from shoal.host.processes import Child, Children, interruptible
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
    """A server that was killed, and the blocks of the route that it computed."""

    child: Child
    blocks: Span
    seconds: float | None = None
    """From the kill to the next token."""


def command(
    servers: Annotated[int, typer.Option(min=4, max=2 * NUM_BLOCKS, metavar="N", help="The number of servers.")] = 6,
    kill: Annotated[bool, typer.Option("--kill/--no-kill", help="Kill a server in the middle of a sentence.")] = True,
    seed: options.Seed = None,
    verbose: options.Verbose = False,
) -> None:
    """Start a swarm on this machine and watch it survive a failure.

    Every server is a process, and the model is a small one that comes with shoal. One server is killed with SIGKILL in
    the middle of a sentence. The story goes on, and is compared with the text of the whole model on one machine. With
    --seed the story is sampled; without it, decoding is greedy.
    """
    start_logging(verbose=verbose)
    started = time.monotonic()
    with interruptible() as check, Children() as children:
        is_same = _demonstrate(children, servers, check, kill=kill, seed=seed)
    import psutil

    left = psutil.Process().children(recursive=True)
    ending = "all processes have ended" if not left else f"still running: {', '.join(str(p.pid) for p in left)}"
    stdout.print(f"\n{ending}; the demo took {time.monotonic() - started:.0f} s", style="dim")
    if not is_same:
        raise SwarmError(
            "the swarm's story differs from that of the whole model", hint="this is a bug: please report it"
        )


def _demonstrate(
    children: Children, num_servers: int, check: Callable[[], None], *, kill: bool, seed: int | None
) -> bool:
    """Run the demo. Returns whether the swarm generated the same tokens as the whole model."""
    stdout.print(f"A swarm of {num_servers} servers and a bootstrap peer, each in its own process", style="bold")
    local = ("--host", "127.0.0.1")
    computing = ("--dtype", "float32", "--device", "cpu")  # as the whole model, with which the story is compared
    with waiting("Starting a bootstrap peer and importing PyTorch") as progress:
        bootstrap = children.start("bootstrap", "dht", *local, "--identity", str(children.folder / "bootstrap"))
        with large_imports():
            import torch

            from shoal.cli.status import look
            from shoal.cli.terminal.render import render
            from shoal.client import AutoDistributedModelForCausalLM

            hush_transformers()
        torch.set_num_threads(1)  # leaves the other cores to the servers
        for _ in children.wait_for([bootstrap], seconds=START_SECONDS):
            check()
        address = bootstrap.facts["address"]
        servers = [
            children.start(
                *(name, "serve", str(STORIES), "--name", name, "--blocks", str(span), *computing, *local),
                *("--initial-peers", address, "--identity", str(children.folder / name)),
            )
            for name, span in plan(num_servers)
        ]
        pids = " ".join(f"{child.name}={child.process.pid}" for child in (bootstrap, *servers))
        progress.stop()
        stdout.print(Text(f"processes {pids}\n", style="dim"), soft_wrap=True)
        stdout.file.flush()
        for missing in children.wait_for(servers, seconds=START_SECONDS):
            check()
            names = ", ".join(child.name for child in missing)
            progress.show(f"Starting {num_servers} servers; waiting for {names}")
        progress.show("Asking which server holds which blocks")
        (status,) = asyncio.run(look(ClientOptions(initial_peers=(address,))))
    for part in render(status.model, status.view, status.answers, width=stdout.width):
        stdout.print(part)
    stdout.print()
    stdout.file.flush()

    with waiting("Joining the swarm as a client"):
        llm = AutoDistributedModelForCausalLM.from_pretrained(
            STORIES, initial_peers=[address], swarm_key="", dtype="float32"
        )
        tokenizer = load_tokenizer(str(STORIES))
    try:
        inputs = tokenizer(PROMPT, return_tensors="pt")
        chosen = options.sampling(None if seed is None else 0.8, None, None, seed) | {"max_new_tokens": MAX_NEW_TOKENS}
        num_prompt = inputs.input_ids.shape[1]
        with llm.inference_session(max_length=num_prompt + MAX_NEW_TOKENS) as session:
            story = _Story(tokenizer, session, servers if kill else [], num_prompt, check)
            seed_everything(seed)
            ids = llm.generate(**inputs, **chosen, session=session, streamer=story.streamer)
    finally:
        llm.close()

    with waiting("Running the whole model in this process, for comparison"):
        expected, local_speed = _on_one_machine(inputs, chosen, seed)
    is_same: bool = ids.tolist() == expected.tolist()
    story.summarize(is_same=is_same, local_speed=local_speed)
    if kill and story.kill is None:
        raise SwarmError("the story ended before a server could be killed", hint="try another --seed")
    return is_same


def plan(num_servers: int) -> Iterator[tuple[str, Span]]:
    """Names and spans of the servers. They form two rows, and each row holds every block once."""
    number = 0
    for row in ((num_servers + 1) // 2, num_servers // 2):
        for index in range(row):
            number += 1
            yield f"s{number}", Span(index * NUM_BLOCKS // row, (index + 1) * NUM_BLOCKS // row)


class _Story:
    """Prints the story as it is generated, kills one server of its route, and says which servers took over."""

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
        self._writer = WrappedWriter(stdout)
        self._writer.write(PROMPT, style="bold")
        self._session = session
        self._victims = {child.facts["peer"]: child for child in victims}
        self._num_prompt = num_prompt
        self.streamer = StoryStreamer(tokenizer, self._writer, before=self._note_successors, after=self._maybe_kill)

    def _note_successors(self, streamer: StoryStreamer) -> None:
        """Before the first text after the kill, name the servers that took over."""
        kill = self.kill
        if kill is None or kill.seconds is not None:
            return
        kill.seconds = streamer.times[-1] - streamer.times[-2]
        successors = [
            f"{hop.server.name} (blocks {hop.span})"
            for hop in self._session.hops
            if hop.span in kill.blocks or kill.blocks in hop.span
        ]
        num_replayed = self._num_prompt + len(streamer.token_ids) - 1
        self._writer.note(
            f"↻ {' and '.join(successors)} took over after {kill.seconds:.2f} s, replaying {num_replayed} tokens",
            style="green",
        )

    def _maybe_kill(self, streamer: StoryStreamer) -> None:
        """Kill a server of the route once the story is long enough and in the middle of a sentence."""
        self._check()
        is_time = self.kill is None and len(streamer.token_ids) >= KILL_AFTER_TOKENS and streamer.is_mid_sentence
        if self._victims and is_time:
            hop = self._session.hops[len(self._session.hops) // 2]
            child = self._victims[hop.server.peer]
            child.kill()
            self.kill = Kill(child, hop.span)
            self._writer.note(
                f"✂ killed server {child.name} (blocks {hop.span}), process {child.process.pid}, with SIGKILL",
                style="bold red",
            )

    def summarize(self, *, is_same: bool, local_speed: float) -> None:
        times = self.streamer.times
        steps = [after - before for before, after in pairwise(times)]
        num_tokens, usual = len(self.streamer.token_ids), statistics.median(steps)
        facts = [("through the swarm", f"{tokens_per_second(1 / usual)} through {len(self._session.hops)} servers")]
        facts.append(("on one machine", tokens_per_second(local_speed)))
        if self.kill is not None and self.kill.seconds is not None:
            facts.append(("cost of the kill", f"{self.kill.seconds:.2f} s; the median token took {usual:.3f} s"))
        stdout.print()
        verdict = ("yes", "bold green") if is_same else ("NO", "bold red")
        title = "same story as the whole model on one machine: "
        stdout.print(Text.assemble(title, verdict, f" ({num_tokens} tokens)"))
        for fact, value in facts:
            stdout.print(f"{fact:<19}{value}")


def _on_one_machine(inputs: Any, chosen: dict[str, Any], seed: int | None) -> tuple[Any, float]:
    """The token ids that plain Transformers generates with the whole model, and its speed in tokens per second."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")
    seed_everything(seed)
    start = time.perf_counter()
    ids = whole.generate(**inputs, **chosen)
    return ids, (ids.shape[1] - inputs.input_ids.shape[1]) / (time.perf_counter() - start)
