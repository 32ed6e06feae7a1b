"""Rules side by side: the same jobs, the same server, at several loads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from shoal.errors import UserError
from shoal.policy.batching.pass_rules import DEFAULT_RULE, RULES, PassRule
from shoal.simulator.serving.generating import Completed, Served, serve
from shoal.simulator.serving.generations import Generation, at_rate
from shoal.simulator.serving.rivals import SkipJoinQueues, iteration_level, paging, run_to_completion
from shoal.simulator.serving.server_setup import ServerSetup

REMOTE_SHARE = 0.5
"""Pages that other servers lend, as a part of the server's own (`pooled`)."""
NEAR_SECONDS, FAR_SECONDS = 8 * 0.0005, 8 * 0.02
"""What a pass with borrowed pages costs: a round trip in each of eight blocks, in a rack or between homes."""
TAIL = 0.95


@dataclass(frozen=True)
class Policy:
    """A rule with the server that it is for. `stands_for` says whose it is; `is_live` that operators can choose it.

    It `may_starve` a job while others always come.
    """

    name: str
    stands_for: str
    rule: PassRule
    setup: ServerSetup
    is_live: bool = False
    may_starve: bool = False


def policies(setup: ServerSetup) -> dict[str, Policy]:
    """All rules that can be compared on a server, by name."""
    pages = round(REMOTE_SHARE * setup.num_pages)
    near = replace(setup, num_remote_pages=pages, remote_seconds=NEAR_SECONDS)
    far = replace(setup, num_remote_pages=pages, remote_seconds=FAR_SECONDS)
    queues = SkipJoinQueues(2 * setup.pass_seconds, setup.token_seconds)
    all_of_them = [
        Policy("run-to-completion", "batches run to their end", run_to_completion, setup),
        Policy("iteration-level", "ORCA", iteration_level, setup),
        Policy("paging", "vLLM", paging, setup),
        Policy("skip-join-mlfq", "FastServe", queues, setup, may_starve=True),
        Policy("pooled-near", "Infinite-LLM, half as many pages again, 0.5 ms away", paging, near),
        Policy("pooled-far", "Infinite-LLM, half as many pages again, 20 ms away", paging, far),
        *(
            Policy(name, _live_words(name), rule, setup, is_live=True, may_starve=name == "fair")
            for name, rule in RULES.items()
        ),
    ]
    return {policy.name: policy for policy in all_of_them}


def _live_words(name: str) -> str:
    return "shoal's default" if name == DEFAULT_RULE else f"shoal serve --scheduling {name}"


def chosen_policies(setup: ServerSetup, names: Sequence[str]) -> list[Policy]:
    """The policies of these names, or all. Raises `UserError` for an unknown name."""
    known = policies(setup)
    for name in names:
        if name not in known:
            raise UserError(f"there is no policy {name!r}", hint=", ".join(known))
    return [known[name] for name in names] or list(known.values())


@dataclass(frozen=True)
class Row:
    """What a policy did at one load: seconds of generations and of their first tokens, and what it cost.

    `recomputed` is the part of the computed tokens that had been computed before; `busy` the part of the time in which
    the server computed; `preempted` the sessions that lost their pages, for each job.
    """

    policy: str
    load: float
    jobs_per_second: float
    mean: float
    p95: float
    mean_first: float
    p95_first: float
    slowest: float
    preempted: float
    refused: float
    recomputed: float
    busy: float
    tokens_per_second: float

    def as_dict(self) -> Mapping[str, object]:
        """For JSON."""
        return asdict(self)


def saturation(jobs: Sequence[Generation], setup: ServerSetup) -> float:
    """How many of these jobs the server ends per second under the default rule when more always wait.

    It is measured between the first and the last quarter of them, so that neither a server that fills up nor one that
    runs empty counts.
    """
    served = serve(at_rate(jobs, len(jobs)), setup, RULES[DEFAULT_RULE])
    ends = sorted(one.ended_at for one in served.completed)
    first, last = len(ends) // 4, 3 * len(ends) // 4
    return (last - first) / (ends[last] - ends[first])


def compare(
    jobs: Sequence[Generation],
    chosen: Sequence[Policy],
    loads: Sequence[float],
    *,
    saturated_rate: float,
    on_progress: Callable[[str, float, int], None] = lambda policy, load, num_completed: None,
) -> list[Row]:
    """A row for each load and policy. A load is a part of `saturated_rate`, in jobs per second."""
    rows: list[Row] = []
    for load in loads:
        arriving = at_rate(jobs, load * saturated_rate)
        for policy in chosen:

            def on_completed(num_completed: int, policy: Policy = policy, load: float = load) -> None:
                on_progress(policy.name, load, num_completed)

            served = serve(arriving, policy.setup, policy.rule, on_completed=on_completed)
            rows.append(row_of(policy.name, load, load * saturated_rate, served))
    return rows


def row_of(policy: str, load: float, rate: float, served: Served) -> Row:
    """What there is to say of one run."""
    completions = sorted(one.completion_seconds for one in served.completed)
    firsts = sorted(one.first_token_seconds for one in served.completed)
    num_jobs = len(completions)
    return Row(
        policy,
        load,
        rate,
        mean=_mean(completions),
        p95=_percentile(completions, TAIL),
        mean_first=_mean(firsts),
        p95_first=_percentile(firsts, TAIL),
        slowest=max(_slowdown(one) for one in served.completed),
        preempted=served.num_preempted / num_jobs,
        refused=sum(one.num_refusals for one in served.completed) / num_jobs,
        recomputed=served.num_recomputed / served.num_tokens.total(),
        busy=served.busy_seconds / served.seconds,
        tokens_per_second=sum(one.job.num_answer for one in served.completed) / served.seconds,
    )


def _slowdown(one: Completed) -> float:
    """Seconds for each token of the answer."""
    return one.completion_seconds / one.job.num_answer


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _percentile(ordered: Sequence[float], part: float) -> float:
    """The least value that `part` of all values do not exceed."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]
