"""What `shoal doctor` says of a machine: each finding, and what to do about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.cli.doctor.diagnosis import Finding, Health, diagnose
from shoal.cli.doctor.facts import Answered, Facts, MachineFacts, SwarmFacts, look_at_machine
from shoal.errors import BootstrapFailed
from shoal.net.transport import RelayTrial
from shoal.peers import ServerState
from shoal.policy.network.reachability import DialReport, Reach, Reachability

from .. import server_infos

OWN = "/ip4/192.168.1.2/tcp/4001/p2p/own"
PUBLIC = "93.184.216.34"
MACHINE = MachineFacts(
    cores=8,
    memory_free=int(20e9),
    memory_total=int(32e9),
    cache=Path("/cache"),
    cache_free=int(100e9),
    cache_is_writable=True,
    gpus=("NVIDIA RTX 4090, 24564 MiB, 550.54",),
    torch="2.13.0+cu126",
)


def report(number: int, *, came: bool = False, ahead: float = 0.1, seen: str = PUBLIC) -> DialReport:
    return DialReport(
        f"p{number}",
        0.0,
        dialled=(OWN,),
        reached=(OWN,) if came else (),
        is_outside=True,
        seen_at=f"/ip4/{seen}/tcp/5555",
        clock_ahead=ahead,
    )


def swarm(kind: Reachability, *reports: DialReport, **facts: object) -> SwarmFacts:
    answered = tuple(Answered(server_infos.info(f"s{number}", 0, 4, name=f"s{number}"), 0.02) for number in range(2))
    standard = SwarmFacts(Reach(kind, reports, ("relay",)), (OWN,), answered, relays=(), own=())
    return replace(standard, **facts)  # type: ignore[arg-type]


def findings(facts: MachineFacts | SwarmFacts) -> dict[str, Finding]:
    whole = Facts(facts) if isinstance(facts, MachineFacts) else Facts(MACHINE, facts)
    return {each.subject: each for each in diagnose(whole)}


def problems(facts: MachineFacts | SwarmFacts) -> set[str]:
    return {subject for subject, each in findings(facts).items() if each.health is Health.PROBLEM}


def test_a_good_machine_has_no_problem_and_learns_how_to_ask_about_the_network():
    assert problems(MACHINE) == set()
    assert "--initial-peers" in findings(MACHINE)["swarm"].hint


@pytest.mark.parametrize(
    ("change", "subject", "words"),
    [
        ({"memory_free": int(5e8)}, "memory", "end other programs"),
        ({"cache_is_writable": False}, "disk", "SHOAL_CACHE"),
        ({"gpus": ()}, "GPU", "nvidia-smi"),
        ({"torch": "2.13.0+cpu"}, "GPU", "built for CUDA"),
        ({"torch": ""}, "GPU", "pip install"),
    ],
)
def test_what_a_machine_lacks_is_a_problem_with_a_hint(change, subject, words):
    machine = replace(MACHINE, **change)
    assert problems(machine) == {subject}
    assert words in findings(machine)[subject].hint


def test_a_small_disk_is_a_note_and_no_problem():
    machine = replace(MACHINE, cache_free=int(1e9))
    assert findings(machine)["disk"].health is Health.NOTE
    assert problems(machine) == set()


def test_a_machine_without_a_gpu_is_fine():
    assert findings(replace(MACHINE, gpus=None, torch="2.13.0+cpu"))["GPU"].health is Health.FINE


def test_a_public_machine_that_others_dial_is_fine():
    public = f"/ip4/{PUBLIC}/tcp/4001/p2p/own"
    facts = swarm(Reachability.DIRECT, report(1, came=True), addresses=(public,))
    assert problems(facts) == set()
    assert "directly" in findings(facts)["reached"].text
    assert "members see it there too" in findings(facts)["addresses"].text


def test_behind_a_nat_without_relays_the_router_is_to_be_opened():
    facts = swarm(Reachability.UNREACHABLE, report(1), report(2))
    assert problems(facts) == {"reached"}
    assert f"--announce /ip4/{PUBLIC}/tcp/4001" in findings(facts)["reached"].hint
    assert "behind a NAT" in findings(facts)["addresses"].text


def test_behind_a_nat_with_relays_the_machine_is_reached_and_told_that_direct_is_faster():
    trials = (RelayTrial("/ip4/9.9.9.9/tcp/1/p2p/x", 0.25), RelayTrial("/ip4/8.8.8.8/tcp/1/p2p/y", None, "it is full"))
    facts = swarm(Reachability.RELAYED, report(1), relays=trials)
    assert problems(facts) == set()
    told = [each.text for each in diagnose(Facts(MACHINE, facts)) if each.subject == "relay"]
    assert told == [
        "9.9.9.9 carried a megabyte in 0.25 s",
        "8.8.8.8 does not carry anything for this machine: it is full",
    ]


@pytest.mark.parametrize(("ahead", "words"), [(300.0, "5 minutes behind"), (-300.0, "5 minutes ahead of")])
def test_a_wrong_clock_is_a_problem_whichever_way(ahead, words):
    facts = swarm(Reachability.DIRECT, report(1, came=True, ahead=ahead), report(2, came=True, ahead=ahead))
    assert problems(facts) == {"clock"}
    assert words in findings(facts)["clock"].text
    assert "2 members" in findings(facts)["clock"].text


def test_one_member_with_a_wrong_clock_does_not_make_this_one_wrong():
    reports = [report(number, came=True, ahead=300.0 if number == 1 else 0.2) for number in range(1, 4)]
    assert problems(swarm(Reachability.DIRECT, *reports)) == set()


def test_members_that_do_not_answer_are_named():
    one, other = swarm(Reachability.DIRECT).answered
    silent = replace(other, seconds=None)
    facts = swarm(Reachability.DIRECT, report(1, came=True), answered=(one, silent))
    assert "silent: s1" in findings(facts)["members"].text
    assert problems(facts) == set()
    alone = swarm(Reachability.DIRECT, report(1, came=True), answered=(silent,))
    assert problems(alone) == {"members"}


def test_servers_of_this_machine_do_not_count_as_members_that_answer():
    own, other = swarm(Reachability.DIRECT).answered
    beside = swarm(Reachability.DIRECT, report(1, came=True), own=(own.server,))
    assert findings(beside)["members"].text.startswith("1 of 1 servers answer")
    cut_off = replace(beside, answered=(own, replace(other, seconds=None)))
    assert findings(cut_off)["members"].text == "none of one member answers: s1"
    assert problems(cut_off) == {"members"}


def test_a_swarm_of_servers_of_this_machine_only_is_told_from_one_that_others_are_in():
    whole = swarm(Reachability.UNKNOWN)
    facts = replace(whole, own=tuple(each.server for each in whole.answered))
    assert "all of them are on this machine" in findings(facts)["members"].text
    assert findings(facts)["members"].health is Health.NOTE
    assert findings(facts)["reached"].hint == "only servers of this machine were asked"
    assert "older version" in findings(whole)["reached"].hint


def test_ways_in_of_a_code_at_which_no_member_answers_are_named():
    facts = swarm(Reachability.DIRECT, report(1, came=True), num_ways=3, silent_ways=("41.1.0.2 port 4001",))
    assert findings(facts)["code"] == Finding(
        "code",
        Health.NOTE,
        "no member answers at 1 of the 3 ways in of this code: 41.1.0.2 port 4001",
        "`shoal invite` prints a fresh code",
    )
    assert "code" not in findings(swarm(Reachability.DIRECT, report(1, came=True), num_ways=3))


def test_a_server_of_this_machine_that_others_cannot_reach_is_named():
    own = server_infos.info("me", 0, 4, ServerState.UNREACHABLE, name="laptop")
    facts = swarm(Reachability.DIRECT, report(1, came=True), own=(own,))
    assert problems(facts) == {"server"}
    assert "laptop" in findings(facts)["server"].text


def test_a_clock_that_is_some_seconds_off_is_a_note():
    facts = swarm(Reachability.DIRECT, report(1, came=True, ahead=10.0), report(2, came=True, ahead=10.0))
    assert findings(facts)["clock"].health is Health.NOTE
    assert problems(facts) == set()


def test_a_random_port_says_nothing_of_the_server_that_runs_here():
    own = server_infos.info("me", 0, 4, name="laptop")
    facts = swarm(Reachability.UNREACHABLE, report(1), own=(own,), is_random_port=True)
    assert problems(facts) == set()
    assert "chosen at random" in findings(facts)["reached"].hint
    assert problems(replace(facts, is_random_port=False)) == {"reached"}


def test_a_slow_network_is_told():
    facts = swarm(Reachability.DIRECT, report(1, came=True), partner="s0", up=1e4, down=5e6)
    assert findings(facts)["speed"].text == "0.01 MB/s up and 5 MB/s down with s0"
    assert findings(facts)["speed"].health is Health.NOTE


def test_what_keeps_a_machine_out_of_the_swarm_is_the_finding():
    failure = BootstrapFailed("no initial peer answers", hint="is it running?")
    (found,) = [each for each in diagnose(Facts(MACHINE, failure=failure)) if each.health is Health.PROBLEM]
    assert (found.subject, found.text, found.hint) == ("swarm", "no initial peer answers", "is it running?")


def test_this_machine_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "not" / "there"))
    machine = look_at_machine()
    assert machine.cores >= 1
    assert 0 < machine.memory_free <= machine.memory_total
    assert machine.cache_free > 0
    assert machine.cache_is_writable
    assert machine.torch
