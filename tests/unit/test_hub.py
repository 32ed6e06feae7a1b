from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from shoal.errors import CheckpointError, ShoalError, UserError
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.location import check_on_hub
from shoal.spans import Span

from .fake_hub import COMMIT, FakeHub
from .tiny_checkpoint import save_tiny

REPO = "someone/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub(save_tiny(tmp_path / "tiny", sharded=True))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client waits before it tries again
    yield hub
    hub.close()


def shards_with(hub: FakeHub, text: str) -> set[str]:
    index = json.loads((hub.folder / "model.safetensors.index.json").read_text())
    return {file for tensor, file in index["weight_map"].items() if text in tensor}


def weights_sent(hub: FakeHub) -> set[str]:
    return {file for file in hub.sent if file.endswith(".safetensors")}


def test_a_server_downloads_only_the_files_of_its_blocks(hub: FakeHub) -> None:
    tensors = Checkpoint.open(REPO).block_tensors(Span(2, 3))

    assert weights_sent(hub) == shards_with(hub, ".layers.2.") < shards_with(hub, "")
    expected = Checkpoint.open(hub.folder).block_tensors(Span(2, 3))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_a_client_downloads_only_the_files_of_its_head(hub: FakeHub) -> None:
    Checkpoint.open(REPO).head_tensors()

    assert weights_sent(hub) == shards_with(hub, "embed") | shards_with(hub, "model.norm") | shards_with(hub, "lm_head")


def test_a_file_is_downloaded_once(hub: FakeHub) -> None:
    Checkpoint.open(REPO).block_tensors(Span(0, 2))
    hub.sent.clear()

    Checkpoint.open(REPO).block_tensors(Span(0, 2))

    assert not hub.sent


def test_the_blocks_on_disk_are_those_whose_files_have_come(hub: FakeHub) -> None:
    checkpoint = Checkpoint.open(REPO)
    assert checkpoint.blocks_on_disk() == []
    checkpoint.block_tensors(Span(2, 3))
    complete = {block for block in range(4) if shards_with(hub, f".layers.{block}.") <= weights_sent(hub)}
    assert checkpoint.blocks_on_disk() == sorted(complete) == [2]
    assert Checkpoint.open(hub.folder).blocks_on_disk() == [0, 1, 2, 3]


def test_a_local_copy_has_the_hubs_key_and_fingerprint_without_a_download(hub: FakeHub) -> None:
    here, there = Checkpoint.open(hub.folder), Checkpoint.open(REPO)

    assert (here.key, here.fingerprint) == (there.key, there.fingerprint)
    assert not weights_sent(hub)


def test_block_sizes_are_read_from_the_headers_alone(hub: FakeHub) -> None:
    here, there = Checkpoint.open(hub.folder), Checkpoint.open(REPO)

    assert here.block_bytes == there.block_bytes
    assert here.head_bytes == there.head_bytes
    assert not list((Path(constants.HF_HUB_CACHE)).rglob("*.safetensors"))


def test_the_tensors_of_a_single_file_are_listed_from_its_header(hub: FakeHub) -> None:
    for file in (*hub.folder.glob("*.safetensors"), hub.folder / "model.safetensors.index.json"):
        file.unlink()
    save_tiny(hub.folder)

    checkpoint = Checkpoint.open(REPO)

    assert not list((Path(constants.HF_HUB_CACHE)).rglob("*.safetensors"))
    assert len(checkpoint.block_tensors(Span(1, 2))) == 9


