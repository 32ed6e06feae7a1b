"""A swarm of `shoal serve` processes, each behind a proxy whose link can be shaped and broken."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from shoal.host.processes import Child, Children, Launch, Process
from shoal.testing.churn import Act
from shoal.testing.link import Link
from shoal.testing.preloaded import PreloadedProcess
from shoal.testing.proxy_process import ProxyProcess, Traffic
from shoal.testing.proxy_state import HOST, ProxyState

START_SECONDS = 180.0
"""How long a server may take until it serves: several that start at once load their weights slowly."""
END_SECONDS = 60.0
"""How long a server may take to end after SIGTERM, and its daemon after the server was killed."""
POLL_STOPPED_SECONDS = 0.001
"""The interval in which `wait_until_stopped` looks: the system tells no one but the parent of a process."""

# A stopped process cannot notice that its owner has ended. This shell can: it resumes the process when its stdin ends.
_HANG = 'kill -STOP "$1"; echo; read -r _; kill -CONT "$1" 2>/dev/null'


class ShapedServer:
    """A server of a `ShapedSwarm`. Its process can be ended and started again, its link can be shaped and broken.

    A restarted server has the name, the blocks, the identity and the address that it had, and nothing else.
    """

    def __init__(self, swarm: ShapedSwarm, name: str, span: str, options: Sequence[str], link: Link) -> None:
        self.name = name
        self.span = span
        self.peer = ""
        self._swarm = swarm
        self._options = options
        self._port = _free_port()
        self._proxy_port = swarm.proxies.open_proxy(self._port, link, link)
        self._starts = itertools.count()
        self._child: Child | None = None
        self._descendants: list[psutil.Process] = []
        self._stopper: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where other peers dial it: the address of its proxy."""
        return f"/ip4/{HOST}/tcp/{self._proxy_port}/p2p/{self.peer}"

    @property
    def process(self) -> Process:
        """The process of its last start. The server must have been started."""
        assert self._child is not None
        return self._child.process

    @property
    def is_running(self) -> bool:
        """Whether its process exists."""
        return self._child is not None and self.process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it runs and has reported that it serves. It may hang, or be cut off."""
        return self._child is not None and self._child.is_ready and self.is_running

    @property
    def log(self) -> str:
        """What it has printed since its last start."""
        return "" if self._child is None else self._child.log.read_text(errors="replace")

    # The process.

    def start(self) -> None:
        """Start it, and return before it serves: see `wait_until_ready`."""
        start = next(self._starts)
        children = self._swarm.children
        self._child = children.start(
            *(f"{self.name}.{start}" if start else self.name, "serve", self._swarm.model, "--name", self.name),
            *("--blocks", self.span, "--device", "cpu", "--host", HOST, "--port", str(self._port)),
            *("--announce", f"/ip4/{HOST}/tcp/{self._proxy_port}", "--identity", str(children.folder / self.name)),
            *self._swarm.join_options(self),
            *self._options,
            launch=self._swarm.launch,
        )

    def wait_until_ready(self) -> None:
        """Wait until it serves. Raises `SwarmError` if it ends instead."""
        assert self._child is not None
        for _ in self._swarm.children.wait_for([self._child], seconds=START_SECONDS):
            pass
        self.peer = self._child.facts["peer"]

    def kill(self) -> None:
        """End it with SIGKILL. Its streams end a moment later, when its daemon notices."""
        self._record_descendants()
        self.process.kill()
        self.process.wait()
        self.resume()

    def stop(self, *, wait: bool = True) -> None:
        """Ask it to leave with SIGTERM; unless `wait` is false, return when it has ended."""
        self._record_descendants()
        self.process.terminate()
        self.resume()
        if wait:
            self.process.wait(END_SECONDS)

    def restart(self, *, wait: bool = True) -> None:
        """Start it again; unless `wait` is false, return when it serves.

        A running server is killed first. One that is leaving may finish that.
        """
        if self.is_running and not self._descendants:
            self.kill()
        self._wait_until_gone()
        self.start()
        if wait:
            self.wait_until_ready()

    def hang(self) -> None:
        """Stop it with SIGSTOP: it computes nothing and sends nothing, but the system keeps its connections."""
        if self._stopper is None and self.is_running:
            command = ["/bin/sh", "-c", _HANG, "hang", str(self.process.pid)]
            self._stopper = subprocess.Popen(  # noqa: S603 - no argument comes from outside
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            assert self._stopper.stdout is not None
            self._stopper.stdout.readline()
            wait_until_stopped(psutil.Process(self.process.pid))

    def resume(self) -> None:
        """Let it continue after `hang`."""
        if self._stopper is not None:
            self._stopper.communicate()
            self._stopper = None

    # The network.

    def link(self, inward: Link, outward: Link | None = None) -> None:
        """Shape its connections with the peers that dialled it.

        `inward` is the link of what it receives, `outward` of what it sends; None is the same as `inward`.
        """
        self._swarm.proxies.set_link(self._port, inward, inward if outward is None else outward)

    def cut(self) -> None:
        """Reset all its connections, also those that it dialled, and refuse new ones until `heal`."""
        self._swarm.proxies.set_state(self._port, ProxyState.CUT)

    def black_hole(self) -> None:
        """Forward nothing in either direction, without an error, until `heal`."""
        self._swarm.proxies.set_state(self._port, ProxyState.BLACK_HOLE)

    def heal(self) -> None:
        """Undo `cut` and `black_hole`. Data that was held back arrives."""
        self._swarm.proxies.set_state(self._port, ProxyState.OPEN)

    @property
    def traffic(self) -> Traffic:
        """What its proxy has forwarded."""
        return self._swarm.proxies.traffic(self._port)

    def _record_descendants(self) -> None:
        """Note the processes that it has started: its daemon, and the shell that watches the daemon."""
        if self.is_running:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._descendants = psutil.Process(self.process.pid).children(recursive=True)

    def _wait_until_gone(self) -> None:
        """Wait until it has ended, and its descendants, which hold its port."""
        self.process.wait(END_SECONDS)
        psutil.wait_procs(self._descendants, timeout=END_SECONDS)
        self._descendants = []


class ShapedSwarm:
    """Servers on this machine, and the proxies between them. `shaped_swarm` makes it."""

    def __init__(self, model: str, children: Children, proxies: ProxyProcess, launch: Launch | None) -> None:
        self.model = model
        self.children = children
        self.proxies = proxies
        self.launch = launch
        self.servers: list[ShapedServer] = []

    @property
    def address(self) -> str:
        """The first server's address, to join by."""
        return self.servers[0].address

    @property
    def addresses(self) -> list[str]:
        """The addresses of all servers, to join by while some of them are down."""
        return [server.address for server in self.servers]

    def add(self, span: str, *options: str, link: Link | None = None) -> ShapedServer:
        """Add a server, which is not started yet."""
        server = ShapedServer(self, f"s{len(self.servers)}", span, options, link or Link())
        self.servers.append(server)
        return server

    def do(self, server: int, act: Act) -> None:
        """Carry out an `Event` without waiting for its effect."""
        method = getattr(self.servers[server], act.value)
        if act in (Act.STOP, Act.RESTART):
            method(wait=False)
        else:
            method()

    def wait_until_ready(self) -> None:
        """Wait until all running servers serve. Raises `SwarmError` if one ends instead."""
        for server in self.servers:
            if server.is_running:
                server.wait_until_ready()

    def join_options(self, newcomer: ShapedServer) -> tuple[str, ...]:
        """The options by which a starting server joins the others, or starts the swarm if there are none."""
        others = [each.address for each in self.servers if each is not newcomer and each.is_running and each.peer]
        return ("--initial-peers", *others) if others else ("--new-swarm",)


