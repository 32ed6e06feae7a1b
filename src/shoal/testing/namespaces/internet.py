"""Hosts and homes, and the one router between them, each in a network namespace.

    host ── eth0 ──────────────────────┐
                                     ┌─┴─┐
                                     │   │  the core: routes between sites, keeps pairs apart, loses packets
    host ── eth0 ─┐                  └─┬─┘
                  lan [router, NAT] wan┘
    host ── eth0 ─┘

A *site* is a host or a home's router. Site n has the addresses 40+n.n.0.2 and 2a00:n::2, each in a network of its own,
as libp2p wants of hosts that are to be told apart. All homes have 192.168.1.0/24, as homes do.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from shoal.errors import UserError
from shoal.host.processes import Child, Children, Process
from shoal.testing.namespaces.nat import Nat, rules
from shoal.testing.namespaces.system import (
    add,
    call,
    configure,
    connect,
    enter,
    entering,
    missing_for_namespaces,
    remove,
    remove_leftovers,
    socket_in,
)
from shoal.testing.preloaded import PreloadedProcess

GRACE_SECONDS = 10.0
"""How long processes have to end by themselves."""
RUN_SECONDS = 240.0
"""How long a command may take that ends by itself."""
_numbers = itertools.count()  # of the namespaces of this process
_CORE_RULES = """
table inet core {
    set apart {
        type ipv4_addr . ipv4_addr
    }
    set cut {
        type ifname
    }
    chain passing {
        type filter hook forward priority filter
        iifname @cut drop
        oifname @cut drop
        ip saddr . ip daddr @apart drop
    }
}
"""
_CLOCK = """
import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + {seconds}
time.time_ns = lambda: _time_ns() + {seconds} * 10**9
"""


@dataclass(frozen=True)
class Cable:
    """The commands that cut a host or a home off and connect it again, and the namespace where they are run."""

    namespace: str
    cut: tuple[str, ...]
    heal: tuple[str, ...]


class Host:
    """A machine: a namespace with one interface, `eth0`, and folders of its own for caches and temporary files."""

    def __init__(self, net: Internet, name: str, namespace: str, address: str, cable: Cable) -> None:
        self.name = name
        self.address = address
        self._net = net
        self._namespace = namespace
        self._cable = cable
        temporary = net.folder / name / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        self._environment: dict[str, str] = {"SHOAL_CACHE": str(net.folder / name / "cache"), "TMPDIR": str(temporary)}
        self._clock_is_off = False

    def start(self, *arguments: str) -> Child:
        """Start `shoal` with these arguments. It ends with the internet. What it prints becomes its `facts`."""
        name = f"{self.name}-{arguments[0]}-{len(self._net.children.running)}"
        start = functools.partial(self._net.children.start, name, *arguments, environment=self._environment)
        if self._forks:
            return start(launch=self._fork)
        return start(within=entering(self._namespace))

    @property
    def _forks(self) -> bool:
        return self._net.preloaded and not self._clock_is_off  # what is forked has its clock already

    def _fork(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> PreloadedProcess:
        return PreloadedProcess(arguments, environment, log, prepare=functools.partial(enter, self._namespace))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program here until it ends, and return its status and what it printed."""
        return subprocess.run(  # noqa: S603 - the caller's command
            [*entering(self._namespace), *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=RUN_SECONDS,
            env=self.environment,
        )

    def shoal(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `shoal` here until it ends."""
        return self.run(sys.executable, "-m", "shoal", *arguments)

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[tuple[Process, Path]]:
        """`shoal` runs here while the context lasts: the process, whose output is a pipe, and the log of it."""
        log = self._net.folder / f"{self.name}-{next(_numbers)}.log"
        if self._forks:
            fork = self._fork(arguments, self.environment, log)
            with fork.stdin, fork.stdout:
                try:
                    yield fork, log
                finally:
                    fork.kill()
                    fork.wait()
            return
        with (
            log.open("w") as file,
            subprocess.Popen(  # noqa: S603 - our own program
                [*entering(self._namespace), sys.executable, "-m", "shoal", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=self.environment,
            ) as process,
        ):
            try:
                yield process, log
            finally:
                process.kill()

    def open_socket(
        self, kind: socket.SocketKind, *, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> socket.socket:
        """A socket of this host, bound to a port, or to any."""
        found = socket_in(self._namespace, family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.bind(("", port))
        return found

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment of what runs here."""
        inherited = {name: value for name, value in os.environ.items() if name != "SHOAL_INITIAL_PEERS"}
        return {**inherited, "NO_COLOR": "1", **self._environment}

    def set_clock(self, seconds: float) -> None:
        """Let the clock of Python programs that start here from now on be ahead by this many seconds, or behind."""
        self._clock_is_off = True
        folder = self._net.folder / self.name / f"clock{round(seconds)}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sitecustomize.py").write_text(_CLOCK.format(seconds=round(seconds)))
        path = os.environ.get("PYTHONPATH", "")
        self._environment["PYTHONPATH"] = f"{folder}{os.pathsep}{path}" if path else str(folder)

    def add_bridge(self, interface: str, address: str) -> None:
        """Give the host a bridge to containers of its own, such as `docker0` with 172.17.0.1/16."""
        call("ip", "link", "add", interface, "type", "bridge", within=self._namespace)
        call("ip", "address", "add", address, "dev", interface, within=self._namespace)
        call("ip", "link", "set", interface, "up", within=self._namespace)

    def cut(self) -> None:
        """Cut the host off: nothing passes any more, and nothing here says so."""
        call(*self._cable.cut, within=self._cable.namespace)

    def heal(self) -> None:
        """Undo `cut`."""
        call(*self._cable.heal, within=self._cable.namespace)


class Home:
    """Some hosts with private addresses behind a router that has one public address."""

    def __init__(self, net: Internet, name: str, namespace: str, address: str, cable: Cable) -> None:
        self.name = name
        self.address = address
        self._net = net
        self._namespace = namespace
        self._cable = cable
        self._num_hosts = 0

    def host(self, name: str) -> Host:
        """Add a host. Its address is private."""
        self._num_hosts += 1
        port, address = f"port{self._num_hosts}", f"192.168.1.{9 + self._num_hosts}"
        namespace = self._net.add_namespace()
        connect((namespace, "eth0"), (self._namespace, port))
        call("ip", "link", "set", port, "master", "lan", within=self._namespace)
        call("ip", "address", "add", f"{address}/24", "dev", "eth0", within=namespace)
        call("ip", "route", "add", "default", "via", "192.168.1.1", within=namespace)
        link = ("ip", "link", "set", port)
        return Host(
            self._net, name, namespace, address, Cable(self._namespace, (*link, "nomaster"), (*link, "master", "lan"))
        )

    def cut(self) -> None:
        """Cut the home off from the internet, in silence."""
        call(*self._cable.cut, within=self._cable.namespace)

    def heal(self) -> None:
        """Undo `cut`."""
        call(*self._cable.heal, within=self._cable.namespace)


class Internet:
    """A context with hosts and homes. When it is left, all that was started in it has ended, and all is removed.

    `versions`: of IP, 4 or 6 or both, for hosts outside of homes; homes have 4. `preloaded`: what hosts start and have
    running are forks of one process that has imported PyTorch, which takes less time; a host whose clock is off runs
    Python. Raises `UserError` on a machine that cannot do it.
    """

    def __init__(self, versions: Sequence[int] = (4,), *, preloaded: bool = False) -> None:
        self.preloaded = preloaded
        self._versions = tuple(versions)
        self._num_sites = 0
        self._namespaces: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if missing := missing_for_namespaces():
            raise UserError(f"there can be no internet in namespaces: {missing}")
        remove_leftovers()
        with ExitStack() as stack:
            stack.callback(self._remove_all)
            self.children = stack.enter_context(Children(grace_seconds=GRACE_SECONDS))
            self._core = self.add_namespace()
            forwarding = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
            configure(self._core, forwarding)
            call("nft", "-f", "-", within=self._core, text=_CORE_RULES)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def folder(self) -> Path:
        """A folder for the files of the hosts, which is removed at the end."""
        return self.children.folder

    def host(self, name: str) -> Host:
        """Add a host with a public address."""
        namespace = self.add_namespace()
        address, cable = self._add_site(namespace, "eth0", self._versions)
        return Host(self, name, namespace, address, cable)

    def home(self, name: str, nat: Nat = Nat.PORT_RESTRICTED) -> Home:
        """Add a home without hosts, behind this kind of NAT."""
        router = self.add_namespace()
        address, cable = self._add_site(router, "wan", (4,))
        call("ip", "link", "add", "lan", "type", "bridge", within=router)
        call("ip", "address", "add", "192.168.1.1/24", "dev", "lan", within=router)
        call("ip", "link", "set", "lan", "up", within=router)
        configure(router, ("net.ipv4.ip_forward=1",))
        call("nft", "-f", "-", within=router, text=rules(nat))
        return Home(self, name, router, address, cable)

    def separate(self, one: Host | Home, other: Host | Home) -> None:
        """Let no packet pass between two sites, in silence. Both still reach all others. IPv4 only."""
        for source, target in ((one, other), (other, one)):
            pair = f"{{ {source.address} . {target.address} }}"
            call("nft", "add", "element", "inet", "core", "apart", pair, within=self._core)

    def lose(self, share: float) -> None:
        """Lose this share of all packets between sites from now on, at random: 0.01 is one in a hundred."""
        rule = f"numgen random mod 10000 < {round(share * 10000)} drop"
        call("nft", "add", "rule", "inet", "core", "passing", *rule.split(), within=self._core)

    # What hosts and homes use.

    def add_namespace(self) -> str:
        """A new namespace, removed at the end."""
        name = f"shoal-{os.getpid()}-{next(_numbers)}"
        self._namespaces.append(name)
        add(name)
        configure(name, ("net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"))
        return name

    def _add_site(self, namespace: str, interface: str, versions: Sequence[int]) -> tuple[str, Cable]:
        """Connect a namespace to the core. Returns its first address, and its cable."""
        self._num_sites += 1
        n = self._num_sites
        far_end = f"site{n}"
        connect((namespace, interface), (self._core, far_end))
        networks = {4: (f"{40 + n}.{n}.0.2", f"{40 + n}.{n}.0.1", 24), 6: (f"2a00:{n:x}::2", f"2a00:{n:x}::1", 64)}
        for version in versions:
            own, gateway, prefix = networks[version]
            call("ip", "address", "add", f"{gateway}/{prefix}", "dev", far_end, within=self._core)
            call("ip", "address", "add", f"{own}/{prefix}", "dev", interface, within=namespace)
            call("ip", f"-{version}", "route", "add", "default", "via", gateway, within=namespace)
        cut, element = ("inet", "core", "cut"), f"{{ {far_end} }}"
        cable = Cable(self._core, ("nft", "add", "element", *cut, element), ("nft", "delete", "element", *cut, element))
        return networks[versions[0]][0], cable

    def _remove_all(self) -> None:
        for namespace in reversed(self._namespaces):
            remove(namespace)
        self._namespaces.clear()
