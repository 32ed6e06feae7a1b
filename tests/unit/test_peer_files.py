"""A model whose files come from members is the same model, and only what is needed comes, once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from shoal.bundled import STORIES
from shoal.errors import CheckpointError
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.files import LocalFiles
from shoal.model.weights.pieces import manifest as manifests
from shoal.model.weights.pieces.manifest import PIECE_BYTES, ListedFile, Manifest
from shoal.model.weights.pieces.peer_files import PeerFiles
from shoal.model.weights.pieces.piece_store import FolderPieces, PieceSource, PieceStore
from shoal.model.weights.pieces.sources import MAX_OTHER_BYTES, source_of
from shoal.spans import Span

from .listed_files import manifest_of

MIB = 1 << 20
SIZES = {
    "model-1.safetensors": {
        "model.embed_tokens.weight": MIB,
        "model.layers.0.mlp.up_proj.weight": 5 * MIB,
        "model.layers.0.mlp.down_proj.weight": MIB // 2,
        "model.layers.1.mlp.down_proj.weight": 3 * MIB,
    },
    "model-2.safetensors": {
        "model.layers.1.mlp.up_proj.weight": 9 * MIB,
        "model.layers.2.mlp.down_proj.weight": 100,
    },
    "model-3.safetensors": {
        "model.layers.3.mlp.up_proj.weight": 4 * MIB,
        "model.norm.weight": MIB,
    },
}
"""Blocks of several pieces, pieces of several blocks, and block 1 in two files. None has the shape that it should."""
INDEX = "model.safetensors.index.json"
ALL = Span(0, 4)


class Members:
    """They give all pieces, or none after `left` of them, and remember what they were asked for."""

    def __init__(self, source: PieceSource, store: PieceStore, *, left: int | None = None) -> None:
        self.asked: list[int] = []
        self._source = source
        self._store = store
        self._left = left

    def __call__(self, pieces: Sequence[int]) -> None:
        for piece in pieces:
            if self._left is not None and len(self.asked) >= self._left:
                raise CheckpointError("no member gives it")
            self.asked.append(piece)
            assert self._store.put(piece, self._source.read(piece))


def open_at(source: PieceSource, folder: Path, *, left: int | None = None) -> tuple[PeerFiles, Members]:
    store = PieceStore(source.manifest, folder)
    members = Members(source, store, left=left)
    return PeerFiles(store, members, name="sharded"), members


def pieces_of(manifest: Manifest, folder: Path, file: str, names: Sequence[str] = ()) -> set[int]:
    """The pieces with the header and these tensors of a file, counted byte by byte from what the format says."""
    content = (folder / file).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    ranges = [(0, start), *([start + offset for offset in header[name]["data_offsets"]] for name in names)]
    before = sum(-(-each.size // PIECE_BYTES) for each in manifest.files if each.name < file)
    return {before + at // PIECE_BYTES for first, end in ranges for at in range(first, end)[:: 1 << 10]} | {
        before + (end - 1) // PIECE_BYTES for _, end in ranges
    }


def pieces_of_block(manifest: Manifest, folder: Path, block: int) -> set[int]:
    needed = set()
    for file, sizes in SIZES.items():
        if names := [name for name in sizes if f".layers.{block}." in name]:
            needed |= pieces_of(manifest, folder, file, names)
    return needed


def same_tensors(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.fixture(autouse=True, scope="module")
def _no_facts_from_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sharded"
    config = LlamaConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=128)
    config.save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    for file, sizes in SIZES.items():
        made = {name: torch.randint(256, (size,), dtype=torch.uint8, generator=random) for name, size in sizes.items()}
        save_file(made, folder / file)
    weight_map = {name: file for file, sizes in SIZES.items() for name in sizes}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def source(sharded: Path) -> PieceSource:
    found = source_of(Checkpoint.open(sharded))
    assert found is not None
    return found


def test_the_bundled_model_from_members_is_the_same_model(tmp_path: Path) -> None:
    here = Checkpoint.open(STORIES)
    source = source_of(here)
    assert source is not None
    files, members = open_at(source, tmp_path)

    there = Checkpoint.of(files)

    weights = list(source.manifest.pieces("model.safetensors"))
    assert len(weights) > 1
    assert members.asked == [*source.manifest.pieces("config.json"), weights[0]]
    assert (there.key, there.fingerprint) == (here.key, here.fingerprint)
    assert (there.block_bytes, there.head_bytes) == (here.block_bytes, here.head_bytes)
    assert there.file_of == here.file_of
    assert there.config.to_dict() | {"_name_or_path": ""} == here.config.to_dict() | {"_name_or_path": ""}
    assert len(members.asked) == 2
    for block in range(here.num_blocks):
        span = Span(block, block + 1)
        assert same_tensors(there.block_tensors(span), here.block_tensors(span))
    assert same_tensors(there.head_tensors(), here.head_tensors())
    assert len(members.asked) == len(set(members.asked)) == 1 + len(weights)


def test_a_model_of_several_files_from_members_is_the_same_model(
    tmp_path: Path, sharded: Path, source: PieceSource
) -> None:
    files, members = open_at(source, tmp_path)
    here, there = Checkpoint.open(sharded), Checkpoint.of(files)
    assert (there.key, there.fingerprint, there.block_bytes) == (here.key, here.fingerprint, here.block_bytes)
    assert same_tensors(there.block_tensors(ALL), here.block_tensors(ALL))
    assert same_tensors(there.head_tensors(), here.head_tensors())
    assert len(members.asked) == len(set(members.asked))
    assert {path.name for path in tmp_path.iterdir()} == {*files.listing(), "held"}


def test_to_look_at_a_model_only_what_describes_it_comes(tmp_path: Path, sharded: Path, source: PieceSource) -> None:
    files, members = open_at(source, tmp_path)

    checkpoint = Checkpoint.of(files)
    _ = checkpoint.fingerprint

    assert set(members.asked) == {*source.manifest.pieces("config.json"), *source.manifest.pieces(INDEX)}
    members.asked.clear()
    _ = checkpoint.block_bytes
    assert set(members.asked) == set().union(*(pieces_of(source.manifest, sharded, file) for file in SIZES))


@pytest.mark.parametrize("span", [Span(0, 1), Span(1, 2), Span(2, 3), Span(3, 4), Span(0, 2), Span(2, 4)], ids=str)
@pytest.mark.parametrize("act", [Checkpoint.block_tensors, Checkpoint.read_ahead])
def test_only_the_pieces_of_a_span_come(tmp_path: Path, sharded: Path, source: PieceSource, span: Span, act) -> None:
    files, members = open_at(source, tmp_path)
    checkpoint = Checkpoint.of(files)
    members.asked.clear()

    act(checkpoint, span)

    needed = set().union(*(pieces_of_block(source.manifest, sharded, block) for block in range(span.start, span.end)))
    assert sorted(members.asked) == sorted(needed)
    assert same_tensors(checkpoint.block_tensors(span), Checkpoint.open(sharded).block_tensors(span))
    assert len(members.asked) == len(needed)


def test_the_head_comes_without_blocks_in_other_pieces(tmp_path: Path, sharded: Path, source: PieceSource) -> None:
    files, members = open_at(source, tmp_path)
    checkpoint = Checkpoint.of(files)
    members.asked.clear()

    checkpoint.head_tensors()

    needed = pieces_of(source.manifest, sharded, "model-1.safetensors", ["model.embed_tokens.weight"])
    needed |= pieces_of(source.manifest, sharded, "model-3.safetensors", ["model.norm.weight"])
    assert sorted(members.asked) == sorted(needed)


def test_the_blocks_on_disk_are_those_all_of_whose_pieces_have_come(
    tmp_path: Path, sharded: Path, source: PieceSource
) -> None:
    files, members = open_at(source, tmp_path)
    checkpoint = Checkpoint.of(files)
    needed = [pieces_of_block(source.manifest, sharded, block) for block in range(4)]
    assert checkpoint.blocks_on_disk() == []
    told = [[]]
    for piece in sorted(range(source.manifest.num_pieces), key=lambda piece: hashlib.sha256(bytes([piece])).digest()):
        files.store.put(piece, source.read(piece))
        told.append(checkpoint.blocks_on_disk())
        assert told[-1] == [block for block in range(4) if not files.store.missing(needed[block])]
    assert told[-1] == [0, 1, 2, 3]
    assert any(0 < len(blocks) < 4 for blocks in told)
    assert not set(members.asked) & set().union(*needed)


def test_to_ask_for_the_blocks_on_disk_fetches_nothing(tmp_path: Path, source: PieceSource) -> None:
    files, members = open_at(source, tmp_path)
    checkpoint = Checkpoint.of(files)
    checkpoint.block_tensors(Span(3, 4))
    members.asked.clear()

    assert checkpoint.blocks_on_disk() == [3]
    assert files.has_tensors("model-3.safetensors", ["model.layers.3.mlp.up_proj.weight"])
    assert not files.has_tensors("model-1.safetensors", ["model.embed_tokens.weight"])
    assert not files.has("model-1.safetensors")
    assert not files.has("tokenizer.json")
    assert members.asked == []


def test_what_has_come_does_not_come_again_to_the_next_process(tmp_path: Path, source: PieceSource) -> None:
    files, _ = open_at(source, tmp_path)
    tensors = Checkpoint.of(files).block_tensors(Span(0, 2))

    files, members = open_at(source, tmp_path, left=0)
    checkpoint = Checkpoint.of(files)

    assert checkpoint.blocks_on_disk() == [0, 1, 2]  # the small block 2 is in a piece of block 1
    assert same_tensors(checkpoint.block_tensors(Span(0, 2)), tensors)
    assert members.asked == []
    with pytest.raises(CheckpointError, match="no member gives it"):
        checkpoint.block_tensors(Span(3, 4))


def test_what_has_come_is_kept_if_members_stop_to_give_more(tmp_path: Path, sharded: Path, source: PieceSource) -> None:
    files, _ = open_at(source, tmp_path)
    Checkpoint.of(files)
    files, members = open_at(source, tmp_path, left=2)
    needed = pieces_of(source.manifest, sharded, "model-2.safetensors", ["model.layers.1.mlp.up_proj.weight"])
    assert len(needed) == 3

    with pytest.raises(CheckpointError, match="no member gives it"):
        files.tensors({"model-2.safetensors": ["model.layers.1.mlp.up_proj.weight"]})

    again, _ = open_at(source, tmp_path)
    assert again.store.missing(needed) == sorted(needed - set(members.asked))
    assert len(members.asked) == 2
    assert not again.has_tensors("model-2.safetensors", ["model.layers.1.mlp.up_proj.weight"])


def test_a_whole_file_comes_when_its_path_is_asked_for(tmp_path: Path, sharded: Path, source: PieceSource) -> None:
    files, members = open_at(source, tmp_path)
    path = files.path("model-2.safetensors")
    assert path.read_bytes() == (sharded / "model-2.safetensors").read_bytes()
    assert members.asked == list(source.manifest.pieces("model-2.safetensors"))
    assert files.has("model-2.safetensors")
    assert files.origin == str(tmp_path)
    assert files.name == "sharded"


@pytest.mark.parametrize("file", ["model-4.safetensors", "../model-1.safetensors", "held", "", "model.py"])
def test_a_file_that_is_not_listed_is_not_there(tmp_path: Path, source: PieceSource, file: str) -> None:
    files, members = open_at(source, tmp_path)
    (tmp_path / "model.py").write_text("raise SystemExit")
    assert file not in files
    assert file not in files.listing()
    assert not files.has(file)
    assert not files.has_tensors(file, ["model.norm.weight"])
    asks = [files.path, lambda file: files.headers([file]), lambda file: files.digests([file])]
    for ask in [*asks, lambda file: files.tensors({file: ["model.norm.weight"]})]:
        with pytest.raises(CheckpointError, match="has no file") as caught:
            ask(file)
        assert caught.value.hint
    assert members.asked == []
    assert 7 not in files


def made_up(folder: Path, files: dict[str, bytes]) -> PieceSource:
    """Members that give what a stranger made up and vouches for by the right digests."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return FolderPieces(manifest_of(files), folder)


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_an_index_that_names_a_file_that_is_not_listed_is_an_error_and_no_crash(tmp_path: Path, sharded: Path) -> None:
    index = {f"model.layers.{block}.w": f"model-{block}.safetensors" for block in range(4)}
    tensor = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    source = made_up(
        tmp_path / "source",
        {
            "config.json": (sharded / "config.json").read_bytes(),
            INDEX: json.dumps({"weight_map": index}).encode(),
            **{
                f"model-{block}.safetensors": safetensors({f"model.layers.{block}.w": tensor}, b"w")
                for block in (0, 1, 3)
            },
        },
    )
    files, _ = open_at(source, tmp_path / "store")
    checkpoint = Checkpoint.of(files)

    assert checkpoint.blocks_on_disk() == []
    checkpoint.block_tensors(Span(3, 4))
    assert checkpoint.blocks_on_disk() == [3]
    for ask in (lambda: checkpoint.block_tensors(ALL), lambda: checkpoint.fingerprint, lambda: checkpoint.block_bytes):
        with pytest.raises(CheckpointError, match=r"has no file model-2\.safetensors"):
            ask()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\2",
        b"\2\0\0\0\0\0\0",
        bytes(8),
        b"\xff" * 8,
        b"\xff" * 300,
        (1 << 63).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
        safetensors(b"[]"),
        safetensors(b"[" * 10_000),
        safetensors({"w": None}),
        safetensors({"w": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, b"w" * 8),
        safetensors({"w": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, b"w"),
        safetensors({"w": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}}, b"w"),
        safetensors({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1e300]}}, b"w"),
        safetensors({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, float("inf")]}}, b"w"),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_weights_that_somebody_made_up_are_an_error(tmp_path: Path, sharded: Path, content: bytes) -> None:
    config = (sharded / "config.json").read_bytes()
    source = made_up(tmp_path / "source", {"config.json": config, "model.safetensors": content})
    files, _ = open_at(source, tmp_path / "store")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        Checkpoint.of(files)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        files.tensors({"model.safetensors": ["w"]})


