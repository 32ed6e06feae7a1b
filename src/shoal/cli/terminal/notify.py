"""Words to the service manager that started this process: systemd's sd_notify protocol, without its library."""

from __future__ import annotations

import contextlib
import os
import socket

NOTIFY_SOCKET = "NOTIFY_SOCKET"


def notify(**state: str) -> None:
    """Tell systemd this state, such as `READY="1"` or `STATUS="Loading the blocks"`. Does nothing under anything else.

    A datagram that cannot be sent is dropped: a service must not fail because of its supervisor.
    """
    place = os.environ.get(NOTIFY_SOCKET, "")
    if not place.startswith(("/", "@")):
        return
    message = "\n".join(f"{name}={' '.join(value.split())}" for name, value in state.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(message.encode(), f"\0{place[1:]}" if place.startswith("@") else place)