def test_an_interrupted_download_is_resumed(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(REPO)
    (shard,) = shards_with(hub, "layers.2.self_attn.q_proj")
    size = (hub.folder / shard).stat().st_size
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is lost at worst; 10 MB in earnest
    hub.breaks_after = size // 2
    with pytest.raises(UserError, match=f"the hub answered 503 for {REPO}"):
        checkpoint.files.path(shard)
    assert hub.sent[shard] == size // 2

    hub.breaks_after = None
    path = checkpoint.files.path(shard)

    assert path.read_bytes() == (hub.folder / shard).read_bytes()
    assert hub.sent[shard] < size + 1000


def test_a_file_that_was_damaged_during_the_download_is_deleted(hub: FakeHub) -> None:
    checkpoint = Checkpoint.open(REPO)
    hub.garbles = True
    with pytest.raises(CheckpointError, match=f"of {REPO} was damaged during the download"):
        checkpoint.block_tensors(Span(0, 1))

    hub.garbles = False
    assert checkpoint.block_tensors(Span(0, 1))


@pytest.mark.parametrize("facts", ["kept", "lost"])
def test_a_downloaded_model_works_without_the_hub(hub: FakeHub, tmp_path: Path, facts: str) -> None:
    online = Checkpoint.open(REPO)
    fingerprint = online.fingerprint
    online.block_tensors(Span(0, 4 if facts == "lost" else 1))
    if facts == "lost":  # as if another program had downloaded the model
        online.head_tensors()
        (tmp_path / "cache").rename(tmp_path / "old")
    hub.close()

    offline = Checkpoint.open(REPO)

    assert offline.name == REPO
    assert (offline.key, offline.fingerprint) == (online.key, fingerprint)
    assert offline.block_tensors(Span(0, 1))
    if facts == "kept":
        with pytest.raises(UserError, match="cannot reach the hub at http"):
            offline.block_tensors(Span(3, 4))
    with pytest.raises(UserError, match=r"cannot reach the hub .* there is no folder of this name"):
        Checkpoint.open("someone/never-seen")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("someone/unheard-of", "there is no model someone/unheard-of on the hub that you may see"),
        ("not a model", "'not a model' is neither a folder nor the id of a model"),
        ("a/b/c", "'a/b/c' is neither a folder nor the id of a model"),
        ("", "'' is neither a folder nor the id of a model"),
    ],
)
def test_a_model_that_does_not_exist_is_refused(hub: FakeHub, model: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Checkpoint.open(model)


def test_a_revision_that_does_not_exist_is_refused(hub: FakeHub) -> None:
    assert Checkpoint.open(REPO, revision=COMMIT).num_blocks == 4
    with pytest.raises(UserError, match=f"{REPO} has no such revision"):
        Checkpoint.open(REPO, revision="v9")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "requires that you accept its conditions"),
        (401, "GatedRepo", "requires that you accept its conditions"),
        (401, "RepoNotFound", "there is no model"),
        (403, "", "the hub answered 403"),
        (429, "", "the hub answered 429"),
    ],
)
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_a_refusal_of_the_hub_is_one_line(hub: FakeHub, status: int, code: str, message: str, when: str) -> None:
    checkpoint = None if when == "opening" else Checkpoint.open(REPO)
    hub.refuses_with = (status, code)

    with pytest.raises(ShoalError, match=message) as error:
        (checkpoint or Checkpoint.open(REPO)).head_tensors()
    assert "\n" not in str(error.value)
    assert error.value.hint


def test_a_hub_that_cannot_be_reached_is_named(hub: FakeHub) -> None:
    hub.close()

    with pytest.raises(UserError, match=f"cannot reach the hub at {hub.url} for {REPO}"):
        Checkpoint.open(REPO)


def test_a_file_that_the_index_names_and_the_hub_lacks_is_named(hub: FakeHub) -> None:
    (shard,) = shards_with(hub, "layers.2.self_attn.q_proj")
    (hub.folder / shard).unlink()

    checkpoint = Checkpoint.open(REPO)

    with pytest.raises(CheckpointError, match=f"{REPO} has no file {shard}"):
        checkpoint.block_tensors(Span(2, 3))


def test_with_local_files_only_the_hub_is_not_asked(hub: FakeHub) -> None:
    before = Checkpoint.open(REPO).head_tensors()
    hub.close()
    hub.sent.clear()
    found = Checkpoint.open(REPO, local_files_only=True)
    assert found.head_tensors().keys() == before.keys()
    with pytest.raises(UserError, match=r"model-.*\.safetensors of someone/tiny is not in the cache") as error:
        found.block_tensors(Span(0, 4))
    assert error.value.hint == "leave out local_files_only to download it"
    assert not hub.sent


@pytest.mark.parametrize("known", [False, True], ids=["nothing is known", "the commit is known"])
def test_with_local_files_only_a_model_that_is_not_cached_is_not_downloaded(hub: FakeHub, known: bool) -> None:
    if known:
        Checkpoint.open(REPO)
    hub.sent.clear()
    with pytest.raises(UserError, match="someone/tiny is not in the cache"):
        Checkpoint.open(REPO, local_files_only=True).head_tensors()
    assert not hub.sent


def test_a_model_that_the_hub_does_not_have_is_refused_before_anything_is_read(hub: FakeHub) -> None:
    with pytest.raises(UserError, match="there is no model someone/else on the hub that you may see"):
        check_on_hub("someone/else", revision=None)
    with pytest.raises(UserError, match="someone/tiny has no such revision"):
        check_on_hub(REPO, revision="2")
    assert not hub.sent


def test_a_model_that_was_downloaded_once_is_not_looked_up(hub: FakeHub) -> None:
    check_on_hub(REPO, revision=None)
    Checkpoint.open(REPO).head_tensors()
    hub.refuses_with = 500, ""
    check_on_hub(REPO, revision=None)
    check_on_hub(str(hub.folder), revision=None)
