"""What users do on the machines of a scene: they start servers, let others join, have a story told, call the doctor."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal.bundled import STORIES
from shoal.host.processes import Child, Process
from shoal.testing.namespaces import Host, Internet
from tests.known_speed import know_speed
from tests.net.doctor_visit import Visit

PROMPT = "Once upon a time"
NUM_TOKENS = 120
DECODE_SPEED = 250.0
READY_SECONDS = 180.0
PATIENCE_SECONDS = 60
LOOK_SECONDS = 0.05
FIRST, LAST = "0:6", "6:12"
FORM = ("--dtype", "float32", "--device", "cpu")


class SceneFailed(AssertionError):
    """What a user saw, in one line."""


@functools.cache
def expected_story() -> str:
    """What plain Transformers tells on one machine."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text.removeprefix(PROMPT).strip()


@dataclass(frozen=True)
class Telling:
    """A client in the middle of a story, and its log."""

    process: Process
    log: Path

    @property
    def server(self) -> str:
        """The name of the server of the first blocks."""
        chosen = [line for line in self.log.read_text().splitlines() if " a step: " in line][-1]
        return chosen.partition(" a step: ")[2].partition(f" {FIRST}")[0]

    def wait_for(self, words: str) -> None:
        """Wait until the client has written these words into its log, or has ended."""
        until = time.monotonic() + READY_SECONDS
        while words not in self.log.read_text() and self.process.poll() is None:
            if time.monotonic() > until:
                raise SceneFailed(f"the client never said {words!r}")
            time.sleep(LOOK_SECONDS)  # the log of another process tells nothing when it grows


class Stage:
    """A scene's internet, and what users do on its machines."""

    def __init__(self, net: Internet, speeds: Path) -> None:
        self.net = net
        self.visits: list[Visit] = []
        self._speeds = speeds

    def up(self, host: Host, *options: str, blocks: str = LAST) -> str:
        """Start the swarm on a host. Returns its code. It has no gateway, which would take time, and is not used."""
        child = self._start(
            host, "serve", str(STORIES), "--new-swarm", *FORM, "--blocks", blocks, "--name", host.name, *options
        )
        return self.fact(child, "code")

    def join(self, *hosts: Host, code: str, options: Sequence[str] = (), blocks: str = FIRST) -> list[Child]:
        """Let hosts join by a code, at the same time, and wait until they serve."""
        given = ("--device", "cpu", "--blocks", blocks, *options)
        joined = [self._start(host, "join", code, "--name", host.name, *given) for host in hosts]
        for child in joined:
            self.fact(child, "address")
        return joined

    def serve(self, host: Host, *options: str) -> Child:
        """Let a host with a copy of the model serve all blocks."""
        child = self._start(host, "serve", str(STORIES), *FORM, "--name", host.name, *options)
        self.fact(child, "address")
        return child

    def relay(self, host: Host, *options: str) -> tuple[Child, str]:
        """Let a host relay. Returns its address."""
        child = host.start("dht", "--serve-relay", *options)
        return child, self.fact(child, "address")

    def fact(self, child: Child, name: str) -> str:
        """What a process printed after this word, when it has."""
        until = time.monotonic() + READY_SECONDS
        while name not in child.facts:
            if child.has_ended:
                raise SceneFailed(str(child.failure()))
            if time.monotonic() > until:
                raise SceneFailed(f"{child.name} printed no {name}; its log: {last_line(child.log)}")
            self.net.children.wait_for_news(until - time.monotonic())
        return child.facts[name]

    def tell(self, host: Host, code: str, *, middle: Callable[[Telling], None] = lambda telling: None) -> None:
        """Have a story told on a host, which must be the right one. `middle` is called in the middle of it."""
        command = ("generate", code, PROMPT, "--max-new-tokens", str(NUM_TOKENS))
        with host.running(*command, "--verbose", "--patience", str(PATIENCE_SECONDS)) as (process, log):
            assert process.stdout is not None
            story = process.stdout.read(20)
            if story:
                middle(Telling(process, log))
            story += process.stdout.read()
            status = process.wait(READY_SECONDS)
            report = log.read_text()
        if status:
            raise SceneFailed(f"generate: {errors_in(report)}")
        if story.strip() != expected_story():
            raise SceneFailed(f"another story: {story!r}")

    @contextmanager
    def doctor(self, says: Mapping[Host, str], *arguments: str) -> Iterator[None]:
        """Have the doctor look at hosts while the context lasts, and a little longer if need be. It must say this."""
        with ExitStack() as stack:
            visits = []
            for host in says:
                process, log = stack.enter_context(host.running("doctor", *arguments))
                visits.append(Visit(host.name, process, log))
            self.visits += visits
            yield
            for visit, words in zip(visits, says.values(), strict=True):
                if wrong := visit.wrong(words):
                    raise SceneFailed(f"doctor on {visit.host}: {wrong}")

    def status(self, host: Host, code: str) -> str:
        """What `shoal status` prints."""
        answer = host.shoal("status", code)
        return answer.stdout + answer.stderr

    def _start(self, host: Host, *arguments: str) -> Child:
        cache = Path(host.environment["SHOAL_CACHE"])
        if not cache.exists():
            shutil.copytree(self._speeds, cache)
        return host.start(*arguments)


def errors_in(report: str) -> str:
    """The error and the hint of a command, in one line."""
    lines = report.splitlines()
    found = [line for line in lines if line.startswith(("error: ", "hint: "))] or lines[-1:]
    return "; ".join(found)


def last_line(log: Path) -> str:
    """The last line of a log."""
    return (log.read_text().splitlines() or ["(empty)"])[-1]


@contextmanager
def stage(speeds: Path, versions: Sequence[int] = (4,)) -> Iterator[Stage]:
    """An empty stage. `speeds`: a cache that knows how fast this machine computes."""
    with Internet(versions, preloaded=True) as net:
        yield Stage(net, speeds)


def known_speeds(folder: Path) -> Path:
    """Fill a cache with the speed of this machine, so that servers need not measure it."""
    import torch

    torch.set_num_threads(1)  # as the servers have
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(folder))
        for blocks in (6, 12):
            know_speed(STORIES, num_blocks=blocks, decode_speed=DECODE_SPEED)
    return folder