def test_a_tensor_that_the_file_lacks_is_an_error(tmp_path: Path, source: PieceSource) -> None:
    files, _ = open_at(source, tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor w is missing from model-3\.safetensors"):
        files.tensors({"model-3.safetensors": ["model.norm.weight", "w"]})


def test_a_header_may_be_longer_than_a_piece(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"padding": "x" * PIECE_BYTES},
        "empty": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
        "w": {"dtype": "U8", "shape": [2 * PIECE_BYTES], "data_offsets": [0, 2 * PIECE_BYTES]},
    }
    source = made_up(tmp_path / "source", {"w.safetensors": safetensors(header, b"w" * 2 * PIECE_BYTES)})
    files, members = open_at(source, tmp_path / "store")

    assert not files.has_tensors("w.safetensors", ["empty"])
    files.store.put(0, source.read(0))
    assert not files.has_tensors("w.safetensors", ["empty"])
    assert members.asked == []
    assert files.headers(["w.safetensors"])["w.safetensors"]["w"].nbytes == 2 * PIECE_BYTES
    assert members.asked == [1]
    assert files.has_tensors("w.safetensors", ["empty"])
    assert not files.has_tensors("w.safetensors", ["empty", "w"])
    assert files.tensors({"w.safetensors": ["w"]})["w"].eq(ord("w")).all()
    assert members.asked == [1, 2, 3]


