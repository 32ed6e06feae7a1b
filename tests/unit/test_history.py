from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import UserError
from shoal.client.history import history as history_module
from shoal.client.history.history import BLOCK_TOKENS, History
from shoal.client.history.history_store import HistoryStore
from shoal.client.history.spill_file import FileRegion, SpillFile
from shoal.client.options.client_options import ClientOptions
from shoal.net.wire.encodings import as_received
from shoal.tensors import Encoding

WIDTH = 128
TOKEN_BYTES = WIDTH * 4


def inputs(batch_size: int, num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(batch_size, num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.data(), st.sampled_from(["raw", "bfloat16", "int8"]), st.sampled_from([None, 0, 3000, 20_000]))
def test_a_history_is_what_was_appended_rearranged_and_cropped(
    data: st.DataObject, encoding: Encoding, memory_bytes: int | None
):
    """Against the plainest implementation: one tensor that is rebuilt at every operation."""
    store = HistoryStore(encoding, memory_bytes=memory_bytes)
    block_tokens = data.draw(st.sampled_from([1, 3, BLOCK_TOKENS]))
    with patch.object(history_module, "BLOCK_TOKENS", block_tokens):
        history, plain = History(store), torch.zeros(2, 0, WIDTH)
        for step in range(data.draw(st.integers(1, 16))):
            match data.draw(st.sampled_from(["append", "append", "settle", "select", "crop"])):
                case "append":
                    batch_size = plain.shape[0] if plain.shape[1] else data.draw(st.integers(1, 3))
                    piece = inputs(batch_size, data.draw(st.integers(1, 7)), step)
                    # What a lossy store keeps is made of what it can keep exactly.
                    piece = as_received(piece, encoding)
                    history.append(piece)
                    plain = torch.cat((plain, piece), dim=1) if plain.shape[1] else piece
                case "settle":
                    history.settle(data.draw(st.integers(0, plain.shape[1] + 1)))
                case "select" if plain.shape[1]:
                    rows = data.draw(st.lists(st.integers(0, plain.shape[0] - 1), min_size=1, max_size=4))
                    history.select_rows(rows)
                    plain = plain[rows]
                case "crop":
                    num_tokens = data.draw(st.integers(0, plain.shape[1]))
                    history.crop(num_tokens)
                    plain = plain[:, :num_tokens]
            assert history.num_tokens == plain.shape[1]
            if plain.shape[1]:
                position = data.draw(st.integers(0, plain.shape[1] - 1))
                assert torch.equal(history.since(position), plain[:, position:])
                end = data.draw(st.integers(position + 1, plain.shape[1]))
                assert torch.equal(history.between(position, end), plain[:, position:end])
            assert memory_bytes is None or store.memory_bytes <= memory_bytes


def test_a_history_that_was_cropped_to_nothing_may_begin_with_another_batch():
    history = History(HistoryStore())
    history.append(torch.zeros(2, 3, 1))
    history.select_rows([1, 1, 0])
    history.crop(0)
    history.append(torch.ones(5, 2, 1))
    history.select_rows([4])
    history.append(torch.ones(1, BLOCK_TOKENS, 1))
    history.settle(history.num_tokens)
    assert history.since(0).tolist() == torch.ones(1, 2 + BLOCK_TOKENS, 1).tolist()


def test_an_exact_history_is_exact_in_a_file_too():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(1, 512, WIDTH)
    store = HistoryStore(memory_bytes=0)
    history = History(store)
    history.append(bits)
    history.settle(history.num_tokens)
    assert (store.memory_bytes, store.file_bytes) == (0, bits.nbytes)
    assert torch.equal(history.since(0).view(torch.int16), bits.view(torch.int16))


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_what_was_appended_is_exact_until_it_is_settled(encoding: Encoding):
    history, piece = History(HistoryStore(encoding)), inputs(1, 3 * BLOCK_TOKENS, 0)
    history.append(piece)
    assert torch.equal(history.since(0), piece)
    history.settle(2 * BLOCK_TOKENS + 1)
    middle = 2 * BLOCK_TOKENS
    assert torch.equal(history.between(0, middle), as_received(piece[:, :middle], encoding))
    assert torch.equal(history.since(middle), piece[:, middle:])


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
@pytest.mark.parametrize("values", [torch.arange(200), torch.arange(200, dtype=torch.uint8)], ids=["int64", "uint8"])
def test_masks_and_positions_are_always_exact(encoding: Encoding, values: torch.Tensor):
    history = History(HistoryStore(encoding, memory_bytes=0))
    for piece in values[None].split(7, dim=1):
        history.append(piece)
        history.settle(history.num_tokens)
    assert torch.equal(history.since(0), values[None])


def test_all_histories_of_a_store_share_its_memory_and_the_oldest_pieces_leave_it_first(
    monkeypatch: pytest.MonkeyPatch,
):
    num_reads = 0

    def read(file: SpillFile, region: FileRegion, *, read: Callable[..., bytearray] = SpillFile.read) -> bytearray:
        nonlocal num_reads
        num_reads += 1
        return read(file, region)

    monkeypatch.setattr(SpillFile, "read", read)
    store = HistoryStore(memory_bytes=3 * BLOCK_TOKENS * TOKEN_BYTES)
    histories = [History(store) for _ in range(2)]
    for step in range(4 * BLOCK_TOKENS):
        for history in histories:
            history.append(inputs(1, 1, step))
            history.settle(step + 1)
        assert store.memory_bytes <= 3 * BLOCK_TOKENS * TOKEN_BYTES
    assert store.memory_bytes + store.file_bytes == 2 * 4 * BLOCK_TOKENS * TOKEN_BYTES
    assert all(history.num_entries == 4 for history in histories)
    reads = []
    for history in histories:
        for block in range(4):
            num_reads = 0
            history.between(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
            reads.append(num_reads)
    assert reads == [1, 1, 1, 0, 1, 1, 0, 0]


def test_tokens_that_come_one_by_one_are_written_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch):
    store, sizes = HistoryStore(memory_bytes=0), list[int]()
    monkeypatch.setattr(SpillFile, "write", _counting(SpillFile.write, sizes))
    history = History(store)
    for step in range(3 * BLOCK_TOKENS):
        history.append(inputs(2, 1, step))
        history.settle(step + 1)
        history.select_rows([1, 0])
    assert sizes == [BLOCK_TOKENS * 2 * TOKEN_BYTES] * 3
    assert history.num_entries <= 2 * 3 + 1


def _counting(write: Callable[[SpillFile, bytearray], FileRegion], sizes: list[int]) -> Callable[..., FileRegion]:
    def counting(file: SpillFile, data: bytearray) -> FileRegion:
        sizes.append(len(data))
        return write(file, data)

    return counting


def test_blocks_of_a_wide_batch_have_fewer_tokens():
    store = HistoryStore()
    history = History(store)
    wide = torch.zeros(16, 100, 4096)
    history.append(wide)
    history.settle(history.num_tokens)
    assert history.num_entries == 25
    assert store.memory_bytes == wide.nbytes


def test_a_token_does_not_keep_the_tensor_alive_that_it_was_cut_from():
    history, whole = History(HistoryStore()), inputs(1, 1000, 0)
    history.append(whole[:, 999:])
    assert history.since(0).untyped_storage().nbytes() == TOKEN_BYTES
    history.append(whole)
    history.settle(history.num_tokens)
    assert torch.equal(history.since(0), torch.cat((whole[:, 999:], whole), dim=1))
    whole.zero_()
    assert history.since(0).all(dim=-1).any()


@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_a_history_that_is_not_referenced_takes_no_bytes(memory_bytes: int | None):
    store = HistoryStore(memory_bytes=memory_bytes)
    histories = [History(store) for _ in range(3)]
    for history in histories:
        history.append(inputs(1, 5 * BLOCK_TOKENS, 0))
        history.settle(history.num_tokens)
    region = store.memory_bytes + store.file_bytes
    assert region == 3 * 5 * BLOCK_TOKENS * TOKEN_BYTES
    del histories[1], history
    histories[0].crop(2 * BLOCK_TOKENS)
    gc.collect()
    other = History(store)
    other.append(inputs(1, 8 * BLOCK_TOKENS, 1))
    other.settle(other.num_tokens)
    assert store.memory_bytes + store.file_bytes == region
    histories.clear()
    del other
    gc.collect()
    assert (store.memory_bytes, store.file_bytes) == (0, 0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 50), st.integers(0, 20)), max_size=40))
