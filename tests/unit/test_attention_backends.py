"""A faster attention backend is used only if it gives the numbers of the reference, in the dtype that is served."""

# T new tokens of all sequences, S all tokens of one, H heads of queries, J heads of keys, K size of a key, V of a value

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from shoal.errors import UnsupportedOperation
from shoal.prefix import PAGE_TOKENS
from shoal.server.attention_backends.backend_choice import Candidate, candidates_of, choose_attention
from shoal.server.attention_backends.feature_fallback import FeatureFallback
from shoal.server.attention_backends.self_check import WrongNumbers, check
from shoal.server.attention_backends.varlen_attention import VarlenAttention
from shoal.server.kv.attention import AttentionOptions, Feature, PackedBatch, PackedSequence
from shoal.server.kv.cache_shapes import CacheShapes, KeyValueShape
from shoal.server.kv.paged_cache import Int8Pages, PagedCache, Pages
from shoal.server.kv.sdpa_attention import SdpaAttention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = frozenset(Feature)


def body_in(dtype: torch.dtype) -> Any:
    """As much of a body as caches ask for."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    return SimpleNamespace(backbone=SimpleNamespace(dtype=dtype, device=torch.device("cpu"), config=config))


def cache_of(body: Any, *, value_size: int = 16, kind: type[Pages] = Pages) -> PagedCache:
    return PagedCache(body, CacheShapes({0: KeyValueShape(2, 16, value_size)}), 4, kind=kind)


class Right(SdpaAttention):
    """The reference under another name, which claims all features. Others spoil what it computes."""

    features = ALL

    def attend(self, metadata: Any, block: int, *tensors: Any) -> Tensor:
        return self.spoil(super().attend(metadata, block, *tensors), tensors[-1])

    def spoil(self, output: Tensor, options: AttentionOptions) -> Tensor:
        return output


class WrongByOnePercent(Right):
    def spoil(self, output: Tensor, options: AttentionOptions) -> Tensor:
        return output * 1.01


class IgnoresWindows(Right):
    def attend(self, metadata: Any, block: int, *tensors: Any) -> Tensor:
        *qkv, options = tensors
        return super().attend(metadata, block, *qkv, replace(options, sliding_window=None))


class WindowsOneTooLong(Right):
    def attend(self, metadata: Any, block: int, *tensors: Any) -> Tensor:
        *qkv, options = tensors
        if options.sliding_window is not None:
            options = replace(options, sliding_window=options.sliding_window + 1)
        return super().attend(metadata, block, *qkv, options)


class WrongAtOneToken(Right):
    """Only the last token of a pass is wrong, as at the edge of a tile of a kernel."""

    def spoil(self, output: Tensor, options: AttentionOptions) -> Tensor:
        output = output.clone()
        output[0, -1] *= 1.1
        return output


class Raises(Right):
    def metadata(self, batch: PackedBatch) -> Any:
        raise RuntimeError("this kernel was built for another device\nand more lines")


class GivesNaN(Right):
    def spoil(self, output: Tensor, options: AttentionOptions) -> Tensor:
        output = output.clone()
        output[0, 0, 0, 0] = float("nan")
        return output


class WritesNothing(Right):
    """It attends rightly, and leaves the new keys out of the cache, which the next pass will read."""

    def attend(self, metadata: Any, block: int, *tensors: Any) -> Tensor:
        before = [each.clone() for each in self._cache.raw_pages(block)]
        output = super().attend(metadata, block, *tensors)
        for page, old in zip(self._cache.raw_pages(block), before, strict=True):
            page.copy_(old)
        return output


@pytest.mark.parametrize("kind", [Pages, Int8Pages])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_backend_passes_in_every_dtype(dtype: torch.dtype, kind: type[Pages]):
    body = body_in(dtype)
    check(Right, body, cache_of(body, kind=kind), num_heads=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "wrong", [WrongByOnePercent, IgnoresWindows, WindowsOneTooLong, WrongAtOneToken, GivesNaN, WritesNothing]
)
def test_a_wrong_backend_is_found_in_every_dtype(wrong: type[Right], dtype: torch.dtype):
    body = body_in(dtype)
    with pytest.raises(WrongNumbers):
        check(wrong, body, cache_of(body), num_heads=4)


def test_what_is_wrong_only_with_windows_is_named():
    body = body_in(torch.float32)
    with pytest.raises(WrongNumbers, match=r"^sliding windows: off by"):
        check(IgnoresWindows, body, cache_of(body), num_heads=4)


def test_the_first_right_candidate_is_used_and_the_others_are_named_with_their_reasons():
    body, undone = body_in(torch.float32), []
    candidates = [
        Candidate("raises", Raises, undo=lambda: undone.append("raises")),
        Candidate("wrong", WrongByOnePercent, undo=lambda: undone.append("wrong")),
        Candidate("right", Right, undo=lambda: undone.append("right")),
        Candidate("never tried", Raises),
    ]
    choice = choose_attention(body, cache_of(body), candidates)
    assert isinstance(choice.backend, FeatureFallback)
    assert choice.name == "right"
    assert [name for name, _ in choice.rejected] == undone == ["raises", "wrong"]
    assert choice.described.startswith("right; not raises: this kernel was built for another device; not wrong: ")


def test_without_a_right_candidate_the_reference_is_used():
    body = body_in(torch.bfloat16)
    choice = choose_attention(body, cache_of(body), [Candidate("nan", GivesNaN)])
    assert type(choice.backend) is SdpaAttention
    assert (choice.name, [name for name, _ in choice.rejected]) == ("sdpa", ["nan"])


def test_a_processor_has_the_reference_alone_and_a_gpu_has_candidates():
    assert candidates_of(torch.device("cpu")) == candidates_of(torch.device("mps")) == ()
    assert [each.name for each in candidates_of(torch.device("cuda"))] == ["varlen-fa4", "varlen-fa3", "varlen"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the candidates of a GPU may work here")
def test_the_candidates_of_a_gpu_are_rejected_on_a_machine_without_one():
    body = body_in(torch.bfloat16)
    choice = choose_attention(body, cache_of(body), candidates_of(torch.device("cuda")))
    assert choice.name == "sdpa"
    assert len(choice.rejected) == 3
    assert all(reason for _, reason in choice.rejected)


# -- the fallback --------------------------------------------------------------------------------------------------


class Counting(Right):
    def __init__(self, cache: PagedCache, features: frozenset[Feature] = ALL) -> None:
        super().__init__(cache)
        self.features = features
        self.num_calls = 0

    def spoil(self, output: Tensor, options: AttentionOptions) -> Tensor:
        self.num_calls += 1
        return output


@pytest.mark.parametrize(
    ("options", "is_padded", "partial_computes"),
    [
        (AttentionOptions(), False, True),
        (AttentionOptions(sliding_window=3), False, True),
        (AttentionOptions(softcap=3.0), False, False),
        (AttentionOptions(sinks_H=torch.zeros(4)), False, False),
        (AttentionOptions(), True, False),
    ],
)
def test_what_a_backend_does_not_support_goes_to_the_reference(
    options: AttentionOptions, is_padded: bool, partial_computes: bool
):
    cache = cache_of(body_in(torch.float32))
    partial, reference = Counting(cache, frozenset({Feature.WINDOWS})), Counting(cache)
    backend = FeatureFallback(partial, reference)
    mask_S = torch.tensor([False, True, True]) if is_padded else None
    batch = PackedBatch((PackedSequence((1,), 0, 0, 3, mask_S),), torch.arange(3) + PAGE_TOKENS)
    query, key, value = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    metadata = backend.metadata(batch)
    backend.attend(metadata, 0, query, key, value, options)
    assert (partial.num_calls, reference.num_calls) == ((1, 0) if partial_computes else (0, 1))


# -- FlashAttention --------------------------------------------------------------------------------------------------


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """What PyTorch's documentation says of its function of this name, sequence by sequence."""
    assert enable_gqa or query.shape[1] == key.shape[-2]
    outputs = []
    for index, (start, end) in enumerate(zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)):
        if block_table is None:
            assert cu_seq_k is not None
            of_sequence = slice(*cu_seq_k[index : index + 2].tolist())
            keys, values = key[of_sequence], value[of_sequence]
        else:
            assert seqused_k is not None
            assert block_table.dtype == torch.int32
            length = int(seqused_k[index])
            keys, values = (each[block_table[index].long()].flatten(0, 1)[:length] for each in (key, value))
        assert end - start <= max_q
        assert len(keys) <= max_k
        queries_T1 = torch.arange(end - start)[:, None] + len(keys) - (end - start)
        keys_S = torch.arange(len(keys))
        visible_TS = keys_S <= queries_T1 + window_size[1]
        if window_size[0] >= 0:
            visible_TS &= keys_S >= queries_T1 - window_size[0]
        repeats = query.shape[1] // keys.shape[1]
        keys, values = (each.repeat_interleave(repeats, dim=1).transpose(0, 1).float() for each in (keys, values))
        scores = query[start:end].transpose(0, 1).float() @ keys.transpose(1, 2) * scale
        weights = scores.masked_fill(~visible_TS, float("-inf")).softmax(dim=-1)
        outputs.append((weights @ values).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


@pytest.mark.parametrize("reads_pages", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_gives_the_numbers_of_the_reference(dtype: torch.dtype, reads_pages: bool):
    body = body_in(dtype)
    check(lambda cache: VarlenAttention(cache, varlen_attn, reads_pages=reads_pages), body, cache_of(body), num_heads=4)


def test_a_kernel_that_need_not_be_asked_for_shared_heads_is_not_asked():
    def older(*tensors: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
        return varlen_attn(*tensors, scale=scale, window_size=window_size, enable_gqa=True)

    body = body_in(torch.bfloat16)
    check(lambda cache: VarlenAttention(cache, older), body, cache_of(body), num_heads=4)


def test_flash_attention_says_what_it_cannot_compute_at_all():
    with pytest.raises(UnsupportedOperation, match="does not compute in float32"):
        VarlenAttention(cache_of(body_in(torch.float32)), varlen_attn)
    with pytest.raises(UnsupportedOperation, match="different sizes"):
        VarlenAttention(cache_of(body_in(torch.bfloat16), value_size=8), varlen_attn)
    with pytest.raises(UnsupportedOperation, match="int8"):
        VarlenAttention(cache_of(body_in(torch.bfloat16), kind=Int8Pages), varlen_attn)
