"""`shoal gateway` as users run it: real processes, a real SIGKILL, OpenAI's own client."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.bundled import STORIES
from shoal.cli.terminal.console import tokens_per_second
from shoal.host.processes import Child, Children
from shoal.testing.preloaded import PreloadedProcess

from .conftest import DECODE_SPEED, Shoal

PROMPT = "Once upon a time"
SECONDS = 120.0


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with Children() as children:
        yield children


def ready(children: Children, *wanted: Child) -> None:
    for _ in children.wait_for(wanted, seconds=SECONDS):
        pass


def serve(children: Children, name: str, *arguments: str) -> Child:
    options = ("--name", name, "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--cache-tokens", "4096")
    return children.start(name, "serve", str(STORIES), *options, *arguments, launch=PreloadedProcess)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter whose answers are not those of the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    tuned = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    folder = tmp_path_factory.mktemp("adapters") / "tales"
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def servers(children: Children, adapter: Path) -> dict[str, Child]:
    """Two servers of the second half, of which one can be killed. The first server hosts the adapter."""
    first = serve(children, "first", "--new-swarm", "--blocks", "0:6", "--adapter", str(adapter))
    ready(children, first)
    peers = ("--initial-peers", first.facts["address"])
    others = {name: serve(children, name, *peers, "--blocks", "6:12") for name in ("second", "third")}
    ready(children, *others.values())
    return {"first": first, **others}


@pytest.fixture(scope="module")
def gateway(children: Children, servers: dict[str, Child], adapter: Path) -> Child:
    options = ("--initial-peers", servers["first"].facts["address"], "--adapter", str(adapter), "--api-key", "secret")
    child = children.start("gateway", "gateway", str(STORIES), *options, "--port", "0")
    ready(children, child)
    return child


def test_servers_start_with_the_speed_that_is_known_of_their_machine(servers: dict[str, Child]):
    found = [server.facts["decoding"] for server in servers.values()]
    assert found == [f"{tokens_per_second(DECODE_SPEED)} through these blocks"] * 3


def test_sixteen_clients_do_not_notice_that_a_server_is_killed(gateway: Child, servers: dict[str, Child]):
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    whole = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def expected(seed: int) -> str:
        torch.manual_seed(seed)
        found = whole.generate(ids, max_new_tokens=40, do_sample=True, temperature=0.8, top_k=0)
        return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))

    begun = threading.Semaphore(0)

    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        text = ""
        stream = await client.completions.create(
            model="stories", prompt=PROMPT, max_tokens=40, temperature=0.8, seed=seed, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].text
            begun.release()
        return text

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(base_url=gateway.facts["address"], api_key="secret", max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(16)))

    def kill() -> None:
        for _ in range(16 * 5):
            begun.acquire()
        servers["second"].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    texts = asyncio.run(everybody())
    killer.join()
    assert texts == [expected(seed) for seed in range(16)]


def test_a_model_and_its_adapter_answer_by_their_names(gateway: Child, adapter: Path):
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    whole = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def expected(model: Any) -> str:
        found = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)
        return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))

    plain, tuned = expected(whole), expected(PeftModel.from_pretrained(whole, adapter).eval())
    assert plain != tuned
    client = openai.OpenAI(base_url=gateway.facts["address"], api_key="secret", max_retries=0)
    names = [each.id for each in client.models.list()]
    assert names == ["stories", "stories:tales"]
    answers = [client.completions.create(model=name, prompt=PROMPT, max_tokens=16, temperature=0) for name in names]
    assert [each.choices[0].text for each in answers] == [plain, tuned]


def test_a_port_that_is_taken_and_a_key_that_is_missing(shoal: Shoal, gateway: Child):
    port = gateway.facts["page"].rpartition(":")[2]
    peer = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWJYNkje4A81dCjUgiMHgx3yADscBJ342g4EJfdWdgf4Mj"
    done = shoal("gateway", str(STORIES), "--initial-peers", peer, "--port", port)
    assert done.code == 1
    assert done.err.startswith(f"error: port {port} of 127.0.0.1 cannot be used")
    assert "--port" in done.err
    assert httpx.get(f"{gateway.facts['address']}/models").status_code == 401


def test_a_gateway_ends_while_a_page_watches(gateway: Child):
    url, headers = gateway.facts["page"], {"Authorization": "Bearer secret"}
    with httpx.stream("GET", f"{url}/api/swarm", params={"model": "stories"}, headers=headers) as watching:
        lines = watching.iter_lines()
        assert next(lines).startswith("data: ")
        gateway.process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" not in list(lines)
    assert gateway.process.wait(SECONDS) == 0
