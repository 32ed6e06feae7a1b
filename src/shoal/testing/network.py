"""The proxies' process, as those see it who give it orders."""

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
from shoal.testing.reach import ProxyCommand


@dataclass(frozen=True)
class Traffic:
    """What has passed a door: connections that came to it, and bytes to the peer behind it and from it."""

    num_connections: int
    inward_bytes: int
    outward_bytes: int


class Network:
    """A context with doors in front of peers on this machine. An order is carried out when its method returns."""

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        # It ends with its stdin, hence with us.
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

    def open_door(self, peer_port: int, inward: Link, outward: Link) -> int:
        """A door for the peer that listens, or will listen, on this port; returns the port that it has to announce."""
        port: int = self._order("open", peer_port, inward=inward.to_json(), outward=outward.to_json())["port"]
        return port

    def link(self, peer_port: int, inward: Link, outward: Link) -> None:
        """Be another link for those who come to this peer's door."""
        self._order("link", peer_port, inward=inward.to_json(), outward=outward.to_json())

    def set_reach(self, peer_port: int, reach: ProxyCommand) -> None:
        self._order("reach", peer_port, reach=reach.value)

    def traffic(self, peer_port: int) -> Traffic:
        counts = self._order("count", peer_port)
        return Traffic(counts["connections"], counts["inward"], counts["outward"])

    def _order(self, do: str, peer_port: int, **rest: object) -> Any:
        with self._lock:
            try:
                print(json.dumps({"do": do, "peer_port": peer_port, **rest}), file=self._stdin, flush=True)
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
