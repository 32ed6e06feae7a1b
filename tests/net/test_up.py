"""`shoal up`: a swarm's first machine in one command, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import psutil
import pytest
import torch

from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.host.processes import Child, Children
from shoal.model.weights.contents import Contents

PROMPT = [[1, 403, 407, 261, 378]]
SECONDS = 120.0


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """The first machine of a swarm."""
    with pytest.MonkeyPatch.context() as patch, Children(grace_seconds=SECONDS) as children:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("up")))
        options = ("--host", "127.0.0.1", "--http-port", "0", "--dtype", "float32")
        child = children.start("up", "up", str(STORIES), *options)
        for _ in children.wait_for([child], seconds=SECONDS):
            pass
        while "code" not in child.facts:
            assert not child.has_ended
            children.wait_for_news(SECONDS)
        yield child


def test_one_command_serves_answers_shows_a_page_and_invites(
    up: Child, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert httpx.get(up.facts["page"]).status_code == 200
    client = openai.OpenAI(base_url=up.facts["address"], api_key="none")
    answer = client.completions.create(model="stories", prompt=PROMPT[0], max_tokens=16, temperature=0)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("other")))
    model = AutoDistributedModelForCausalLM.from_pretrained(up.facts["code"])
    try:
        ids = model.generate(torch.tensor(PROMPT), max_new_tokens=16, do_sample=False)[0, len(PROMPT[0]) :]
    finally:
        model.close()
    assert answer.choices[0].text == decoded(ids)


def decoded(ids: torch.Tensor) -> str:
    from transformers import AutoTokenizer

    text: str = AutoTokenizer.from_pretrained(STORIES).decode(ids)
    return text


def test_a_plan_for_a_machine_that_would_join_knows_what_the_swarm_has(up: Child, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "plan", up.facts["code"], "--memory", "4MB", "--json"],
        env=os.environ | {"SHOAL_CACHE": str(tmp_path)}, capture_output=True, text=True, timeout=SECONDS, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    swarm = found["swarm"]
    assert (swarm["servers"], swarm["holds"], swarm["missing"]) == (1, 12, [])
    assert found["dtype"] == "float32"  # the swarm's, which is not the model's own
    whole = found["forms"][0]
    assert whole["block_bytes"] == list(Contents.open(STORIES).block_bytes("float32"))
    assert whole["machines"] == [{"name": "4 MB", "free_bytes": 4_000_000, "count": 1, "holds": 2, "more_needed": 0}]
    assert whole["copies"] == pytest.approx((swarm["could_hold"] + 2) / 12)
    assert (whole["fits"], whole["parts"]) == (True, [])
    assert whole["tokens_per_second"] > 0


# The last test: it ends the swarm.


def test_one_command_ends_all_that_it_started(up: Child) -> None:
    started = psutil.Process(up.process.pid).children(recursive=True)
    assert len(started) >= 2
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(SECONDS) == 0
    _, alive = psutil.wait_procs(started, timeout=SECONDS)
    assert alive == []
