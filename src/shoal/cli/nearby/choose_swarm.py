"""Lets the user choose among the swarms that are heard on the local network."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import typer

from shoal.cli.terminal.console import ProgressReporter, WrongUsage, waiting
from shoal.errors import SwarmError
from shoal.host.large_imports import large_imports
from shoal.joining.heard_swarms import MAX_SWARMS, HeardSwarm, Hearing, listen
from shoal.joining.invite_code import MAX_WAYS, InviteCode
from shoal.policy.view import format_blocks

if TYPE_CHECKING:
    from shoal.joining.checked_swarms import Dialler
    from shoal.joining.lan import Lan
    from shoal.net.addressing.own_addresses import Interface

_HOW = "use one of the lines above"
_ASK = "ask a member for a code, which `shoal invite` prints"
LISTENING = "Listening for swarms on the local network"


def choose_swarm(*, yes: bool) -> InviteCode:
    """The code of the swarm that the user chooses, or with `yes` of the only one.

    Raises `SwarmError` if none is heard, `WrongUsage` if the user cannot be asked, `typer.Exit` if they want none.
    """
    from shoal.joining.multicast import MulticastLan
    from shoal.net.addressing.own_addresses import lan_interfaces

    interfaces = lan_interfaces()
    swarms = hear_swarms(MulticastLan(), interfaces)
    with waiting("Importing the network"), large_imports():
        import shoal.net.libp2p.hash_table.dht_directory  # noqa: F401 - imported here because the import is slow
        from shoal.joining.checked_swarms import Libp2pDialler
    shown = check_swarms(swarms[:MAX_SWARMS], interfaces, Libp2pDialler())
    print("\n".join(listed(shown, num_more=len(swarms) - len(shown))), flush=True)
    chosen = choose(shown, yes=yes, ask=input if sys.stdin.isatty() else None)
    return chosen.code(MAX_WAYS)


def hear_swarms(lan: Lan, interfaces: Sequence[Interface]) -> tuple[HeardSwarm, ...]:
    """The swarms that members announce by these interfaces. Raises `SwarmError` if there are none."""
    if not interfaces:
        raise SwarmError("this machine is in no local network", hint=f"{_ASK}, and use `shoal join CODE`")
    with waiting(LISTENING) as reporter:
        swarms = asyncio.run(listen(lan, interfaces, report=lambda hearing: _show(reporter, hearing)))
    if not swarms:
        networks = ", ".join(sorted({str(each.network) for each in interfaces}))
        raise SwarmError(
            f"no swarm is heard on the local network ({networks})",
            hint=f"does a firewall or a guest network stop multicast DNS (UDP port 5353)? Else {_ASK}",
        )
    return swarms


def _show(reporter: ProgressReporter, hearing: Hearing) -> None:
    reporter.show(LISTENING, step=_count(hearing.num_members, "member") + " heard")


def check_swarms(
    swarms: Sequence[HeardSwarm], interfaces: Sequence[Interface], dialler: Dialler
) -> tuple[HeardSwarm, ...]:
    """The swarms, with what their members answer about them; those that answer stand first."""
    from shoal.joining.checked_swarms import checked

    with waiting("Asking the members what they serve"):
        found = asyncio.run(checked(swarms, interfaces, dialler))
    return tuple(sorted(found, key=lambda swarm: swarm.invitation is None))


def listed(swarms: Sequence[HeardSwarm], *, num_more: int = 0) -> list[str]:
    """The lines that show the swarms, with the command for each."""
    lines = ["Swarms on the local network:"]
    for number, swarm in enumerate(swarms, 1):
        lines += [f"{number:>3}  {described(swarm)}", f"     shoal join {swarm.code()}"]
    return [*lines, *([f"     and {num_more} more"] if num_more else []), ""]


def described(swarm: HeardSwarm) -> str:
    """A swarm in a line. What no member has proved is marked as said."""
    says = "" if swarm.invitation is not None else "says it is "
    form = "" if swarm.quantization == "none" else f", {swarm.quantization}"
    holds = f"; they lack blocks {format_blocks(swarm.missing)}" if swarm.missing else ""
    return f"{says}{swarm.model}, {swarm.dtype}{form}: {_count(swarm.num_members, 'member')} heard{holds}"


def choose(swarms: Sequence[HeardSwarm], *, yes: bool, ask: Callable[[str], str] | None) -> HeardSwarm:
    """The swarm that the user chooses. `ask` shows a question and returns the answer; None if no user is there.

    Raises `WrongUsage` and `typer.Exit` as `choose_swarm` does. What `ask` raises on Ctrl-C comes through.
    """
    is_only = len(swarms) == 1
    if yes and is_only:
        return swarms[0]
    if yes:
        raise WrongUsage(f"{len(swarms)} swarms are heard, and --yes takes the only one", hint=_HOW)
    if ask is None:
        raise WrongUsage(
            "which swarm? stdin is not a terminal, so you cannot be asked", hint=f"{_HOW}; --yes takes the only one"
        )
    question = "Join it? [Y/n] " if is_only else f"Which one? [1-{len(swarms)}, n for none] "
    while True:
        try:
            answer = ask(question).strip().lower()
        except EOFError:
            raise typer.Exit from None
        if answer in ("n", "no", "q"):
            raise typer.Exit
        if is_only and answer in ("", "y", "yes"):
            return swarms[0]
        if answer.isascii() and answer.isdigit() and 0 < int(answer[:4]) <= len(swarms):
            return swarms[int(answer[:4]) - 1]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
