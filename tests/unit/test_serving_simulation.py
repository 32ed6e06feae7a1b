"""One simulated server under every rule: no job is lost, none starves, and equal seeds give equal tables."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_rules import Choice, EngineView, first_come
from shoal.simulator.serving.__main__ import run
from shoal.simulator.serving.comparison import Policy, chosen_policies, compare, policies, saturation
from shoal.simulator.serving.generating import serve
from shoal.simulator.serving.generations import (
    WORKLOADS,
    Generation,
    Lengths,
    Workload,
    at_rate,
    generations,
    read_trace,
)
from shoal.simulator.serving.page_counts import PageCounts
from shoal.simulator.serving.server_setup import Part, ServerSetup

SMALL = ServerSetup(num_pages=48)
SHORT = Workload(Lengths(50.0, 0.9, 200), Lengths(40.0, 0.9, 120))
ALL = list(policies(SMALL).values())
NEVER_PREEMPT = ("run-to-completion", "iteration-level")


def every_policy() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("policy", ALL, ids=[policy.name for policy in ALL])


# -- what holds under every rule ------------------------------------------------------------------------------------


@every_policy()
@given(seed=st.integers(0, 1000), rate=st.sampled_from([0.5, 3.0, 20.0]), pages=st.integers(20, 100))
@example(seed=214, rate=3.0, pages=25)  # where waiting sessions held all pages, those of prompts that were known
@settings(max_examples=5, deadline=None)
def test_every_job_ends_once_and_pages_are_never_negative_nor_lost(policy: Policy, seed: int, rate: float, pages: int):
    jobs = generations(SHORT, 25, rate=rate, seed=seed)
    served = serve(jobs, replace(policy.setup, num_pages=pages), policy.rule)  # pages are checked after each pass
    assert Counter(one.job.number for one in served.completed) == Counter(range(len(jobs)))
    assert all(one.job.arrives_at < one.first_at <= one.ended_at for one in served.completed)


@every_policy()
def test_no_token_is_computed_twice_unless_a_session_lost_its_pages(policy: Policy):
    jobs = generations(SHORT, 40, rate=3.0, seed=1)
    served = serve(jobs, replace(policy.setup, num_pages=1000), policy.rule)
    assert served.num_preempted == 0
    assert served.num_tokens == {job.number: job.num_prompt + job.num_answer - 1 for job in jobs}
    crowded = serve(jobs, replace(policy.setup, num_pages=policy.setup.num_pages * 3 // 4), policy.rule)
    assert (crowded.num_preempted > 0) == (policy.name not in NEVER_PREEMPT)
    assert crowded.num_recomputed >= 0
    needed = {job.number: job.num_prompt + job.num_answer - 1 for job in jobs}
    assert all(crowded.num_tokens[job] >= tokens for job, tokens in needed.items())
    assert (crowded.num_recomputed > 0) == (crowded.num_preempted > 0)


@every_policy()
def test_equal_seeds_give_equal_runs_and_others_do_not(policy: Policy):
    def ends(seed: int) -> list[float]:
        served = serve(generations(SHORT, 20, rate=3.0, seed=seed), policy.setup, policy.rule)
        return [one.ended_at for one in served.completed]

    assert ends(1) == ends(1)
    assert ends(1) != ends(2)


PATIENT = Limits(queue_length=1 << 20, queue_seconds=1e6)
"""Otherwise jobs of an overloaded server are turned away before a rule sees them."""


@pytest.mark.parametrize("policy", [each for each in ALL if not each.may_starve], ids=lambda policy: policy.name)
def test_a_long_job_ends_although_short_ones_come_faster_than_they_can_be_computed(policy: Policy):
    setup = replace(policy.setup, limits=PATIENT)
    short = generations(Workload(Lengths(30.0, 0.3, 60), Lengths(10.0, 0.3, 20)), 300, rate=10.0, seed=3)
    long = replace(short[20], num_prompt=300, num_answer=60, max_answer=60)
    served = serve([*short[:20], long, *short[21:]], setup, policy.rule)
    (ended_at,) = (one.ended_at for one in served.completed if one.job.number == long.number)
    # Of the 300 short jobs, 210 to 280 end later. With pooled pages, where sessions take them from each other all the
    # time, it is 58 to 210, by the seed.
    part = 6 if policy.name.startswith("pooled") else 2
    assert sum(one.ended_at > ended_at for one in served.completed) > len(short) / part


# -- what the rules are for -----------------------------------------------------------------------------------------


def test_running_to_completion_is_worst_when_there_is_much_to_do():
    jobs = generations(SHORT, 40, rate=1.0, seed=2)
    rows = compare(jobs, ALL, [0.9], saturated_rate=saturation(jobs, SMALL))
    worst = max(rows, key=lambda row: row.mean)
    assert worst.policy == "run-to-completion"
    assert worst.p95 == max(row.p95 for row in rows)


def test_all_rules_are_alike_when_there_is_little_to_do():
    jobs = generations(SHORT, 60, rate=1.0, seed=2)
    setup = replace(SMALL, num_pages=1000)
    rows = compare(jobs, chosen_policies(setup, ("paging", "fair", "first-come")), [0.05], saturated_rate=4.0)
    assert max(row.mean for row in rows) < 1.1 * min(row.mean for row in rows)
    assert all(row.preempted == row.recomputed == 0 for row in rows)


def test_first_come_takes_pages_only_for_sessions_that_came_before():
    taken: list[tuple[float, float]] = []

    def watched(view: EngineView) -> Choice:
        choice = first_come(view)
        if choice.preempted is not None:
            working = [holder.since for holder in view.holders if not holder.is_idle(view.now)]
            taken.append((view.holders[choice.preempted].since, max(working)))
        return choice

    serve(generations(SHORT, 100, rate=5.0, seed=4), replace(SMALL, num_pages=36), watched)
    assert taken
    assert all(since == last for since, last in taken)


@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_a_job_is_replayed_under_first_come_at_most_once_for_each_job_before_it(seed: int):
    jobs = generations(SHORT, 60, rate=5.0, seed=seed)
    replays = Counter[str]()

    def watched(view: EngineView) -> Choice:
        choice = first_come(view)
        if choice.preempted is not None:
            replays[view.holders[choice.preempted].peer] += 1
        return choice

    serve(jobs, SMALL, watched)
    assert all(replays[job.peer] <= job.number for job in jobs)
    assert replays.total() <= len(jobs)


def test_pages_that_others_lend_slow_down_the_passes_that_use_them():
    jobs = generations(SHORT, 60, rate=3.0, seed=6)
    paging, near, far = chosen_policies(SMALL, ("paging", "pooled-near", "pooled-far"))
    alone, pooled, slow = compare(jobs, (paging, near, far), [1.0], saturated_rate=3.0)
    assert pooled.mean < alone.mean < slow.mean
    assert pooled.mean_first < alone.mean_first


# -- the parts ------------------------------------------------------------------------------------------------------


def test_a_pass_takes_time_for_the_weights_for_tokens_and_for_what_they_see():
    setup = ServerSetup(pass_seconds=1.0, token_seconds=0.1, pair_seconds=0.01, remote_seconds=5.0)
    assert setup.seconds_of([Part(1, 9)]) == pytest.approx(1.0 + 0.1 + 0.1)
    assert setup.seconds_of([Part(3, 0), Part(1, 4)]) == pytest.approx(1.0 + 0.4 + 0.01 * (6 + 5))
    assert setup.seconds_of([Part(1, 9, num_remote_pages=2)]) == pytest.approx(6.2)


def test_pages_that_are_kept_are_given_away_from_the_end_of_the_job_that_left_first():
    pages = PageCounts(10, num_remote=2)
    assert pages.take(8) == 0
    pages.release(1, num_pages=4, num_full=3, num_remote=0)
    pages.release(2, num_pages=4, num_full=3, num_remote=0)
    assert pages.num_available == 12
    assert pages.take(6) == 0  # four are free
    assert (pages.find(1), pages.find(2), pages.find(3)) == (1, 3, 0)
    assert pages.take(2) == 2
    pages.check(held=6 + 4 + 2)
    with pytest.raises(AssertionError):
        pages.take(1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_lengths_have_the_means_that_are_stated(name: str):
    jobs = generations(WORKLOADS[name], 20_000, rate=2.0, seed=0)
    stated = replace(WORKLOADS[name].answers, largest=1 << 20)
    uncut = generations(Workload(WORKLOADS[name].prompts, stated), 20_000, rate=2.0, seed=0)
    assert sum(job.num_answer for job in uncut) / len(uncut) == pytest.approx(stated.mean, rel=0.05)
    assert all(1 <= job.num_answer <= job.max_answer for job in jobs)
    assert len(jobs) / jobs[-1].arrives_at == pytest.approx(2.0, rel=0.05)
    pressed = at_rate(jobs, 10.0)
    assert len(jobs) / pressed[-1].arrives_at == pytest.approx(10.0)


def test_a_job_that_can_never_fit_is_refused_with_a_hint():
    jobs = [Generation(0, 0.0, 100, 10, 1000, 0.1, seed="0", peer="a")]
    with pytest.raises(UserError, match="1,099 tokens can never fit into a cache of 768") as error:
        serve(jobs, SMALL, first_come)
    assert error.value.hint is not None


# -- traces and the command line ------------------------------------------------------------------------------------


def test_traces_of_both_kinds_are_read(tmp_path: Path):
    own, azure = tmp_path / "own.csv", tmp_path / "azure.csv"
    own.write_text("seconds,prompt,answer\n5,10,20\n3.5,30,40\n9,1,1\n")
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,10,20\n2023-11-16 18:17:02.4799600,30,40\n2023-11-16 18:17:07.9799600,1,1\n"
    )
    for path in (own, azure):
        jobs = read_trace(path, max_jobs=100, seed=0)
        assert [(job.number, job.num_prompt, job.num_answer, job.max_answer) for job in jobs] == [
            (0, 30, 40, 64), (1, 10, 20, 32), (2, 1, 1, 1),
        ]  # fmt: skip
        assert [job.arrives_at - jobs[0].arrives_at for job in jobs] == pytest.approx([0.0, 1.5, 5.5])
    assert len(read_trace(own, max_jobs=2, seed=0)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has not the columns"),
        ("seconds,prompt,answer\n1,2,3\n4,five,6\n", "line 3"),
        ("seconds,prompt,answer\n1,2,3\n4,0,6\n", "a prompt of 0"),
        ("seconds,prompt,answer\nnan,2,3\n", "at nan"),
        ("seconds,prompt,answer\n1,2,3\n", "fewer than two"),
        ("seconds,prompt,answer\n1,2\n", "line 2"),
    ],
)
def test_a_trace_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_trace(path, max_jobs=100, seed=0)
    assert error.value.hint is not None


QUICK = ["--jobs", "12", "--lengths", "instructions", "--cache-tokens", "1024", "--load", "0.9"]


def test_the_command_prints_a_table_for_each_load_and_equal_ones_for_equal_seeds(capsys: pytest.CaptureFixture[str]):
    def printed(*more: str) -> str:
        assert run([*QUICK, "--load", "0.3", *more]) == 0
        return capsys.readouterr().out

    first = printed("--seed", "1")
    assert first == printed("--seed", "1")
    assert first != printed("--seed", "2")
    assert first.count("| run-to-completion |") == first.count("| fair |") == 2


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]):
    assert run([*QUICK, "--policy", "fair", "--policy", "paging", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(row["policy"], row["load"]) for row in results["rows"]] == [("fair", 0.9), ("paging", 0.9)]
    assert all(0 < row["mean"] <= row["p95"] for row in results["rows"])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--policy", "best"], 2, "best"),
        (["--lengths", "novel"], 2, "novel"),
        (["--trace", "nowhere.csv"], 1, "cannot be read"),
        (["--cache-tokens", "160"], 1, "can never fit"),
        (["--loads", "1"], 2, "--loads"),
    ],
)
def test_wrong_usage_is_told_in_a_line_with_a_hint(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
):
    assert run(["--jobs", "20", *arguments]) == status
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-2].startswith("error: ")
    assert message in error[-2]
    assert error[-1].startswith("hint: ")


def test_a_plot_is_drawn_if_matplotlib_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "serving.png"
    assert run([*QUICK, "--policy", "fair", "--plot", str(path)]) == 0
    assert path.stat().st_size > 1000

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run([*QUICK, "--policy", "fair", "--plot", str(path)]) == 1
    assert "matplotlib is not installed" in capsys.readouterr().err