def test_a_file_returns_what_was_written_and_ends_where_the_last_of_it_does(
    steps: list[tuple[bool, int, int]],
):
    file, written = SpillFile(), dict[FileRegion, bytearray]()
    for index, (frees, size, which) in enumerate(steps):
        if frees and written:
            region = sorted(written)[which % len(written)]
            del written[region]
            file.free(region)
        else:
            data = bytearray([index]) * size
            region = file.write(data)
            written[region] = data
        assert all(
            before.end <= after.start for before, after in zip(sorted(written), sorted(written)[1:], strict=False)
        )
        assert file.num_bytes == max((region.end for region in written), default=0)
    assert all(file.read(region) == data for region, data in written.items())


def test_nothing_is_seen_in_the_folder_and_nothing_stays_there(tmp_path: Path):
    store = HistoryStore(memory_bytes=0, folder=tmp_path)
    kept = store.put(inputs(1, 10, 0))
    assert store.file_bytes == 10 * TOKEN_BYTES
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(kept.get(), inputs(1, 10, 0))


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[Mock]:
    """The temporary files that are made, each wrapped so that a test can let it fail."""
    made, usual = list[Mock](), tempfile.TemporaryFile

    def make(*args: Any, **kwargs: Any) -> Mock:
        made.append(Mock(wraps=usual(*args, **kwargs)))
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", make)
    return made


