"""`shoal up`: a swarm's first machine in one command, as a user runs it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import httpx2 as httpx
import openai
import psutil
import pytest
import torch

from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.processes import Child, Children

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


# The last test: it ends the swarm.


def test_one_command_ends_all_that_it_started(up: Child) -> None:
    started = psutil.Process(up.process.pid).children(recursive=True)
    assert len(started) >= 2
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(SECONDS) == 0
    _, alive = psutil.wait_procs(started, timeout=SECONDS)
    assert alive == []
