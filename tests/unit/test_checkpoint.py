from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.errors import CheckpointError, UnsupportedModel, UserError
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.safetensors_file import parse_header, read_header
from shoal.spans import Span

from .tiny_checkpoint import save_tiny

Q_PROJ = "model.layers.3.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _no_facts_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_json(file: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_each_tensor_belongs_to_one_span_or_to_the_head(tmp_path: Path, sharded: bool, tied: bool) -> None:
    folder = save_tiny(tmp_path / "tiny", sharded=sharded, tied=tied)
    checkpoint = Checkpoint.open(folder)

    head, first, last = checkpoint.head_tensors(), *map(checkpoint.block_tensors, (Span(0, 3), Span(3, 4)))

    assert ("lm_head.weight" in head) is not tied
    assert {name.split(".")[2] for name in first} == {"0", "1", "2"}
    shared_out = head | first | last
    assert len(shared_out) == len(head) + len(first) + len(last)
    stored = all_tensors(folder)
    assert shared_out.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in shared_out.items())


@pytest.mark.parametrize("sharded", [False, True])
def test_block_sizes_are_known_without_reading_weights(tmp_path: Path, sharded: bool) -> None:
    checkpoint = Checkpoint.open(save_tiny(tmp_path / "tiny", sharded=sharded))

    blocks = checkpoint.block_tensors(Span(0, 4)).values()

    assert len(set(checkpoint.block_bytes)) == 1
    assert sum(checkpoint.block_bytes) == sum(tensor.nbytes for tensor in blocks)
    assert checkpoint.head_bytes == sum(tensor.nbytes for tensor in checkpoint.head_tensors().values())


def test_a_server_needs_only_the_files_of_its_blocks(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", sharded=True)
    mine = {shard_of(folder, name) for name in all_tensors(folder) if name.startswith("model.layers.3.")}
    others = [file for file in folder.glob("*.safetensors") if file not in mine]
    assert others
    for file in others:
        file.unlink()

    checkpoint = Checkpoint.open(folder)

    assert len(checkpoint.block_tensors(Span(3, 4))) == 9
    with pytest.raises(CheckpointError, match=r"tiny has no file model-0000\d-of-\d+\.safetensors$"):
        checkpoint.block_tensors(Span(0, 4))
    with pytest.raises(CheckpointError, match="has no file"):
        _ = checkpoint.fingerprint


def test_a_span_beyond_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tiny has 4 blocks; there is no span 3:5"):
        Checkpoint.open(save_tiny(tmp_path / "tiny")).block_tensors(Span(3, 5))


@pytest.mark.parametrize("cut", [1, 3000])
def test_a_truncated_file_is_refused_with_its_first_incomplete_tensor(tmp_path: Path, cut: int) -> None:
    folder = save_tiny(tmp_path / "tiny", sharded=True)
    file = shard_of(folder, Q_PROJ)
    last = max(read_header(file).items(), key=lambda item: item[1].end)[0]
    os.truncate(file, file.stat().st_size - cut)

    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged: it is truncated: tensor \S+ lacks") as error:
        Checkpoint.open(folder).block_tensors(Span(3, 4))
    assert cut > 1 or last in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, (8).to_bytes(8, "little") + b"not json", (2).to_bytes(8, "little") + b"[]"]
)
def test_a_file_that_is_not_in_the_safetensors_format_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = save_tiny(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"^model\.safetensors is damaged: its header"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, "x"]},
        {"dtype": "F32"},
        {"dtype": "STRANGE", "shape": [1 << 62, 1 << 1000], "data_offsets": [0, 16]},
        {"dtype": "STRANGE", "shape": [1] * 65, "data_offsets": [0, 16]},
        7,
    ],
)
def test_a_header_that_describes_no_tensors_is_refused(tmp_path: Path, entry: object) -> None:
    folder = save_tiny(tmp_path / "tiny")
    header = json.dumps({Q_PROJ: entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))

    with pytest.raises(CheckpointError, match=r"^model\.safetensors is damaged: its header"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["x" * 257, "x" * 80_000 + "\n", "a\nb", "a\x1b[31m"], ids=lambda name: repr(name[:8]))
def test_a_name_that_is_too_long_or_cannot_be_printed_is_refused(tmp_path: Path, name: str) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    assert parse_header(json.dumps({"x" * 256: entry}).encode(), file="f")
    with pytest.raises(CheckpointError, match=r"^f is damaged: a tensor's name is longer than 256 characters, or"):
        parse_header(json.dumps({name: entry}).encode(), file="f")

    folder = save_tiny(tmp_path / "tiny", sharded=True)
    edit_json(
        folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: "a.safetensors"})
    )
    with pytest.raises(CheckpointError, match="its weight_map does not map tensors to files"):
        Checkpoint.open(folder)


def test_a_shape_that_does_not_match_its_bytes_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", sharded=True)
    file = shard_of(folder, Q_PROJ)
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"shape":[32,32]', b'"shape":[32,33]'))

    with pytest.raises(CheckpointError, match=f"{file.name} is damaged: "):
        Checkpoint.open(folder).block_tensors(Span(3, 4))


