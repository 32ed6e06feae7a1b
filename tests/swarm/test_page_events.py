"""What the gateway's page is told of a swarm in memory."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoTokenizer

from shoal.bundled import STORIES
from shoal.gateway.page.news import News
from shoal.gateway.page.watch import page_events, snapshot
from shoal.gateway.served_model import ServedModel

from .harness import QUICK, Swarm, swarm_of

PROMPT = "Once upon a time"


def served_by(net: Swarm, name: str = "stories", **options: Any) -> ServedModel:
    news = News()
    model = net.model(config=replace(QUICK, observers=(news.tell,)))
    return ServedModel(name, model, AutoTokenizer.from_pretrained(STORIES), news, **options)


def test_a_page_is_told_of_a_lost_machine_by_its_name_and_of_what_took_over():
    with swarm_of(STORIES, "0:6", "6:12", "6:12") as net:
        served = served_by(net)
        names = {peer: server.info.name or peer for peer, server in net.servers.items()}

        async def watch() -> tuple[dict[str, Any], list[dict[str, Any]], str]:
            told: list[dict[str, Any]] = []
            events = page_events(served)
            first = json.loads((await anext(events)).removeprefix("data: "))
            ids = served.ids_of_text(PROMPT)
            killed = ""
            async for _ in served.model.stream(ids, max_new_tokens=24, do_sample=False):
                if not killed:
                    (session,) = served.model.blocks.runtime.sessions
                    killed = session.hops[-1].server.peer
                    await asyncio.to_thread(net.kill, killed)
            while not any("replaced" in each for each in told):
                line = await anext(events)
                if line.startswith("data: "):
                    told.append(json.loads(line.removeprefix("data: ")))
            await events.aclose()
            return first, told, killed

        first, told, killed = asyncio.run(watch())
        (other,) = {"s1", "s2"} - {killed}
        assert [each["peer"] for each in first["servers"]] == ["s0", "s1", "s2"]
        assert first["way"] is None
        (lost,) = (each for each in told if "lost" in each)
        assert lost["lost"] == killed
        assert lost["text"].startswith(f"{names[killed]} ")
        (replaced,) = (each for each in told if "replaced" in each)
        assert (replaced["replaced"], replaced["by"]) == (killed, [names[other]])
        after = asyncio.run(snapshot(served))
        assert {each["peer"]: each["lost"] for each in after["servers"]}[killed]
        assert after["missing"] == []


def test_the_way_of_a_token_is_that_of_most_sessions_with_its_expected_time():
    with swarm_of(STORIES, "0:6", "6:12") as net:
        served = served_by(net)

        async def look() -> dict[str, Any]:
            ids = served.ids_of_text(PROMPT)
            async for _ in served.model.stream(ids, max_new_tokens=8, do_sample=False):
                return await snapshot(served)
            raise AssertionError("no token came")

        found = asyncio.run(look())
        assert [(hop["peer"], hop["start"], hop["end"]) for hop in found["way"]["hops"]] == [
            ("s0", 0, 6),
            ("s1", 6, 12),
        ]
        assert all(hop["network"] >= 0 and hop["queue"] >= 0 for hop in found["way"]["hops"])
        assert [each["sessions"] for each in found["servers"]] == [1, 1]


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({}, "'our stories'"),
        ({"serve_arguments": "/models/stories --revision 1"}, "/models/stories --revision 1"),
    ],
)
def test_the_command_to_join_serves_what_the_gateway_was_given(options: dict[str, str], model: str):
    with swarm_of(STORIES, "0:12") as net:
        found = asyncio.run(snapshot(served_by(net, "our stories", **options)))
        assert found["join"].startswith(f"shoal serve {model} --initial-peers ")


def test_a_machine_that_the_client_may_not_use_is_told_apart():
    with swarm_of(STORIES, "0:6", "6:12") as net:
        served = served_by(net)
        found = asyncio.run(snapshot(served))
        assert [each["usable"] for each in found["servers"]] == [True, True]
        net.call(served.model.blocks.swarm.permit, None, frozenset({"s1"}))
        found = asyncio.run(snapshot(served))
        assert [each["usable"] for each in found["servers"]] == [True, False]
        assert found["missing"] == [6, 7, 8, 9, 10, 11]
