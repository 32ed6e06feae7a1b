from __future__ import annotations

from typing import Any

from shoal.events import RouteChosen, ServerLost, SessionClosed, StageReplaced, TextDoubtful
from shoal.gateway.page.page_memory import PageMemory
from shoal.spans import Span


def snapshot(*servers: tuple[str, str, int], missing: tuple[int, ...] = ()) -> dict[str, Any]:
    described = [{"peer": peer, "name": name, "queue": queue} for peer, name, queue in servers]
    return {"model": "m", "num_blocks": 4, "missing": list(missing), "servers": described}


def test_a_page_is_told_the_first_snapshot_whole_and_then_what_has_changed():
    memory = PageMemory()
    first = snapshot(("a", "attic", 0), ("b", "desk", 0))
    assert memory.changes(first) == {"type": "swarm", **first, "gone": []}
    assert memory.changes(snapshot(("a", "attic", 0), ("b", "desk", 0))) is None
    changed = memory.changes(snapshot(("a", "attic", 0), ("b", "desk", 3)))
    assert changed is not None
    assert [each["peer"] for each in changed["servers"]] == ["b"]
    changed = memory.changes(snapshot(("a", "attic", 0), missing=(5,)))
    assert changed == {"type": "swarm", **snapshot(missing=(5,)), "gone": ["b"]}


def test_machines_are_called_by_their_names_even_when_they_are_gone():
    memory = PageMemory()
    memory.changes(snapshot(("12D3aaaaaaaaaaaaaaaa", "attic", 0), ("12D3bbbbbbbbbbbbbbbb", "desk", 0)))
    memory.changes(snapshot(("12D3bbbbbbbbbbbbbbbb", "desk", 0)))
    lost = memory.told(ServerLost("12D3aaaaaaaaaaaaaaaa", "12D3aaaaaaaaaaaaaaaa is lost: the stream ended"))
    assert lost is not None
    assert lost["text"] == "attic is lost: the stream ended"
    replaced = memory.told(StageReplaced("12D3aaaaaaaaaaaaaaaa", ("12D3bbbbbbbbbbbbbbbb", "12D3cccccccccccccccc")))
    assert replaced is not None
    assert replaced["text"] == "desk, cccccccccccc took over from attic"
    assert replaced["by"] == ["desk", "cccccccccccc"]
    assert memory.told(SessionClosed(1, "m", 5)) is None


def test_a_page_is_told_of_whole_ways_and_not_of_those_that_are_only_considered():
    memory = PageMemory()
    memory.changes(snapshot(("12D3aaaaaaaaaaaaaaaa", "attic", 0)))
    whole, part = (RouteChosen("m", span, (), 0.1, lambda: "fast") for span in (Span(0, 4), Span(2, 4)))
    assert memory.told(whole) == {"type": "event", "text": "chosen: blocks 0:4: fast"}
    assert memory.told(part) is None


def test_a_page_is_told_of_tokens_that_may_be_wrong():
    memory = PageMemory()
    memory.changes(snapshot(("12D3aaaaaaaaaaaaaaaa", "attic", 0)))
    told = memory.told(TextDoubtful(1, "m", 3, 8, "12D3aaaaaaaaaaaaaaaa computes something else"))
    text = "in an answer, the last 5 tokens may be wrong: attic computes something else"
    assert told == {"type": "event", "text": text, "loud": True, "bad": True}
