"""How machines join from everywhere: scenes in an internet of namespaces, each with what a user does in it.

Each scene starts a swarm with `shoal serve`, lets others `shoal join` by its code, and has a story told by `shoal
generate`. A link goes in the middle of it. The story must be the one that plain Transformers tells. A scene that fails
raises `SceneFailed`, with what a user saw. `python -m tests.net.scenes` plays them and prints a table.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal.bundled import STORIES
from shoal.errors import ShoalError
from shoal.host.processes import Child, Process
from shoal.joining.invite_code import InviteCode
from shoal.testing.namespaces import Home, Host, Internet, Nat
from tests.known_speed import know_speed

PROMPT = "Once upon a time"
NUM_TOKENS = 120
DECODE_SPEED = 250.0
READY_SECONDS = 180.0
PATIENCE_SECONDS = 60
LOOK_SECONDS = 0.05
FIRST, LAST = "0:6", "6:12"
FORM = ("--dtype", "float32", "--device", "cpu")
MINUTES_OFF = 5


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
        self._speeds = speeds

    def up(self, host: Host, *options: str, blocks: str = LAST) -> str:
        """Start the swarm on a host. Returns its code. It has no gateway, which would take time, and is not used."""
        child = self._start(host, "serve", str(STORIES), "--new-swarm", *FORM, "--blocks", blocks, *options)
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


# The scenes.


MACHINES = ("first", "one", "other", "client")


def lose_one(at: Stage, first: Host, one: Host, other: Host, client: Host) -> None:
    """Two machines join the first one, with the same blocks. One that is in use is cut off in the middle of a story."""
    code = at.up(first)
    at.join(one, other, code=code)
    at.tell(client, code, middle=lambda telling: {"one": one, "other": other}[telling.server].cut())


def on_a_lan(at: Stage) -> None:
    """All machines are on one LAN."""
    home = at.net.home("lan")
    lose_one(at, *(home.host(name) for name in MACHINES))


def in_public(at: Stage) -> None:
    """All machines have public addresses."""
    lose_one(at, *(at.net.host(name) for name in MACHINES))


def beside_containers(at: Stage) -> None:
    """Each machine of the LAN has bridges to containers of its own, with the same addresses everywhere."""
    home = at.net.home("lan")
    first, one, other, laptop = hosts = [home.host(name) for name in ("first", "one", "other", "laptop")]
    for host in hosts:
        host.add_bridge("docker0", "172.17.0.1/16")
        host.add_bridge("br-0f1e2d3c4b5a", "172.18.0.1/16")
        host.add_bridge("virbr0", "192.168.122.1/24")
    code = at.up(first)
    joined = at.join(one, other, code=code)
    for each in (code, *(at.fact(child, "code") for child in joined)):
        if strange := [way.host for way in InviteCode.parse(each).ways if not way.host.startswith("192.168.1.")]:
            raise SceneFailed(f"a code has {strange}")
    for child in joined:
        if not child.facts["address"].startswith("/ip4/192.168.1."):
            raise SceneFailed(f"the printed address is {child.facts['address']}")
    at.tell(laptop, code, middle=lambda telling: {"one": one, "other": other}[telling.server].cut())


def home_beside_public(at: Stage, nat: Nat) -> None:
    """One public machine, and one behind a NAT, which finds its relays itself, and whose link is lost for a moment."""
    public, client = at.net.host("public"), at.net.host("client")
    home = at.net.home("home", nat)
    inside = home.host("inside")
    code = at.up(public)
    at.join(inside, code=code)
    at.tell(client, code, middle=flap(home))


def two_homes(at: Stage) -> None:
    """Two homes behind NATs without an open port, and one public machine. The client is in one of the homes."""
    east, west = at.net.home("east"), at.net.home("west", Nat.SYMMETRIC)
    hosts = at.net.host("public"), east.host("one"), west.host("other"), east.host("client")
    lose_one(at, *hosts)


def dead_bootstrap(at: Stage) -> None:
    """The first machine, by which all came, and the only copy of the model, is gone for good.

    The code that another machine printed still leads in, and a client without a copy gets what it needs from others.
    """
    first, helper, other, client = (at.net.host(name) for name in ("first", "helper", "other", "client"))
    brought = at.up(first)
    joined = at.join(helper, code=brought)[0]
    rest = at.join(other, code=brought, blocks=LAST)[0]
    at.fact(joined, "kept")
    at.fact(rest, "kept")
    code = at.fact(joined, "code")
    if {way.host for way in InviteCode.parse(code).ways} != {helper.address, first.address}:
        raise SceneFailed(f"a code leads to {InviteCode.parse(code).addresses}")
    first.cut()
    at.tell(client, code)


def clients_clock(at: Stage) -> None:
    """The clock of a client is off, in either direction."""
    first, one, client = (at.net.host(name) for name in ("first", "one", "client"))
    code = at.up(first)
    at.join(one, code=code)
    client.set_clock(-60 * MINUTES_OFF)
    try:
        at.tell(client, code)
    except SceneFailed as failure:
        if "this machine's clock is 5 minutes behind that of 2 members" not in str(failure):
            raise
    else:
        raise SceneFailed("it generates, although it holds all records for invalid")
    client.set_clock(60 * MINUTES_OFF)
    if "this machine's clock is 5 minutes ahead of that of 2 members" not in (seen := at.status(client, code)):
        raise SceneFailed(f"status: {seen}")


def servers_clock(at: Stage) -> None:
    """The clock of a machine that wants to join is off."""
    first, one, late = (at.net.host(name) for name in ("first", "one", "late"))
    code = at.up(first)
    at.join(one, code=code)
    late.set_clock(-60 * MINUTES_OFF)
    try:
        at.join(late, code=code)
    except SceneFailed as failure:
        if "this machine's clock is 5 minutes behind that of 2 members" not in str(failure):
            raise
    else:
        raise SceneFailed("it joined, and is not in the directory")


def lossy(at: Stage) -> None:
    """One packet of a hundred is lost."""
    at.net.lose(0.01)
    in_public(at)


def separated(at: Stage) -> None:
    """Two servers whose blocks follow each other cannot reach each other. The client carries the tensors."""
    first, one, client = (at.net.host(name) for name in ("first", "one", "client"))
    code = at.up(first)
    at.join(one, code=code)
    at.net.separate(first, one)
    at.tell(client, code)


def restarted_relays(at: Stage) -> None:
    """All four relays of a server behind a NAT, which it was told by hand, are killed and started again."""
    public, client = at.net.host("public"), at.net.host("client")
    inside = at.net.home("home").host("inside")
    code = at.up(public)
    hosts = [at.net.host(f"relay{number}") for number in range(4)]
    fixed = [("--port", "4001", "--identity", str(at.net.folder / f"{host.name}.key")) for host in hosts]
    started = [at.relay(host, *options) for host, options in zip(hosts, fixed, strict=True)]
    named = [part for _, address in started for part in ("--relay", address)]
    at.join(inside, code=code, options=named)
    at.tell(client, code)
    for child, _ in started:
        child.kill()
    for host, options in zip(hosts, fixed, strict=True):
        at.relay(host, *options)
    at.tell(client, code)


def flap(home: Home) -> Callable[[Telling], None]:
    """Cuts a home off until the client has noticed, and connects it again."""

    def cut_and_heal(telling: Telling) -> None:
        home.cut()
        telling.wait_for("looking for another server")
        home.heal()

    return cut_and_heal


@dataclass(frozen=True)
class Scene:
    """What is played. `versions` of IP that its hosts have. `by_hand`: why it is in no test, if it is not."""

    play: Callable[[Stage], None]
    versions: tuple[int, ...] = (4,)
    by_hand: str | None = None


SCENES = {
    "open": Scene(on_a_lan, by_hand="containers is harder, and otherwise alike"),
    "containers": Scene(beside_containers),
    "full-cone": Scene(
        functools.partial(home_beside_public, nat=Nat.FULL_CONE),
        by_hand="those of two-homes are harder, and otherwise alike",
    ),
    "port-restricted": Scene(
        functools.partial(home_beside_public, nat=Nat.PORT_RESTRICTED), by_hand="one of two-homes has such a NAT"
    ),
    "symmetric": Scene(
        functools.partial(home_beside_public, nat=Nat.SYMMETRIC), by_hand="one of two-homes has such a NAT"
    ),
    "two-homes": Scene(two_homes),
    "ipv6": Scene(in_public, versions=(6,), by_hand="tests/unit/test_identity.py has its addresses"),
    "dead-bootstrap": Scene(dead_bootstrap),
    "clients-clock": Scene(clients_clock),
    "servers-clock": Scene(servers_clock, by_hand="the words are those of clients-clock, from the same check"),
    "loss": Scene(lossy, by_hand="TCP repairs it: it is slower, and nothing else differs"),
    "separated": Scene(separated, by_hand="tests/swarm/test_ring.py has such servers, in memory"),
    "restarted-relays": Scene(restarted_relays, by_hand="tests/net/test_reach.py restarts a relay"),
}
"""The scenes by their names. Each takes the best part of a minute of a core, so tests play four of them."""


def main() -> None:
    """Play scenes one after another, and print a row for each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help="the scenes; default: all of them")
    chosen = parser.parse_args().names
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        speeds = known_speeds(Path(folder))
        for name, scene in SCENES.items():
            if chosen and name not in chosen:
                continue
            began = time.monotonic()
            try:
                with stage(speeds, scene.versions) as at:
                    try:
                        scene.play(at)
                        outcome = "passes"
                    except (SceneFailed, ShoalError) as failure:
                        outcome = f"FAILS: {failure}"
                        for child in at.net.children.running:
                            print(f"    [{child.name}] {child.log.read_text()[-1500:]}", file=sys.stderr)
            except Exception as defect:
                outcome = f"BROKEN: {defect!r}"
            print(f"| {name} | {time.monotonic() - began:.0f} s | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
