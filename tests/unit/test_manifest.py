"""A manifest comes back as it was, every byte of its files is in one piece, and what no checkpoint has is refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import CheckpointError
from shoal.model.weights.pieces.manifest import (
    DIGEST_BYTES,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_PIECES,
    PIECE_BYTES,
    SUFFIXES,
    ListedFile,
    Manifest,
    Place,
    may_be_listed,
)

from .listed_files import manifest_of

SHA256 = "0123456789abcdef" * 4
CONFIG = ["config.json", 3, SHA256]
WEIGHTS = ["model.safetensors", 2 * PIECE_BYTES + 1, SHA256]

sizes = st.sampled_from([0, 0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES]) | st.integers(
    0, 5 * PIECE_BYTES
)
names = st.sampled_from([f"{stem}{suffix}" for stem in ("0", "A", "a", "a-1", "a.b", "_") for suffix in SUFFIXES])


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    files = tuple(
        ListedFile(name, draw(sizes), hashlib.sha256(name.encode()).hexdigest())
        for name in sorted(draw(st.sets(names, min_size=1, max_size=6)))
    )
    seed = draw(st.binary(max_size=4))
    return Manifest(
        files,
        tuple(
            hashlib.sha256(seed + bytes([index])).digest() for index in range(sum(each.num_pieces for each in files))
        ),
    )


def form(files: Any, num_digests: int, **others: Any) -> bytes:
    content = {"piece_bytes": PIECE_BYTES, "files": files} | others
    return json.dumps(content, separators=(",", ":")).encode() + b"\n" + b"\7" * DIGEST_BYTES * num_digests


def read(data: bytes) -> Manifest:
    return Manifest.from_bytes(data, name=hashlib.sha256(data).hexdigest())


@given(manifests())
def test_a_manifest_comes_back_with_its_name(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    assert manifest.name == hashlib.sha256(data).hexdigest()
    again = Manifest.from_bytes(data, name=manifest.name)
    assert again == manifest
    assert again.name == manifest.name


@given(manifests())
def test_every_piece_has_a_place_in_a_file_whose_pieces_it_is_one_of(manifest: Manifest) -> None:
    for piece in range(manifest.num_pieces):
        place = manifest.place(piece)
        assert 0 < place.length <= PIECE_BYTES
        assert manifest.pieces(place.file, place.offset, place.offset + place.length) == range(piece, piece + 1)
        assert manifest.pieces(place.file, place.offset, place.offset + 1) == range(piece, piece + 1)
        assert piece in manifest.pieces(place.file)


@given(manifests())
def test_the_pieces_of_all_files_are_all_pieces_and_cover_each_file_once(manifest: Manifest) -> None:
    assert [piece for file in manifest.files for piece in manifest.pieces(file.name)] == list(
        range(manifest.num_pieces)
    )
    for file in manifest.files:
        at = 0
        for place in map(manifest.place, manifest.pieces(file.name)):
            assert place == Place(file.name, at, min(PIECE_BYTES, file.size - at))
            at += place.length
        assert at == file.size


@given(manifests(), st.data())
def test_the_pieces_of_some_bytes_are_those_that_hold_one_of_them(manifest: Manifest, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(manifest.files))
    edges = st.integers(0, file.size + 2 * PIECE_BYTES) | st.sampled_from([0, PIECE_BYTES, file.size])
    start, end = sorted((data.draw(edges), data.draw(edges)))

    def has_one_of_them(place: Place) -> bool:
        return max(start, place.offset) < min(end, place.offset + place.length)

    expected = [piece for piece in manifest.pieces(file.name) if has_one_of_them(manifest.place(piece))]
    assert list(manifest.pieces(file.name, start, end)) == expected


def test_empty_files_have_no_pieces_and_move_no_others() -> None:
    manifest = manifest_of({"a.json": b"", "b.json": b"bb", "c.json": b"", "d.json": b"", "e.txt": b"e", "f.txt": b""})
    assert [manifest.place(piece).file for piece in range(manifest.num_pieces)] == ["b.json", "e.txt"]
    assert [len(manifest.pieces(file.name)) for file in manifest.files] == [0, 1, 0, 0, 1, 0]
    assert read(manifest.to_bytes()) == manifest


def test_only_the_exact_content_is_a_piece() -> None:
    content = bytes(range(256)) * (PIECE_BYTES // 256) + b"end"
    manifest = manifest_of({"model.safetensors": content})
    first, last = content[:PIECE_BYTES], b"end"

    assert manifest.is_piece(0, first)
    assert manifest.is_piece(1, memoryview(last))
    assert manifest.is_piece(1, bytearray(last))
    assert not any(manifest.is_piece(0, wrong) for wrong in (last, b"", first[:-1], first + b"\0", first[::-1]))
    assert not any(manifest.is_piece(1, wrong) for wrong in (first, b"", b"en", b"end\0", b"eNd"))


def test_a_number_beyond_the_pieces_is_that_of_no_piece() -> None:
    content = bytes(2 * PIECE_BYTES)
    manifest = manifest_of({"model.safetensors": content})
    assert manifest.is_piece(1, content[:PIECE_BYTES])
    for piece in (-2, -1, 2, 1 << 70):
        assert not manifest.is_piece(piece, content[:PIECE_BYTES])
        assert not manifest.is_piece(piece, b"")


def test_files_are_found_by_their_names() -> None:
    manifest = manifest_of({"config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"t"})
    assert manifest.file("config.json") == manifest.files[0]
    assert manifest.file("config") is None
    assert manifest.others == ("config.json", "tokenizer.json")


def test_what_the_hostile_manifests_are_made_from_is_accepted() -> None:
    manifest = read(form([CONFIG, WEIGHTS], 4))
    assert [each.num_pieces for each in manifest.files] == [1, 3]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".json",
        ".hidden.json",
        "../config.json",
        "..",
        "a/config.json",
        "/etc/passwd.txt",
        "a\\config.json",
        "C:config.json",
        "config.json\n",
        "config.json\0",
        "con fig.json",
        "-rf.json",
        "köln.json",
        "\uff11.json",
        "model.py",
        "model.bin",
        "model.pt",
        "model.pth",
        "model.pkl",
        "model.so",
        "model.json.py",
        "model.JSON",
        "held",
        "manifest",
        "a" * 200 + ".json",
        "~.json",
        "$HOME.json",
    ],
)
def test_a_file_that_no_checkpoint_has_is_refused(name: str) -> None:
    assert not may_be_listed(name)
    with pytest.raises(CheckpointError, match="lists what no checkpoint has"):
        read(form([[name, 3, SHA256]], 1))


@pytest.mark.parametrize(
    "name", ["config.json", "model-00001-of-00002.safetensors", "spiece.model", "merges.txt", "chat_template.jinja"]
)
def test_a_file_that_a_checkpoint_has_may_be_listed(name: str) -> None:
    assert may_be_listed(name)
    assert read(form([[name, 3, SHA256]], 1)).files[0].name == name


@pytest.mark.parametrize(
    "size",
    [-1, -PIECE_BYTES, True, False, 3.0, 1e300, float("nan"), float("inf"), "3", None, [3], 1 << 63, 10**4000],
    ids=lambda size: repr(size)[:20],
)
def test_a_size_that_no_file_has_is_refused(size: Any) -> None:
    for num_digests in (0, 1):
        with pytest.raises(CheckpointError, match="lists what no checkpoint has"):
            read(form([["config.json", size, SHA256]], num_digests))


@pytest.mark.parametrize(
    "files",
    [
        [],
        {},
        None,
        3,
        "abc",
        ["abc"],
        [CONFIG, CONFIG],
        [WEIGHTS, CONFIG],
        [CONFIG, ["config.json", 4, SHA256]],
        [["config.json", 3]],
        [["config.json", 3, SHA256, 0]],
        [[["config.json"], 3, SHA256]],
        [[None, 3, SHA256]],
        [[{}, 3, SHA256]],
        [["config.json", 3, SHA256.upper()]],
        [["config.json", 3, SHA256[:-1]]],
        [["config.json", 3, SHA256 + "0"]],
        [["config.json", 3, SHA256 + "\n"]],
        [["config.json", 3, SHA256[:-1] + "g"]],
        [["config.json", 3, 7]],
        [["config.json", 3, None]],
        [{"name": "config.json", "size": 3, "sha256": SHA256}],
    ],
    ids=lambda files: repr(files)[:40],
)
def test_a_list_that_is_none_is_refused(files: Any) -> None:
    for num_digests in range(5):
        with pytest.raises(CheckpointError, match="lists what no checkpoint has"):
            read(form(files, num_digests))


@pytest.mark.parametrize("num_digests", [0, 3, 5])
def test_another_number_of_digests_than_of_pieces_is_refused(num_digests: int) -> None:
    with pytest.raises(CheckpointError, match="lists what no checkpoint has"):
        read(form([CONFIG, WEIGHTS], num_digests))


@pytest.mark.parametrize("extra", [b"\0", b"\n", b"\7" * (DIGEST_BYTES - 1)])
def test_trailing_bytes_and_cut_digests_are_refused(extra: bytes) -> None:
    sound = form([CONFIG, WEIGHTS], 4)
    for data in (sound + extra, sound[: -len(extra)]):
        with pytest.raises(CheckpointError, match="lists what no checkpoint has"):
            read(data)


@pytest.mark.parametrize(
    "files", [[["m.safetensors", MAX_PIECES * PIECE_BYTES + 1, SHA256]], [["m.safetensors", 10**30, SHA256]]]
)
def test_too_many_pieces_are_refused(files: Any) -> None:
    with pytest.raises(CheckpointError, match="lists what no checkpoint has"):
        read(form(files, 1))


def test_as_many_pieces_as_there_may_be_are_accepted_and_one_more_is_not() -> None:
    most = MAX_PIECES * PIECE_BYTES
    manifest = read(form([["m.safetensors", most, SHA256]], MAX_PIECES))
    assert manifest.place(MAX_PIECES - 1) == Place("m.safetensors", most - PIECE_BYTES, PIECE_BYTES)
    with pytest.raises(CheckpointError, match="lists what no checkpoint has"):
        read(form([["m.safetensors", most + 1, SHA256]], MAX_PIECES + 1))


def test_as_many_files_as_there_may_be_are_accepted_and_one_more_is_not() -> None:
    files = [[f"{index:04}.json", 0, SHA256] for index in range(MAX_FILES + 1)]
    assert len(read(form(files[:-1], 0)).files) == MAX_FILES
    with pytest.raises(CheckpointError, match="lists what no checkpoint has"):
        read(form(files, 0))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"files"',
        b"{}",
        b'{"files":[["config.json",3,"' + SHA256.encode() + b'"]]}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"piece_bytes":4194304,"files":' + b"[" * 100_000,
        b"\xff\xfe",
        b"1" * 10_000,
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_line_that_is_no_list_of_files_is_refused(line: bytes) -> None:
    for digests in (b"", b"\n", b"\n" + bytes(DIGEST_BYTES)):
        with pytest.raises(CheckpointError, match="lists what no checkpoint has"):
            read(line + digests)


@pytest.mark.parametrize("piece_bytes", [1, 0, -1, PIECE_BYTES // 2, float(PIECE_BYTES), str(PIECE_BYTES), None, True])
def test_pieces_of_another_size_are_refused(piece_bytes: Any) -> None:
    with pytest.raises(CheckpointError, match="lists what no checkpoint has"):
        read(form([CONFIG], 1, piece_bytes=piece_bytes))


def test_the_same_list_in_other_words_is_refused_because_its_name_would_be_another() -> None:
    sound = form([CONFIG], 1)
    line, _, digests = sound.partition(b"\n")
    content = json.loads(line)
    others = [
        json.dumps(content).encode(),
        json.dumps(content, separators=(",", ":"), sort_keys=True).encode(),
        line + b" ",
        line[:-1] + b',"more":1}',
        line[:-1] + b',"files":' + json.dumps([CONFIG], separators=(",", ":")).encode() + b"}",
        line.replace(b"config", b"\\u0063onfig"),
        b"\xef\xbb\xbf" + line,
    ]
    for other in others:
        with pytest.raises(CheckpointError):
            read(other + b"\n" + digests)


@given(manifests(), st.data())
def test_any_other_bytes_than_those_of_the_name_are_refused(manifest: Manifest, data: st.DataObject) -> None:
    sound = manifest.to_bytes()
    at = data.draw(st.integers(0, len(sound) - 1))
    flipped = sound[:at] + bytes([sound[at] ^ data.draw(st.integers(1, 255))]) + sound[at + 1 :]
    for other in (flipped, sound + b"\0", sound[:-1], b""):
        with pytest.raises(CheckpointError, match="not the manifest of the weights that were asked for"):
            Manifest.from_bytes(other, name=manifest.name)


def test_more_bytes_than_any_manifest_has_are_refused_although_the_name_is_theirs() -> None:
    data = form([CONFIG], 1)
    with pytest.raises(CheckpointError, match="not the manifest"):
        read(data + bytes(MAX_MANIFEST_BYTES))


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        read(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("config.json"),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["files", "piece_bytes"]), inner),
        max_leaves=12,
    )
)
def test_json_of_any_shape_is_refused(content: Any) -> None:
    data = json.dumps(content, separators=(",", ":")).encode() + b"\n" + bytes(DIGEST_BYTES)
    with pytest.raises(CheckpointError):
        read(data)
