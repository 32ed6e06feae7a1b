"""How machines join from everywhere: scenes in an internet of namespaces, each with what a user does in it.

Each scene starts a swarm with `shoal serve`, lets others `shoal join` by its code, and has a story told by `shoal
generate`. A link goes in the middle of it. The story must be the one that plain Transformers tells. Beside it, `shoal
doctor` must say the words above the scene where something is in the way. A scene that fails raises `SceneFailed`, with
what a user saw. `python -m tests.net.scenes` plays them and prints a row for each: its name, how long it took, how long
the doctor took on each host, and whether it passes.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ShoalError
from shoal.joining.invite_code import InviteCode
from shoal.testing.namespaces import Home, Host, Nat
from tests.net.doctor_visit import seconds_of
from tests.net.stage import LAST, SceneFailed, Stage, Telling, known_speeds, stage

MINUTES_OFF = 5


MACHINES = ("first", "one", "other", "client")


def lose_one(at: Stage, first: Host, one: Host, other: Host, client: Host, *, says: Mapping[Host, str]) -> None:
    """Two machines join the first one, with the same blocks. One that is in use is cut off in the middle of a story.

    While they join, the doctor says this.
    """
    code = at.up(first)
    with at.doctor(says, code):
        at.join(one, other, code=code)
    at.tell(client, code, middle=lambda telling: {"one": one, "other": other}[telling.server].cut())


IN_A_LAN = """
    clock      ok  within # s of that of one member
    addresses  ok  this machine knows itself as 192.168.1.#; members see it there too
    reached    ok  other machines reach this one directly (1 peer tried)
    members    ok  # of # servers answer, the nearest in # ms
"""


def on_a_lan(at: Stage) -> None:
    """All machines are on one LAN."""
    home = at.net.home("lan")
    first, one, other, client = (home.host(name) for name in MACHINES)
    lose_one(at, first, one, other, client, says={client: IN_A_LAN})


def beside_containers(at: Stage) -> None:
    """Each machine of the LAN has bridges to containers of its own, with the same addresses everywhere."""
    home = at.net.home("lan")
    first, one, other, laptop = hosts = [home.host(name) for name in ("first", "one", "other", "laptop")]
    for host in hosts:
        host.add_bridge("docker0", "172.17.0.1/16")
        host.add_bridge("br-0f1e2d3c4b5a", "172.18.0.1/16")
        host.add_bridge("virbr0", "192.168.122.1/24")
    code = at.up(first)
    with at.doctor({laptop: IN_A_LAN}, code):  # which names no address of a bridge
        joined = at.join(one, other, code=code)
    for each in (code, *(at.fact(child, "code") for child in joined)):
        if strange := [way.host for way in InviteCode.parse(each).ways if not way.host.startswith("192.168.1.")]:
            raise SceneFailed(f"a code has {strange}")
    for child in joined:
        if not child.facts["address"].startswith("/ip4/192.168.1."):
            raise SceneFailed(f"the printed address is {child.facts['address']}")
    at.tell(laptop, code, middle=lambda telling: {"one": one, "other": other}[telling.server].cut())


PUBLIC = """
    clock      ok  within # s of that of one member
    addresses  ok  this machine knows itself as {client}; members see it there too
    reached    ok  other machines reach this one directly (1 peer outside of its network tried)
    relay      ok  {first} carried a megabyte in # s
    members    ok  # of # servers answer, the nearest in # ms
"""


def in_public(at: Stage) -> None:
    """All machines have public addresses."""
    first, one, other, client = (at.net.host(name) for name in MACHINES)
    words = PUBLIC.format(client=client.address, first=first.address)
    lose_one(at, first, one, other, client, says={client: words})


def lossy(at: Stage) -> None:
    """One packet of a hundred is lost."""
    at.net.lose(0.01)
    in_public(at)


BEHIND_A_NAT = """
    clock      ok    within # s of that of one member
    addresses  note  this machine knows itself as 192.168.1.10; members see it as {home}: it is behind a NAT
    reached    note  other machines reach this one through 1 relay
                     direct is faster: open the port in the router and --announce it, if you can
    relay      ok    {public} carried a megabyte in # s
    members    any   # of # servers answer, the nearest in # ms...
"""
"""The others that are behind NATs may be about to join, and silent."""


def home_beside_public(at: Stage, nat: Nat) -> None:
    """One public machine, and one behind a NAT, which finds its relays itself, and whose link is lost for a moment."""
    public, client = at.net.host("public"), at.net.host("client")
    home = at.net.home("home", nat)
    inside = home.host("inside")
    code = at.up(public)
    with at.doctor({inside: BEHIND_A_NAT.format(home=home.address, public=public.address)}, code):
        at.join(inside, code=code)
    at.tell(client, code, middle=flap(home))


def two_homes(at: Stage) -> None:
    """Two homes behind NATs without an open port, and one public machine. The client is in one of the homes."""
    east, west = at.net.home("east"), at.net.home("west", Nat.SYMMETRIC)
    public, one, other, client = at.net.host("public"), east.host("one"), west.host("other"), east.host("client")
    says = {
        host: BEHIND_A_NAT.format(home=home.address, public=public.address)
        for host, home in ((one, east), (other, west))
    }
    lose_one(at, public, one, other, client, says=says)


BY_THE_CODE_OF_THE_DEAD = """
    swarm  problem  no member answers at {first} port #
                    ask for a fresh code (`shoal invite` prints one); is the port open?