def test_a_tensor_that_the_index_lists_and_its_file_lacks_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", sharded=True)
    file = shard_of(folder, Q_PROJ)
    tensors = load_file(file)
    del tensors[Q_PROJ]
    save_file(tensors, file)

    with pytest.raises(CheckpointError, match=f"tensor {Q_PROJ} is missing from {file.name}"):
        Checkpoint.open(folder).block_tensors(Span(3, 4))


def test_a_checkpoint_without_one_of_its_blocks_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", sharded=True)

    def forget_block_2(index: dict) -> None:
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "layers.2." not in k}

    edit_json(folder / "model.safetensors.index.json", forget_block_2)

    with pytest.raises(CheckpointError, match=r"tiny has 4 blocks by its config\.json, but no tensor of block 2$"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "model.bin", 3, ""])
def test_an_index_that_points_outside_of_the_checkpoint_is_refused(tmp_path: Path, file: object) -> None:
    folder = save_tiny(tmp_path / "tiny", sharded=True)
    edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({Q_PROJ: file}))

    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json of tiny is damaged"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\N{NULL}"])
def test_a_damaged_config_or_index_is_refused(tmp_path: Path, file: str, content: str) -> None:
    folder = save_tiny(tmp_path / "tiny", sharded=True)
    (folder / file).write_text(content)

    with pytest.raises(CheckpointError, match=f"{file} of tiny is damaged"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "consolidated.safetensors"])
def test_weights_in_other_files_are_refused_with_a_hint(tmp_path: Path, file: str) -> None:
    folder = save_tiny(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / file)

    with pytest.raises(CheckpointError, match=f"tiny has its weights in {file}, and only model.safetensors") as error:
        Checkpoint.open(folder)
    assert "save_pretrained" in (error.value.hint or "")


def test_a_place_without_a_model_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()

    with pytest.raises(CheckpointError, match="tiny has no weights"):
        Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"empty has no config\.json"):
        Checkpoint.open(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json is a file"):
        Checkpoint.open(folder / "config.json")
    edit_json(folder / "config.json", lambda config: config.update(model_type="never-heard-of"))
    with pytest.raises(UnsupportedModel, match="Transformers does not know the architecture of tiny"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "x"}, {"hidden_size": -1}, {"num_attention_heads": 0}, {"num_hidden_layers": 0}],
    ids=str,
)
def test_a_config_that_describes_no_model_is_refused_in_one_line(tmp_path: Path, changes: dict) -> None:
    folder = save_tiny(tmp_path / "tiny")
    edit_json(folder / "config.json", lambda config: config.update(changes))

    with pytest.raises(CheckpointError, match=r"^config\.json of tiny describes no model: .+$") as error:
        Checkpoint.open(folder)
    assert "\n" not in str(error.value)


def test_copies_have_the_same_fingerprint_and_other_weights_have_another(tmp_path: Path) -> None:
    original = Checkpoint.open(save_tiny(tmp_path / "tiny", sharded=True))
    copy = Checkpoint.open(shutil.copytree(tmp_path / "tiny", tmp_path / "copy"))
    tuned = Checkpoint.open(save_tiny(tmp_path / "tuned", sharded=True, seed=1))

    assert original.key == copy.key == tuned.key
    assert original.fingerprint == copy.fingerprint != tuned.fingerprint


def test_one_changed_tensor_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", sharded=True)
    before = Checkpoint.open(folder).fingerprint
    file = shard_of(folder, Q_PROJ)
    tensors = load_file(file)
    tensors[Q_PROJ][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})

    assert Checkpoint.open(folder).fingerprint != before


def test_a_digest_is_computed_once_until_the_file_changes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    file = folder / "model.safetensors"
    before = Checkpoint.open(folder).fingerprint
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Checkpoint.open(folder).fingerprint == before  # it was not read again
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert Checkpoint.open(folder).fingerprint != before


@pytest.mark.parametrize("content", ["", "[", "[]", "{}", '{"fact": "another", "value": "?"}'])
def test_damaged_cache_entries_are_computed_again(tmp_path: Path, content: str) -> None:
    folder = save_tiny(tmp_path / "tiny")
    before = Checkpoint.open(folder).fingerprint
    for fact in (tmp_path / "cache").rglob("*.json"):
        fact.write_text(content)

    assert Checkpoint.open(folder).fingerprint == before


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")

    assert Checkpoint.open(save_tiny(tmp_path / "tiny")).fingerprint


def test_the_key_depends_only_on_the_computation(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    key = Checkpoint.open(folder).key
    assert key.startswith("llama-4x32-")

    edit_json(
        folder / "config.json",
        lambda config: config.update(
            dtype="bfloat16", transformers_version="4.0", eos_token_id=[1, 2], _name_or_path="x", architectures=None
        ),
    )
    assert Checkpoint.open(folder).key == key

    edit_json(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    assert Checkpoint.open(folder).key != key