def test_a_full_disk_leaves_a_history_in_memory(files: list[Mock], caplog: pytest.LogCaptureFixture):
    store = HistoryStore(memory_bytes=0)
    (file,) = files
    file.write.side_effect = OSError(28, "No space left on device")
    kept = [store.put(inputs(1, 10, seed)) for seed in range(3)]
    file.write.side_effect = None
    assert store.memory_bytes == 3 * 10 * TOKEN_BYTES
    assert caplog.text.count("histories stay in memory, beyond the limit: [Errno 28] No space left on device") == 1
    kept.append(store.put(inputs(1, 10, 3)))
    assert (store.memory_bytes, store.file_bytes) == (0, 4 * 10 * TOKEN_BYTES)
    assert all(torch.equal(each.get(), inputs(1, 10, seed)) for seed, each in enumerate(kept))


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no file can be made in .*nowhere: No such file"):
        HistoryStore(memory_bytes=0, folder=tmp_path / "nowhere")
    with pytest.raises(UserError, match="history_folder is for histories that do not fit into history_memory"):
        HistoryStore(folder=tmp_path)
    with pytest.raises(UserError, match="it has to be at least 0"):
        HistoryStore(memory_bytes=-1)


def test_a_store_that_is_not_referenced_closes_its_file(files: list[Mock]):
    store = HistoryStore(memory_bytes=0)
    descriptor = files[0].fileno()
    kept = store.put(inputs(1, 1, 0))
    del store
    gc.collect()
    os.fstat(descriptor)
    del kept
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_long_prompt_that_is_settled_piece_by_piece_is_not_copied_each_time():
    history, prompt = History(HistoryStore()), inputs(1, 10 * BLOCK_TOKENS + 3, 0)
    history.append(prompt)
    for num_tokens in range(0, 9 * BLOCK_TOKENS + 1, BLOCK_TOKENS // 2):
        history.settle(num_tokens)
        assert history.between(9 * BLOCK_TOKENS, 10 * BLOCK_TOKENS).data_ptr() == (
            prompt[:, 9 * BLOCK_TOKENS :].data_ptr()
        )
    history.settle(prompt.shape[1])
    assert history.since(10 * BLOCK_TOKENS).untyped_storage().nbytes() == 3 * TOKEN_BYTES
    assert torch.equal(history.since(0), prompt)


@pytest.mark.parametrize(
    ("history", "wire", "kept"),
    [
        ("raw", "raw", "raw"),
        ("int8", "raw", "int8"),
        ("raw", "int8", "int8"),
        ("bfloat16", "int8", "int8"),
        ("raw", "bfloat16", "bfloat16"),
        ("int8", "bfloat16", "int8"),
    ],
)
def test_inputs_that_were_rounded_to_travel_are_kept_as_they_travelled(
    history: Encoding, wire: Encoding, kept: Encoding
):
    assert ClientOptions(history=history, wire=wire).history_encoding == kept
