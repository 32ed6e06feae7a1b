"""Starts the process of the TCP proxies, and controls it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any, Self

from shoal.errors import SwarmError
from shoal.testing.link import Link
from shoal.testing.proxy_state import ProxyState


@dataclass(frozen=True)
class Traffic:
    """What a proxy has forwarded: the connections it accepted, and the bytes to its peer and from it."""

    num_connections: int
    inward_bytes: int
    outward_bytes: int


class ProxyProcess:
    """A context with a process of TCP proxies in front of peers on this machine.

    A command has been carried out when its method returns. Every method raises `SwarmError` if the process has ended.
    """

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        # The process ends when its stdin closes, hence when this process ends.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shoal.testing.proxy"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._stdin.close()
        self._process.wait()
        self._stdout.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def open_proxy(self, peer_port: int, inward: Link, outward: Link) -> int:
        """Open a proxy for the peer that listens, or will listen, on this port.

        Returns the proxy's port, which the peer has to announce.
        """
        port: int = self._command("open", peer_port, inward=inward.to_json(), outward=outward.to_json())["port"]
        return port

    def set_link(self, peer_port: int, inward: Link, outward: Link) -> None:
        """Replace the link of this peer's proxy."""
        self._command("set_link", peer_port, inward=inward.to_json(), outward=outward.to_json())

    def set_state(self, peer_port: int, state: ProxyState) -> None:
        """Set whether this peer's proxy forwards, refuses or holds back connections."""
        self._command("set_state", peer_port, state=state.value)

    def traffic(self, peer_port: int) -> Traffic:
        """What this peer's proxy has forwarded so far."""
        counts = self._command("count", peer_port)
        return Traffic(counts["connections"], counts["inward"], counts["outward"])

    def _command(self, name: str, peer_port: int, **arguments: object) -> Any:
        with self._lock:
            try:
                line = json.dumps({"command": name, "peer_port": peer_port, **arguments})
                print(line, file=self._stdin, flush=True)
                answer = self._stdout.readline()
            except OSError:
                answer = ""
        if not answer:
            raise SwarmError(f"the proxies ended with status {self._process.wait()}")
        return json.loads(answer)

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    @property
    def _stdout(self) -> Any:
        return self._process.stdout
