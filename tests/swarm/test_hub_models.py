"""A client whose model is on the hub: everything that it takes from there is of one commit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from shoal import client as clients
from shoal.cli import generate
from shoal.client.options.client_options import ClientOptions
from tests.unit.fake_hub import COMMIT, FakeHub
from tests.unit.tiny_checkpoint import save_tiny

from .harness import swarm_of

REPO = "someone/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub(save_tiny(tmp_path / "tiny"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


def test_a_model_knows_the_commit_that_its_head_is_of(hub: FakeHub) -> None:
    with swarm_of(hub.folder, "0:4") as swarm:
        assert swarm.model(folder=REPO).config._commit_hash == COMMIT
        assert getattr(swarm.model().config, "_commit_hash", None) is None


@pytest.mark.parametrize(("commit", "expected"), [(COMMIT, COMMIT), (None, None)])
def test_its_tokenizer_is_of_the_same_commit(
    monkeypatch: pytest.MonkeyPatch, commit: str | None, expected: str | None
) -> None:
    config = SimpleNamespace(_commit_hash=commit)
    llm = SimpleNamespace(config=config, name_or_path=REPO, close=lambda: None)
    opened = SimpleNamespace(from_options=lambda model, options: llm)
    monkeypatch.setattr(clients, "AutoDistributedModelForCausalLM", opened)
    monkeypatch.setattr(generate, "load_tokenizer", lambda *given: given)
    options: Any = ClientOptions.from_keywords(initial_peers=())
    with generate.connected(REPO, options) as (_, tokenizer):
        assert tokenizer == (REPO, expected)