@contextlib.contextmanager
def shaped_swarm(
    model: str | Path,
    spans: Sequence[str],
    *,
    link: Link | Sequence[Link] | None = None,
    options: Sequence[str] = (),
    last_options: Sequence[str] = (),
    num_threads: int | None = 1,
    preloaded: bool = False,
) -> Iterator[ShapedSwarm]:
    """A context with a server for each span. All of them serve when it is entered, and have ended when it is left.

    `link` is the link of every server, or one for each, in both directions. All servers get the same `options` of
    `shoal serve`, the last one `last_options` as well. Each computes with `num_threads` threads; None leaves the number
    to PyTorch. `preloaded` servers are forks of one process that has imported PyTorch: where there are many, they start
    several times as fast.
    """
    links = [link] * len(spans) if link is None or isinstance(link, Link) else link
    with ProxyProcess() as proxies, Children(num_threads=num_threads) as children:
        swarm = ShapedSwarm(str(model), children, proxies, PreloadedProcess if preloaded else None)
        try:
            for span, its_link in zip(spans, links, strict=True):
                own = last_options if len(swarm.servers) == len(spans) - 1 else ()
                swarm.add(span, *options, *own, link=its_link)
            first, *others = swarm.servers
            first.start()
            first.wait_until_ready()
            for server in others:
                server.start()
            swarm.wait_until_ready()
            yield swarm
        finally:
            for server in swarm.servers:
                server.resume()


def _free_port() -> int:
    """A port that is free at this moment; the system chooses it."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_stopped(process: psutil.Process) -> None:
    """Wait until this process obeys SIGSTOP: other threads run on until its main thread has had a turn."""
    while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
        time.sleep(POLL_STOPPED_SECONDS)
