"""Only right pieces are stored, what was saved is found again, and nothing counts that is not on the disk."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import CheckpointError, UserError
from shoal.model.weights.pieces.manifest import PIECE_BYTES
from shoal.model.weights.pieces.piece_store import FolderPieces, PieceStore

from .listed_files import cut, manifest_of

LARGE = bytes(range(1, 256)) * (PIECE_BYTES // 255 + 1)  # two pieces, without a zero
FILES = {
    "a.safetensors": LARGE,
    "b.json": b"",
    "c.json": b"the config",
    **{f"d{index}.txt": b"%d" % index for index in range(9)},
    "e.json": b"",
}
MANIFEST = manifest_of(FILES)
PIECES = [piece for name in sorted(FILES) for piece in cut(FILES[name])]
CONFIG = 2
LAST = len(PIECES) - 1


def held(store: PieceStore) -> list[int]:
    return [piece for piece in range(-2, len(PIECES) + 9) if store.holds(piece)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def small_store(folder: Path) -> PieceStore:
    return PieceStore(manifest_of({"a.json": b"aa", "b.json": b"bb", "c.json": b"cc"}), folder)


@pytest.fixture
def store(tmp_path: Path) -> PieceStore:
    return PieceStore(MANIFEST, tmp_path / "deep" / "store")


def test_files_have_their_full_size_from_the_beginning_and_hold_nothing(store: PieceStore) -> None:
    assert contents(store.folder) == {name: bytes(len(content)) for name, content in FILES.items()}
    assert held(store) == []
    assert store.missing(range(len(PIECES))) == list(range(len(PIECES)))


def test_pieces_that_come_in_any_order_make_the_files(store: PieceStore) -> None:
    for piece in (7, 1, LAST, 0, *range(len(PIECES))):
        assert store.put(piece, memoryview(PIECES[piece]))
        assert store.holds(piece)
        assert store.read(piece) == PIECES[piece]
    assert contents(store.folder) == FILES
    assert store.missing(range(len(PIECES))) == []


def test_a_piece_changes_its_own_bytes_only(store: PieceStore) -> None:
    before = contents(store.folder)
    assert store.put(1, PIECES[1])
    assert contents(store.folder) == before | {"a.safetensors": bytes(PIECE_BYTES) + PIECES[1]}
    assert held(store) == [1]
    assert store.missing([2, 1, 0]) == [2, 0]


@pytest.mark.parametrize(
    ("piece", "content"),
    [
        (CONFIG, b"the confiG"),
        (CONFIG, b"the confi"),
        (CONFIG, b"the config\n"),
        (CONFIG, b""),
        (CONFIG, PIECES[3]),
        (0, PIECES[1]),
        (0, PIECES[0] + b"\0"),
        (0, PIECES[0] + PIECES[1]),
        (0, PIECES[0][:-1]),
        (1, PIECES[0]),
        (LAST + 1, b""),
        (LAST + 1, PIECES[LAST]),
        (-1, PIECES[LAST]),
        (-len(PIECES), PIECES[0]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)} bytes",
)
def test_a_wrong_short_long_or_misplaced_piece_is_not_stored(store: PieceStore, piece: int, content: bytes) -> None:
    before = contents(store.folder)
    assert store.put(piece, content) is False
    store.save()
    assert held(store) == held(PieceStore(MANIFEST, store.folder)) == []
    after = contents(store.folder)
    assert after.pop("held")[:2] == bytes(2)
    assert after == before


def test_a_wrong_piece_does_not_replace_the_right_one(store: PieceStore) -> None:
    assert store.put(CONFIG, PIECES[CONFIG])
    assert not store.put(CONFIG, PIECES[CONFIG].upper())
    assert store.read(CONFIG) == PIECES[CONFIG]
    assert held(store) == [CONFIG]


def test_what_was_saved_is_found_again_and_what_was_not_does_not_count(store: PieceStore) -> None:
    for piece in (0, CONFIG, LAST):
        store.put(piece, PIECES[piece])
    store.save()
    store.put(1, PIECES[1])

    again = PieceStore(MANIFEST, store.folder)

    assert held(again) == [0, CONFIG, LAST]
    assert again.read(LAST) == PIECES[LAST]
    assert held(store) == [0, 1, CONFIG, LAST]


@settings(max_examples=30)
@given(st.lists(st.integers(CONFIG, LAST) | st.just("save") | st.just("crash"), max_size=20))
def test_after_a_crash_there_is_at_least_what_was_saved_and_nothing_that_never_came(
    tmp_path_factory: pytest.TempPathFactory, acts: list[int | str]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    manifest = manifest_of({name: content for name, content in FILES.items() if name != "a.safetensors"})
    store, saved, come = PieceStore(manifest, folder), set[int](), set[int]()
    for act in acts:
        if isinstance(act, int):
            assert store.put(act - CONFIG, PIECES[act])
            come.add(act - CONFIG)
        elif act == "save":
            store.save()
            saved = set(come)
        else:
            store, come = PieceStore(manifest, folder), set(saved)
        assert {piece for piece in range(manifest.num_pieces) if store.holds(piece)} == come


def test_two_stores_of_a_folder_lose_none_of_each_others_pieces(store: PieceStore) -> None:
    other = PieceStore(MANIFEST, store.folder)
    store.put(0, PIECES[0])
    other.put(1, PIECES[1])
    other.put(LAST, PIECES[LAST])
    store.save()
    other.save()
    store.put(CONFIG, PIECES[CONFIG])
    store.save()

    assert held(PieceStore(MANIFEST, store.folder)) == [0, 1, CONFIG, LAST]
    assert (store.folder / "a.safetensors").read_bytes() == LARGE


def test_many_threads_lose_no_pieces_and_save_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{index:03}.txt": b"%d" % index for index in range(64)}
    manifest = manifest_of(files)
    store = PieceStore(manifest, tmp_path)
    ready = threading.Barrier(8)
    replace, saving, most = os.replace, list[Path](), 0

    def replace_slowly(source: Path, target: Path) -> None:
        nonlocal most
        saving.append(source)
        for _ in range(10):
            target.exists()  # lets other threads go on
            most = max(most, len(saving))
        replace(source, target)
        saving.remove(source)

    def work(first: int) -> None:
        ready.wait()
        for piece in range(first, 64, 8):
            store.put(piece, b"%d" % piece)
            store.save()

    monkeypatch.setattr(os, "replace", replace_slowly)
    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most == 1
    assert PieceStore(manifest, tmp_path).missing(range(64)) == []
    assert contents(tmp_path).keys() == files.keys() | {"held"}


@pytest.mark.parametrize("content", [b"", b"\xff", b"\xff" * 3, b"\xff" * 1000])
def test_a_list_of_another_length_is_ignored(store: PieceStore, content: bytes) -> None:
    store.put(CONFIG, PIECES[CONFIG])
    store.save()
    (store.folder / "held").write_bytes(content)

    again = PieceStore(MANIFEST, store.folder)

    assert held(again) == []
    again.put(0, PIECES[0])
    again.save()
    assert held(PieceStore(MANIFEST, store.folder)) == [0]


def test_bits_beyond_the_last_piece_mean_nothing(store: PieceStore) -> None:
    (store.folder / "held").write_bytes(b"\xff\xff" + bytes(16))
    assert held(PieceStore(MANIFEST, store.folder)) == list(range(len(PIECES)))


@pytest.mark.parametrize("harm", ["deleted", "cut", "lengthened"])
def test_the_pieces_of_a_file_that_was_deleted_or_cut_are_wanted_again(store: PieceStore, harm: str) -> None:
    for piece in range(len(PIECES)):
        store.put(piece, PIECES[piece])
    store.save()
    path = store.folder / "a.safetensors"
    match harm:
        case "deleted":
            path.unlink()
        case "cut":
            path.write_bytes(LARGE[:100])
        case "lengthened":
            path.write_bytes(LARGE + b"more")

    for again in (PieceStore(MANIFEST, store.folder), PieceStore(MANIFEST, store.folder)):
        assert again.missing(range(len(PIECES))) == [0, 1]
        again.save()
    assert path.stat().st_size == len(LARGE)
    assert again.put(0, PIECES[0])
    assert again.put(1, PIECES[1])
    assert path.read_bytes() == LARGE


def test_a_file_that_has_changed_is_not_passed_on(store: PieceStore) -> None:
    store.put(CONFIG, PIECES[CONFIG])
    (store.folder / "c.json").write_bytes(b"THE CONFIG")
    with pytest.raises(CheckpointError, match=r"c\.json has changed since it was looked at") as caught:
        store.read(CONFIG)
    assert caught.value.hint

    (store.folder / "c.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*c\.json: No such file"):
        store.read(CONFIG)


@pytest.mark.parametrize("piece", [-1, LAST + 1, 1 << 40])
def test_a_piece_that_there_is_not_cannot_be_read(store: PieceStore, piece: int) -> None:
    with pytest.raises(CheckpointError):
        store.read(piece)


def test_a_folder_that_cannot_be_made_is_told_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(UserError, match=r"cannot write .*file") as caught:
            PieceStore(MANIFEST, folder)
        assert "SHOAL_CACHE" in str(caught.value.hint)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("name", ["held", "c.json"])
def test_a_folder_in_the_place_of_a_file_is_told_with_a_hint(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write") as caught:
        PieceStore(MANIFEST, tmp_path)
    assert "SHOAL_CACHE" in str(caught.value.hint)


def test_a_file_that_cannot_be_written_is_told_and_its_piece_is_still_missing(store: PieceStore) -> None:
    (store.folder / "c.json").unlink()
    (store.folder / "c.json").mkdir()
    with pytest.raises(UserError, match="cannot write") as caught:
        store.put(CONFIG, PIECES[CONFIG])
    assert "SHOAL_CACHE" in str(caught.value.hint)
    assert not store.holds(CONFIG)


def test_a_list_that_cannot_be_saved_is_told_and_saved_the_next_time(store: PieceStore) -> None:
    store.put(CONFIG, PIECES[CONFIG])
    (store.folder / "held" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write"):
        store.save()
    (store.folder / "held" / "inner").rmdir()
    (store.folder / "held").rmdir()

    store.save()

    assert held(PieceStore(MANIFEST, store.folder)) == [CONFIG]


def test_a_piece_counts_only_after_its_file_is_on_the_disk_also_if_the_disk_refused_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_store(tmp_path)
    synced: set[int] = set()
    is_full = True

    def sync(descriptor: int) -> None:
        assert not (tmp_path / "held").exists()
        if is_full:
            raise OSError(28, "No space left on device")
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", sync)
    store.put(0, b"aa")
    store.put(2, b"cc")
    with pytest.raises(UserError, match="No space left on device"):
        store.save()
    assert small_store(tmp_path).missing(range(3)) == [0, 1, 2]

    is_full = False
    store.save()

    assert synced == {(tmp_path / name).stat().st_ino for name in ("a.json", "c.json")}
    assert small_store(tmp_path).missing(range(3)) == [1]


def test_a_folder_with_all_files_gives_each_piece(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    source = FolderPieces(MANIFEST, tmp_path)
    assert [piece for piece in range(-9, len(PIECES) + 9) if source.holds(piece)] == list(range(len(PIECES)))
    assert [source.read(piece) for piece in range(len(PIECES))] == PIECES
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("change", [b"", b"the confi", b"the conFig"])
def test_a_folder_gives_nothing_that_has_changed(tmp_path: Path, change: bytes) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    source = FolderPieces(MANIFEST, tmp_path)
    (tmp_path / "c.json").write_bytes(change)
    with pytest.raises(CheckpointError, match="has changed since it was looked at"):
        source.read(CONFIG)
    assert source.read(0) == PIECES[0]


def test_pieces_of_a_file_that_another_process_has_made_anew_do_not_come_back(store: PieceStore) -> None:
    for piece, content in enumerate(PIECES[:2]):
        assert store.put(piece, content)
    store.save()
    (store.folder / "a.safetensors").unlink()
    other = PieceStore(MANIFEST, store.folder)
    assert held(other) == []
    assert store.put(CONFIG, PIECES[CONFIG])
    store.save()
    assert held(store) == held(PieceStore(MANIFEST, store.folder)) == []
    assert store.put(CONFIG, PIECES[CONFIG])
    store.save()
    assert held(store) == held(PieceStore(MANIFEST, store.folder)) == [CONFIG]
