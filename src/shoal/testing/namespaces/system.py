"""Makes, uses and removes Linux network namespaces by the system's own programs.

A namespace is named after the process that made it. So what a killed process left behind is known, and removed by the
next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shoal.errors import UserError

FOLDER = Path("/run/netns")
"""Where `ip` keeps the namespaces that have names."""
_CLONE_NEWNET = 0x40000000
_NAME = re.compile(r"shoal-(\d+)-\w+")


def missing_for_namespaces() -> str | None:
    """Why this machine cannot make network namespaces, in plain English; None if it can."""
    if sys.platform != "linux":
        return "network namespaces are a feature of Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "nft", "nsenter") if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: iproute2, nftables, util-linux)"
    probe = f"shoal-{os.getpid()}-probe"
    try:
        add(probe)
        remove(probe)
    except UserError as failure:
        return str(failure)
    return None


def call(*command: str, within: str | None = None, text: str = "") -> str:
    """What a program prints, run inside a namespace if one is named, with `text` to read. Raises `UserError`."""
    answer = subprocess.run(  # noqa: S603 - the commands are ours
        [*(() if within is None else entering(within)), *command],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        reason = " ".join(answer.stderr.split()) or f"status {answer.returncode}"
        raise UserError(f"`{' '.join(command)}`: {reason}")
    return answer.stdout


def entering(namespace: str) -> tuple[str, ...]:
    """The words before a command that is to run inside a namespace. The command keeps the process id."""
    return ("nsenter", f"--net={FOLDER / namespace}", "--")


def add(namespace: str) -> None:
    """Make a namespace. It has nothing but its own loopback. Raises `UserError`."""
    call("ip", "netns", "add", namespace)
    call("ip", "link", "set", "lo", "up", within=namespace)


def remove(namespace: str) -> None:
    """End what still runs inside a namespace, and remove it with all of its links."""
    with contextlib.suppress(UserError):  # it is gone already
        for pid in call("ip", "netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        call("ip", "netns", "delete", namespace)


def remove_leftovers() -> None:
    """Remove the namespaces of processes that have ended."""
    for each in sorted(FOLDER.glob("shoal-*")) if FOLDER.is_dir() else ():
        made = _NAME.fullmatch(each.name)
        if made is not None and not Path("/proc", made[1]).exists():
            remove(each.name)


def connect(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Lay a cable between two namespaces: each end is a namespace and the name of an interface. Raises `UserError`."""
    (namespace, interface), (far, far_interface) = one, other
    ends = (interface, "type", "veth", "peer", "name", far_interface, "netns", far)
    call("ip", "link", "add", *ends, within=namespace)
    for place, name in (one, other):
        call("ip", "link", "set", name, "up", within=place)


def configure(namespace: str, settings: Sequence[str]) -> None:
    """Write kernel settings of a namespace, such as `net.ipv4.ip_forward=1`. Raises `UserError`."""
    for setting in settings:
        key, _, value = setting.partition("=")
        # The files under /proc/sys/net are those of the namespace that opens them.
        call("sh", "-c", f"echo {value} > /proc/sys/{key.replace('.', '/')}", within=namespace)


def socket_in(namespace: str, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
    """A socket that is in a namespace, while this process stays where it is. Raises `OSError`."""
    with Path("/proc/thread-self/ns/net").open() as here:
        enter(namespace)
        try:
            return socket.socket(family, kind)
        finally:
            _enter(here.fileno())


def enter(namespace: str) -> None:
    """Move this thread, and those that it will start, to a network namespace. Raises `OSError`."""
    with (FOLDER / namespace).open() as there:
        _enter(there.fileno())


def _enter(file: int) -> None:
    """Move this thread to the network namespace behind an open file: `os.setns` came with Python 3.12."""
    if ctypes.CDLL(None, use_errno=True).setns(file, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
