"""Soak test without a guarantee: servers that may move are killed, also the last holders of blocks.

    python -m benchmarks.healing.churn [--seconds 1800] [--every 20] [--servers 6] [--seed 0]

Each server is a process on loopback that holds up to five of the bundled model's twelve blocks, wherever the swarm
needs them. Every few seconds one of them is killed, whichever it is, and another one starts some seconds later. The
clients are those of `benchmarks.soak.churn`; they wait while blocks have no server, and all their tokens are compared
with those of plain Transformers. The table has, over time, the turns, and how often and how long blocks had no server.

The exit status is 1 if a turn failed or has other tokens, if a client ended by itself, or if blocks lacked a server and
no client said what it waited for.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common.conversations import write_conversations
from benchmarks.healing.kill import Processes, missing, swarm
from benchmarks.soak.clients import SoakClients
from benchmarks.soak.options import soak_parser, soak_script
from shoal.host.processes import Child, interruptible

MOST_BLOCKS = "5"
DOWN_SECONDS = 10.0
LOOK_SECONDS = 1.0
REPORT_SECONDS = 30.0
LAST_CONVERSATION_SECONDS = 240.0
"""How long a client may go on with its conversation after the end of the soak."""
NUM_CONVERSATIONS = 24


@dataclass
class Servers:
    """Servers that are killed and replaced. `dead` are the peers that were killed: none of them comes back.

    Each server has an identity of its own. Otherwise a new one would take that of one that was killed.
    """

    processes: Processes
    living: list[Child] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    num_started: int = 0

    def begin(self) -> Child:
        self.num_started += 1
        name = f"free-{self.num_started}"
        identity = str(self.processes.folder / f"{name}.identity")
        child = self.processes.begin(name, "--num-blocks", MOST_BLOCKS, "--identity", identity)
        self.living.append(child)
        return child

    def kill_one(self, chance: random.Random) -> None:
        ready = [child for child in self.living if "peer" in child.facts]
        if ready:
            victim = chance.choice(ready)
            victim.kill()
            self.living.remove(victim)
            self.dead.add(victim.facts["peer"])

    def missing(self) -> list[int]:
        """The blocks that no living server serves, as the directory says."""
        return missing([each for each in self.processes.servers() if each.peer not in self.dead])


@dataclass
class Holes:
    """How long blocks had no server."""

    seconds: float = 0.0
    number: int = 0
    _since: float | None = None

    def look(self, is_open: bool, now: float) -> None:
        if is_open and self._since is None:
            self._since, self.number = now, self.number + 1
        elif not is_open and self._since is not None:
            self.seconds, self._since = self.seconds + now - self._since, None


def soak(servers: Servers, clients: SoakClients, seconds: float, every: float, chance: random.Random) -> Holes:
    """Kill and start servers for `seconds`, and then wait for the clients."""
    began = time.monotonic()
    holes = Holes()
    starts: list[float] = []
    kill_at, report_at = began + every, began
    print("   time  turns  failed  differ  killed  holes  seconds with a hole")
    while (now := time.monotonic()) < began + seconds + LAST_CONVERSATION_SECONDS and clients.are_running:
        is_over = now > began + seconds
        if now >= kill_at and not is_over:
            servers.kill_one(chance)
            starts.append(now + chance.uniform(0.5, 1.5) * DOWN_SECONDS)
            kill_at = now + chance.expovariate(1 / every)
        while starts and starts[0] <= now:
            starts.pop(0)
            servers.begin()
        holes.look(bool(servers.missing()), now)
        if now >= report_at:
            turns = clients.turns
            failed, differing = (sum(getattr(turn, name) is not None for turn in turns) for name in FAULTS)
            print(
                f"{now - began:6.0f}s {len(turns):6} {failed:7} {differing:7} {len(servers.dead):7} {holes.number:6}"
                f" {holes.seconds:8.0f}",
                flush=True,
            )
            report_at = now + REPORT_SECONDS
        time.sleep(LOOK_SECONDS)
    holes.look(False, time.monotonic())
    return holes


FAULTS = ("failure", "difference")


def judge(clients: SoakClients, holes: Holes, folder: Path) -> int:
    """Print the results. Returns the exit status."""
    for client in clients.all:
        client.read_rest()
    logs = {client.name: (folder / f"{client.name}.log").read_text(errors="replace") for client in clients.all}
    waits = [line for log in logs.values() for line in log.splitlines() if line.startswith("waiting:")]
    gaps = [gap for turn in clients.turns for gap in turn.gaps]
    print(f"\n{len(clients.turns)} turns; {holes.number} holes, {holes.seconds:.0f} s with one")
    print(f"{len(waits)} times a client said what it waits for; the longest time between two tokens: {max(gaps):.1f} s")
    for line in {re.sub(r"\d+", "N", line): line for line in waits}.values():
        print(f"  {line}")
    faults = [f"{each.name}: {fault}" for each in clients.all for turn in each.turns if (fault := turn.failure)]
    faults += [f"{each.name}: {fault}" for each in clients.all for turn in each.turns if (fault := turn.difference)]
    faults += [f"{each.name} ended with {each.process.poll()}" for each in clients.all if each.process.poll() != 0]
    faults += [f"{each.name} finished no turn" for each in clients.all if not each.turns]
    if holes.number and not waits:
        faults.append("no client said that it waits")
    for fault in faults:
        print(f"FAULT: {fault}")
    return int(bool(faults))


@interruptible()
def main() -> int:
    parser = soak_parser(__doc__, every=20, event="kill")
    parser.add_argument("--servers", type=int, default=6)
    arguments = parser.parse_args()
    script = soak_script(NUM_CONVERSATIONS, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as name, swarm() as processes:
        folder = Path(name)
        os.environ.setdefault("SHOAL_CACHE", str(folder / "cache"))
        write_conversations(folder / "conversations.json", script)
        servers = Servers(processes)
        processes.wait(*[servers.begin() for _ in range(arguments.servers)])
        file, seconds = folder / "conversations.json", arguments.seconds
        with SoakClients([processes.address], file, seconds, arguments.seed, folder) as clients:
            clients.wait_until_running()
            chance = random.Random(arguments.seed)
            holes = soak(servers, clients, seconds, arguments.every, chance)
            status = judge(clients, holes, folder)
        if arguments.logs is not None:
            shutil.copytree(folder, arguments.logs / "clients", ignore=shutil.ignore_patterns("cache"))
            shutil.copytree(processes.folder, arguments.logs / "servers")
    return status


if __name__ == "__main__":
    sys.exit(main())
