"""All schedules, the simple ones first."""

from __future__ import annotations

from hypothesis import strategies as st

from .failures import HAPPENINGS, KINDS, ONE_TIME, Failure
from .oracle import NUM_BLOCKS
from .schedule import CACHE_PAGES, Schedule
from .work import SLOW, WORK

TIGHT_PAGES = 10
"""Enough for any client alone, except for the one with the long prompt, and not for all clients at once."""
LAYOUTS = [
    ("0:4",),
    ("0:2", "2:4"),
    ("0:1", "1:3", "3:4"),
    ("0:2", "2:4", "0:2", "2:4"),
    ("0:3", "3:4", "0:1", "1:4"),
    ("0:1", "1:2", "2:3", "3:4", "0:4"),
]
SPANS = [f"{start}:{end}" for start in range(NUM_BLOCKS) for end in range(start + 1, NUM_BLOCKS + 1)]


@st.composite
def failures(draw: st.DrawFn, *, names: list[str]) -> Failure:
    kind = draw(st.sampled_from(KINDS))
    happens = kind in HAPPENINGS and kind not in ONE_TIME
    return Failure(
        kind,
        victim=draw(st.sampled_from(["receiver", "sender", *names])),
        after=draw(st.integers(0, 3) | st.integers(0, 25)),
        late=draw(st.sampled_from([0.0, 0.001, 0.007, 0.02, 1.0, 10.0])),
        lasts=draw(st.sampled_from([None, 0.3, 3.0, 30.0])) if happens else None,
        blocks=draw(st.sampled_from(["", *SPANS])) if kind == "restarts" else "",
    )


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    spans = draw(st.sampled_from(LAYOUTS))
    names = [f"s{number}" for number in range(len(spans))]
    quick = [name for name in WORK if name not in SLOW]
    work = draw(st.lists(st.sampled_from([*quick, *WORK]), min_size=1, max_size=3))
    return Schedule(
        spans=spans,
        work=work,
        failures=draw(st.lists(failures(names=names), min_size=1, max_size=6)),
        standby=draw(st.booleans()),
        drain_seconds=draw(st.sampled_from([0.0, 5.0])),
        seed=draw(st.integers(0, 3)),
        cache_pages=CACHE_PAGES if "long" in work else draw(st.sampled_from([CACHE_PAGES, TIGHT_PAGES])),
    )