"""
BY_ANOTHER_CODE = """
    code       note  no member answers at 1 of the 2 ways in of this code: {first} port #
                     `shoal invite` prints a fresh code
    clock      ok    within # s of that of one member
    addresses  ok    this machine knows itself as {client}; members see it there too
    reached    ok    other machines reach this one directly (1 peer outside of its network tried)
    relay      ok    {helper} carried a megabyte in # s
    members    any   2 of # servers answer, the nearest in # ms...
"""
"""The first machine may be in the directory for a while, and silent."""


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
    dead = BY_THE_CODE_OF_THE_DEAD.format(first=first.address)
    live = BY_ANOTHER_CODE.format(first=first.address, client=client.address, helper=helper.address)
    with at.doctor({client: dead}, brought), at.doctor({client: live}, code):
        at.tell(client, code)


CLOCK = """
    swarm  problem  this machine's clock is 5 minutes {way} that of 2 members
                    set the clock: `timedatectl set-ntp true` lets the network do it
"""


def clients_clock(at: Stage) -> None:
    """The clocks of two clients are off, in either direction."""
    first, one, late, early = (at.net.host(name) for name in ("first", "one", "late", "early"))
    code = at.up(first)
    at.join(one, code=code)
    late.set_clock(-60 * MINUTES_OFF)
    early.set_clock(60 * MINUTES_OFF)
    with at.doctor({early: CLOCK.format(way="ahead of")}, code, "--json"):
        try:
            at.tell(late, code)
        except SceneFailed as failure:
            if "this machine's clock is 5 minutes behind that of 2 members" not in str(failure):
                raise
        else:
            raise SceneFailed("it generates, although it holds all records for invalid")
        if "this machine's clock is 5 minutes ahead of that of 2 members" not in (seen := at.status(early, code)):
            raise SceneFailed(f"status: {seen}")


def servers_clock(at: Stage) -> None:
    """The clock of a machine that wants to join is off."""
    first, one, late = (at.net.host(name) for name in ("first", "one", "late"))
    code = at.up(first)
    at.join(one, code=code)
    late.set_clock(-60 * MINUTES_OFF)
    with at.doctor({late: CLOCK.format(way="behind")}, code):
        try:
            at.join(late, code=code)
        except SceneFailed as failure:
            if "this machine's clock is 5 minutes behind that of 2 members" not in str(failure):
                raise
        else:
            raise SceneFailed("it joined, and is not in the directory")


CUT_OFF = """
    code       note  no member answers at 1 of the 2 ways in of this code: {first} port #
                     `shoal invite` prints a fresh code
    clock      note  no member told its time
    addresses  ok    this machine knows itself as {one}
    reached    note  no other peer has tried yet to reach this machine
                     only servers of this machine were asked
    members    note  1 of 1 servers answer, the nearest in # ms; all of them are on this machine
                     others can `shoal join`; those that did are cut off from this machine
    server     ok    the server one of this machine is online with blocks 0:6
"""


def separated(at: Stage) -> None:
    """Two servers whose blocks follow each other cannot reach each other. The client carries the tensors."""
    first, one, client = (at.net.host(name) for name in ("first", "one", "client"))
    code = at.up(first)
    joined = at.join(one, code=code)[0]
    at.net.separate(first, one)
    with at.doctor({one: CUT_OFF.format(first=first.address, one=one.address)}, at.fact(joined, "code")):
        at.tell(client, code)


BY_NAMED_RELAYS = """
    addresses  ok    this machine knows itself as 192.168.1.10
    reached    note  other machines reach this one through 4 relays
                     direct is faster: open the port in the router and --announce it, if you can
    relay      ok    {relay} carried a megabyte in # s
    members    ok    1 of 1 servers answer, the nearest in # ms
    speed      ok    # MB/s up and # MB/s down with public
    server     ok    the server inside of this machine is online with blocks 0:6
"""


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
    with at.doctor({inside: BY_NAMED_RELAYS.format(relay=hosts[0].address)}, code, *named):
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
    "open": Scene(on_a_lan, by_hand="containers is the same with more in the way"),
    "containers": Scene(beside_containers),
    "full-cone": Scene(functools.partial(home_beside_public, nat=Nat.FULL_CONE)),
    "port-restricted": Scene(functools.partial(home_beside_public, nat=Nat.PORT_RESTRICTED)),
    "symmetric": Scene(functools.partial(home_beside_public, nat=Nat.SYMMETRIC)),
    "two-homes": Scene(two_homes),
    "ipv6": Scene(in_public, versions=(6,)),
    "dead-bootstrap": Scene(dead_bootstrap),
    "clients-clock": Scene(clients_clock),
    "servers-clock": Scene(servers_clock),
    "loss": Scene(lossy),
    "separated": Scene(separated, by_hand="tests/swarm/test_ring.py has such servers, in memory"),
    "restarted-relays": Scene(restarted_relays, by_hand="tests/net/test_reach.py restarts a relay"),
}
"""The scenes by their names."""
HOMES = ("full-cone", "port-restricted", "symmetric", "two-homes")
"""Those that `test_homes.py` plays; `test_ways_in.py` plays the others that are in a test."""


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
            print(f"| {name} | {time.monotonic() - began:.0f} s | {seconds_of(at.visits)} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
