"""What the facts of a machine mean, and what to do about them: pure, so that each scene has its words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from shoal.cli.doctor.facts import Facts, MachineFacts, SwarmFacts
from shoal.net.addressing.local_hosts import is_local, is_public_host
from shoal.net.addressing.reach_words import finding, seen_host, to_do
from shoal.peers import ServerState
from shoal.policy.network.clocks import clock_error
from shoal.policy.network.reachability import Reachability

GB = 1e9
LITTLE_MEMORY = 1 * GB
LITTLE_DISK = 5 * GB
SLOW_SECONDS = 0.5
SLOW_BYTES = 0.25e6
"""Bytes per second with which a token takes long: hidden states of large models are tens of kilobytes."""


class Health(StrEnum):
    """How bad a finding is."""

    FINE = "fine"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """What was found about a subject, and what to do about it."""

    subject: str
    health: Health
    text: str
    hint: str = ""


def diagnose(facts: Facts) -> list[Finding]:
    """What all facts mean, in the order in which a person would ask."""
    found = [*_machine(facts.machine)]
    if facts.failure is not None:
        found.append(Finding("swarm", Health.PROBLEM, str(facts.failure), facts.failure.hint or ""))
    elif facts.swarm is None:
        hint = "give a code or --initial-peers to learn whether others reach this machine"
        found.append(Finding("swarm", Health.NOTE, "no swarm was named", hint))
    else:
        found += _swarm(facts.swarm)
    return found


def _machine(machine: MachineFacts) -> Iterator[Finding]:
    yield Finding("processor", Health.FINE, f"{machine.cores} cores")
    text = f"{machine.memory_free / GB:.1f} of {machine.memory_total / GB:.1f} GB are free"
    if machine.memory_free < LITTLE_MEMORY:
        yield Finding("memory", Health.PROBLEM, text, "end other programs: blocks and their caches need more")
    else:
        yield Finding("memory", Health.FINE, text)
    text = f"{machine.cache_free / GB:.1f} GB are free where weights are kept, in {machine.cache}"
    if not machine.cache_is_writable:
        text = f"weights cannot be kept in {machine.cache}: it is not writable"
        yield Finding("disk", Health.PROBLEM, text, "choose another folder with SHOAL_CACHE")
    elif machine.cache_free < LITTLE_DISK:
        yield Finding("disk", Health.NOTE, text, "make room, or choose another disk with SHOAL_CACHE")
    else:
        yield Finding("disk", Health.FINE, text)
    yield _gpu(machine)


def _gpu(machine: MachineFacts) -> Finding:
    if not machine.torch:
        return Finding("GPU", Health.PROBLEM, "PyTorch is not installed", "pip install shoal")
    if machine.gpus is None:
        return Finding("GPU", Health.FINE, f"none with NVIDIA's driver; PyTorch {machine.torch} computes on the CPU")
    if not machine.gpus:
        text = "NVIDIA's driver does not answer"
        return Finding("GPU", Health.PROBLEM, text, "nvidia-smi says why; a restart often helps after an update")
    names = "; ".join(machine.gpus)
    if "+cpu" in machine.torch:
        hint = "install one from https://pytorch.org that is built for CUDA"
        return Finding("GPU", Health.PROBLEM, f"{names}: PyTorch {machine.torch} cannot use it", hint)
    return Finding("GPU", Health.FINE, f"{names}; PyTorch {machine.torch}")


def _swarm(swarm: SwarmFacts) -> Iterator[Finding]:
    if swarm.silent_ways:
        silent = f"{len(swarm.silent_ways)} of the {swarm.num_ways} ways in of this code"
        text = f"no member answers at {silent}: {', '.join(swarm.silent_ways)}"
        yield Finding("code", Health.NOTE, text, "`shoal invite` prints a fresh code")
    yield _clock(swarm)
    yield _addresses(swarm)
    yield _reach(swarm)
    yield from _relays(swarm)
    yield _members(swarm)
    if swarm.partner:
        yield _speed(swarm)
    for server in swarm.own:
        name = server.name or server.peer[-6:]
        if server.state is ServerState.UNREACHABLE:
            text = f"the server {name} of this machine is announced as unreachable"
            yield Finding("server", Health.PROBLEM, text, "its log says which port to open, and what to announce")
        else:
            text = f"the server {name} of this machine is {server.state.value} with blocks {server.span}"
            yield Finding("server", Health.FINE, text)


def _clock(swarm: SwarmFacts) -> Finding:
    ahead = [-report.clock_ahead for report in swarm.reach.reports]
    if not ahead:
        return Finding("clock", Health.NOTE, "no member told its time")
    error = clock_error(ahead)
    if error is None:
        seconds = min(map(abs, ahead))
        return Finding("clock", Health.FINE, f"within {seconds:.1f} s of that of {_members_of(len(ahead))}")
    return Finding("clock", Health.NOTE if error.is_usable else Health.PROBLEM, str(error), error.hint)


def _members_of(number: int) -> str:
    return "one member" if number == 1 else f"{number} members"


def _addresses(swarm: SwarmFacts) -> Finding:
    hosts = [address.split("/")[2] for address in swarm.addresses if "/p2p-circuit" not in address]
    useful = sorted({host for host in hosts if is_public_host(host) or not is_local(host)}) or hosts
    seen = seen_host(swarm.reach.reports)
    text = f"this machine knows itself as {', '.join(useful)}"
    if seen is None:
        return Finding("addresses", Health.FINE, text)
    if str(seen) in hosts:
        return Finding("addresses", Health.FINE, f"{text}; members see it there too")
    return Finding("addresses", Health.NOTE, f"{text}; members see it as {seen}: it is behind a NAT")


def _reach(swarm: SwarmFacts) -> Finding:
    text, hint = finding(swarm.reach), to_do(swarm.reach, swarm.addresses)
    match swarm.reach.kind:
        case Reachability.DIRECT:
            return Finding("reached", Health.FINE, text)
        case Reachability.RELAYED:
            hint = "direct is faster: open the port in the router and --announce it, if you can"
            return Finding("reached", Health.NOTE, text, hint)
        case Reachability.UNKNOWN:
            hint = "members of an older version do not tell"
            if swarm.answered and not swarm.others:
                hint = "only servers of this machine were asked"
            return Finding("reached", Health.NOTE, text, hint)
        case Reachability.UNREACHABLE if swarm.is_random_port and swarm.own:
            # What holds for this port need not hold for the one of the server that runs here.
            note = "this is about a port chosen at random; the server's own state is below"
            return Finding("reached", Health.NOTE, text, note)
    return Finding("reached", Health.PROBLEM, text, hint)


def _relays(swarm: SwarmFacts) -> Iterator[Finding]:
    for trial in swarm.relays:
        host = trial.relay.split("/")[2]
        if trial.seconds is None:
            yield Finding("relay", Health.NOTE, f"{host} does not carry anything for this machine: {trial.why}")
        else:
            yield Finding("relay", Health.FINE, f"{host} carried a megabyte in {trial.seconds:.2g} s")


def _members(swarm: SwarmFacts) -> Finding:
    if not swarm.answered:
        return Finding("members", Health.NOTE, "this swarm has no servers yet", "`shoal serve` or `shoal up` add one")
    asked = swarm.others or swarm.answered
    seconds = sorted(each.seconds for each in asked if each.seconds is not None)
    silent = [each.server.name or each.server.peer[-6:] for each in asked if each.seconds is None]
    if not seconds:
        text = f"none of {_members_of(len(silent))} answers: {', '.join(silent)}"
        return Finding("members", Health.PROBLEM, text, "a firewall that lets nothing out would do that")
    answer = f"{len(seconds)} of {len(asked)} servers answer, the nearest in {seconds[0] * 1e3:.3g} ms"
    relayed = sum(each.is_relayed for each in asked)
    text = answer + (f", {relayed} of them through relays" if relayed else "")
    if silent:
        return Finding("members", Health.NOTE, f"{text}; silent: {', '.join(silent)}")
    if not swarm.others:
        hint = "others can `shoal join`; those that did are cut off from this machine"
        return Finding("members", Health.NOTE, f"{text}; all of them are on this machine", hint)
    slow = seconds[0] > SLOW_SECONDS
    hint = "each token makes such a trip for each server: a swarm that is nearer is faster" if slow else ""
    return Finding("members", Health.NOTE if slow else Health.FINE, text, hint)


def _speed(swarm: SwarmFacts) -> Finding:
    rates = {"up": swarm.up, "down": swarm.down}
    parts = [f"{rate / 1e6:.3g} MB/s {name}" for name, rate in rates.items() if rate is not None]
    if not parts:
        return Finding("speed", Health.NOTE, f"{swarm.partner} did not measure it with this machine")
    is_slow = any(rate is not None and rate < SLOW_BYTES for rate in rates.values())
    hint = "prompts and training will wait for the network" if is_slow else ""
    text = f"{' and '.join(parts)} with {swarm.partner}"
    return Finding("speed", Health.NOTE if is_slow else Health.FINE, text, hint)
