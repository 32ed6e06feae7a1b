"""How the numbers of a tensor become bytes: as they are, as bfloat16, or as int8 in blocks.

An encoding may lose precision, but only once: `as_received` is what the receiver decodes, and encoding that again
loses nothing. So a client that keeps what a server received can send the same values to any other server. Each row
of the last dimension is encoded separately, so a slice of a sequence is encoded as it is within the whole sequence.

int8 cuts the last dimension into blocks of 64 values x, each with a peak p in bfloat16 (arXiv 2312.08361, section 3.1,
uses such blocks too, with a table of values in place of even steps):

    p = bfloat16(max |x|)        q = round(127 x / p)        y = q p / 127

Encoding y gives q and p again, for this reason. Rounding to bfloat16 moves max |x| by at most p / 256. So the largest
value has 127 |x| / p within 127 ± 127/256, rounds to 127, and is decoded to p itself: the peak stays. Another y is
rounded to its dtype, which moves 127 y / p by at most 127/256 < 1/2, so it rounds to q again. (Where the smallest
numbers of float16 lie further apart than the steps, q may become another one that is decoded to the same y.)

A block with an infinity or a NaN becomes NaN throughout; a block whose values are all below `MIN_PEAK` becomes zeros.
"""

# D values of a row, K blocks of a row, M blocks in all, V values of a block

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from shoal.tensors import INT8_BLOCK, Encoding

STEPS = 127
"""The steps of int8 between 0 and the peak."""
MIN_PEAK = 2.0**-110
"""The smallest peak: below it, steps would be subnormal numbers, which some processors flush to zero."""
SERIAL_VALUES = 16384
"""The values that are converted at once: few enough to stay in a core's cache, and for torch to use one thread. Other
threads may be busy computing, and waiting for them takes longer than the conversion."""
_ROUND = 1.5 * 2**23
"""Adding and subtracting it rounds a small float32 to an integer. torch's own `round` uses several threads."""
_LARGEST = {
    torch.float32: torch.finfo(torch.bfloat16).max,
    torch.bfloat16: torch.finfo(torch.bfloat16).max,
    torch.float16: 65280.0,
}
"""The largest peak for values of each dtype: the largest bfloat16 that the dtype can hold."""


def as_received(tensor: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """The values that a receiver decodes; the tensor itself if the encoding loses nothing of its dtype."""
    if encoding == "int8" and tensor.dtype in _LARGEST:
        return from_int8(*to_int8(tensor), tensor.dtype)
    if encoding == "bfloat16" and tensor.dtype == torch.float32:
        return converted(converted(tensor, torch.bfloat16), torch.float32)
    return tensor


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another dtype, computed by the calling thread alone."""
    values = tensor.detach().reshape(-1)
    result = torch.empty(values.shape, dtype=dtype)
    for piece in _pieces(len(values), SERIAL_VALUES):
        result[piece] = values[piece]
    return result.view(tensor.shape)


def to_int8(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps [..., D] of a tensor [..., D] in int8, and the peaks [..., K] of its blocks in bfloat16."""
    *rows, size = tensor.shape
    blocks_MV = _blocks(tensor.detach())
    steps_MV = torch.empty(blocks_MV.shape, dtype=torch.int8)
    peaks_M1 = torch.empty((len(blocks_MV), 1), dtype=torch.bfloat16)
    for piece in _pieces(len(blocks_MV), SERIAL_VALUES // INT8_BLOCK):
        _quantize(blocks_MV[piece], steps_MV[piece], peaks_M1[piece])
    return steps_MV.view(*rows, -1)[..., :size], peaks_M1.view(*rows, -1)


def _quantize(blocks_MV: torch.Tensor, steps_MV: torch.Tensor, peaks_M1: torch.Tensor) -> None:
    values_MV = blocks_MV.float()
    largest_M1 = values_MV.abs().amax(1, keepdim=True)
    # An infinity minus itself is NaN, and any other number minus itself is 0.
    peaks_M1.copy_(largest_M1.clamp(max=_LARGEST[blocks_MV.dtype]) + (largest_M1 - largest_M1))
    exact_M1 = peaks_M1.float()
    factors_M1 = STEPS / exact_M1
    usable_M1 = exact_M1 >= MIN_PEAK
    if not usable_M1.all():
        peaks_M1.masked_fill_(exact_M1 < MIN_PEAK, 0.0)
        factors_M1.masked_fill_(~usable_M1, 0.0)
        values_MV = values_MV.masked_fill(~usable_M1, 0.0)
    steps_MV.copy_((values_MV * factors_M1).add_(_ROUND).sub_(_ROUND))


def from_int8(steps: torch.Tensor, peaks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The reverse of `to_int8`: the values [..., D] of steps [..., D] and peaks [..., K], in `dtype`."""
    *rows, size = steps.shape
    steps_MV = _blocks(steps)
    # 127 steps are exactly the peak in float32, for all significands of bfloat16.
    one_step_M1 = peaks.reshape(-1, 1).float().div_(STEPS)
    values_MV = torch.empty(steps_MV.shape, dtype=dtype)
    for piece in _pieces(len(steps_MV), SERIAL_VALUES // INT8_BLOCK):
        values_MV[piece] = steps_MV[piece].float().mul_(one_step_M1[piece])
    return values_MV.view(*rows, -1)[..., :size].contiguous()


def _blocks(tensor: torch.Tensor) -> torch.Tensor:
    """The blocks [M, V] of all rows; the last block of a row is padded with zeros."""
    if missing := -tensor.shape[-1] % INT8_BLOCK:
        tensor = F.pad(tensor, (0, missing))
    return tensor.reshape(-1, INT8_BLOCK)


def _pieces(count: int, at_once: int) -> Iterator[slice]:
    return (slice(start, start + at_once) for start in range(0, count, at_once))