def test_files_of_a_folder_have_tensors_if_they_are_there(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    (folder / "model-2.safetensors").unlink()
    files = LocalFiles(folder, name="copy")

    assert files.has_tensors("model-3.safetensors", ["model.norm.weight"])
    assert not files.has_tensors("model-2.safetensors", ["model.layers.2.mlp.down_proj.weight"])
    assert files.tensors({"model-3.safetensors": ["model.norm.weight"]}).keys() == {"model.norm.weight"}
    with pytest.raises(CheckpointError, match="has no file"):
        files.tensors({"model-2.safetensors": ["model.layers.2.mlp.down_proj.weight"]})
    assert Checkpoint.open(folder).blocks_on_disk() == [0, 3]
    assert source_of(Checkpoint.open(folder)) is None


def test_a_source_lists_the_checkpoint_and_nothing_that_may_not_be_listed(tmp_path: Path, sharded: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    ignored = [
        "model.py",
        "model.bin",
        "w.pt",
        "w.pkl",
        ".hidden.json",
        "ü.json",
        "a b.txt",
        "other.safetensors",
        "README.md",
    ]
    for name in ignored:
        (folder / name).write_bytes(b"ignored")
    with (folder / "large.json").open("wb") as file:
        file.truncate(MAX_OTHER_BYTES + 1)
    (folder / "deep.json").mkdir()
    (folder / "vocab.txt").write_bytes(b"")

    source = source_of(Checkpoint.open(folder))

    assert source is not None
    names = [each.name for each in source.manifest.files]
    assert names == sorted([*SIZES, "config.json", INDEX, "tokenizer.json", "vocab.txt"])
    contents = {name: (folder / name).read_bytes() for name in names}
    assert source.manifest == manifest_of(contents)
    assert Manifest.from_bytes(source.manifest.to_bytes(), name=source.manifest.name) == source.manifest
    for piece in range(source.manifest.num_pieces):
        place = source.manifest.place(piece)
        assert source.read(piece) == contents[place.file][place.offset : place.offset + place.length]


def test_a_copy_of_a_folder_has_the_same_manifest(tmp_path: Path, sharded: Path, source: PieceSource) -> None:
    folder = tmp_path / "other name"
    shutil.copytree(sharded, folder)
    copy = source_of(Checkpoint.open(folder))
    assert copy is not None
    assert copy.manifest.name == source.manifest.name

    (folder / "tokenizer.json").write_text('{"other": 1}')
    other = source_of(Checkpoint.open(folder))
    assert other is not None
    assert other.manifest.name != source.manifest.name


@pytest.mark.parametrize("name", [".hidden.safetensors", "a b.safetensors"])
def test_there_is_no_source_of_weights_whose_file_may_not_be_listed(tmp_path: Path, sharded: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    (folder / "model-2.safetensors").rename(folder / name)
    (folder / INDEX).write_text((folder / INDEX).read_text().replace("model-2.safetensors", name))
    assert Checkpoint.open(folder).blocks_on_disk() == [0, 1, 2, 3]
    assert source_of(Checkpoint.open(folder)) is None


@pytest.mark.parametrize("limit", ["MAX_FILES", "MAX_PIECES"])
def test_there_is_no_source_of_what_no_manifest_has_room_for(
    sharded: Path, source: PieceSource, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    count = {"MAX_FILES": len(source.manifest.files), "MAX_PIECES": source.manifest.num_pieces}[limit]
    monkeypatch.setattr(manifests, limit, count)
    assert source_of(Checkpoint.open(sharded)) is not None
    monkeypatch.setattr(manifests, limit, count - 1)
    assert source_of(Checkpoint.open(sharded)) is None


def test_who_gets_a_model_from_members_passes_on_what_has_come(tmp_path: Path, source: PieceSource) -> None:
    files, _ = open_at(source, tmp_path / "first")
    checkpoint = Checkpoint.of(files)
    checkpoint.block_tensors(Span(3, 4))

    passed_on = source_of(checkpoint)

    assert passed_on is files.store
    second, members = open_at(passed_on, tmp_path / "second")
    assert Checkpoint.of(second).block_tensors(Span(3, 4))
    assert all(map(passed_on.holds, members.asked))
    assert not passed_on.holds(source.manifest.pieces("model-2.safetensors")[-1])


def test_pieces_are_read_once_until_a_file_changes(tmp_path: Path, sharded: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    read: list[None] = []

    def found() -> Manifest:
        read.clear()
        source = source_of(Checkpoint.open(folder), check=lambda: read.append(None))
        assert source is not None
        return source.manifest

    first = found()
    assert len(read) == first.num_pieces
    assert found() == first
    assert read == []

    for content in ('{"longer": 1}', '{"longer": 2}'):
        (folder / "tokenizer.json").write_text(content)
        os.utime(folder / "tokenizer.json", ns=(0, len(content) + int(content[-2])))
        changed = found()
        assert len(read) == 1
        assert changed.is_piece(changed.pieces("tokenizer.json")[0], content.encode())
        differing = [piece for piece in range(first.num_pieces) if first.digests[piece] != changed.digests[piece]]
        assert differing == list(first.pieces("tokenizer.json"))


def test_reading_the_pieces_can_be_broken_off_and_done_again(tmp_path: Path, sharded: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)

    class Ended(Exception):
        pass

    left = iter(range(3))

    def check() -> None:
        if next(left, None) is None:
            raise Ended

    with pytest.raises(Ended):
        source_of(Checkpoint.open(folder), check=check)
    source = source_of(Checkpoint.open(folder))
    assert source is not None
    assert [source.read(piece) for piece in range(source.manifest.num_pieces)]


def test_a_listed_file_has_the_digest_that_the_fingerprint_is_made_from(sharded: Path, source: PieceSource) -> None:
    for each in source.manifest.files:
        content = (sharded / each.name).read_bytes()
        assert each == ListedFile(each.name, len(content), hashlib.sha256(content).hexdigest())
