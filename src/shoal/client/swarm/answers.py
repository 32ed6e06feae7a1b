"""The tensors of requests and answers: how they are named, checked, rounded and joined."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.net.wire.encodings import as_received
from shoal.tensors import Encoding, TensorName

OTHER_THAN_ASKED = "something else than was asked"


def named_tensors(
    hidden_BTD: torch.Tensor, positions_BT: torch.Tensor | None, mask_BT: torch.Tensor | None
) -> dict[TensorName, torch.Tensor]:
    """The tensors of a request, without those that are absent."""
    tensors: dict[TensorName, torch.Tensor] = {"hidden": hidden_BTD}
    if positions_BT is not None:
        tensors["positions"] = positions_BT
    if mask_BT is not None:
        tensors["mask"] = mask_BT
    return tensors


def wrong_with(
    answer: torch.Tensor | None, encoding: Encoding, *, shape: torch.Size, dtype: torch.dtype, allowed: Encoding
) -> str | None:
    """What is wrong with hidden states or gradients that a server answers, as an error says it; None if nothing is.

    They must have this shape and dtype, and travel raw or in the `allowed` encoding.
    """
    if answer is None or answer.shape != shape or answer.dtype != dtype:
        return OTHER_THAN_ASKED
    return None if encoding in ("raw", allowed) else f"in {encoding}, which was not asked for"


def rounded_like(answer: torch.Tensor, encoding: Encoding, *, wire: Encoding) -> torch.Tensor:
    """An answer as it is after traveling in the encoding `wire`.

    A server that does not know `wire` answers in another `encoding`. Which server it was must make no difference.
    """
    return answer if encoding == wire else as_received(answer, wire)


def plausible(result_BTD: torch.Tensor, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> bool:
    """Whether the outputs are finite where the inputs are. Outputs of padding may be anything."""
    if finite(result_BTD) or not finite(hidden_BTD):
        return True
    if mask_BT is None:
        return False
    if mask_BT.shape[1] < result_BTD.shape[1]:  # the mask of these tokens is gone
        return True
    return bool(torch.isfinite(result_BTD[mask_BT[:, -result_BTD.shape[1] :].bool()]).all())


def finite(tensor: torch.Tensor) -> bool:
    """Whether it has no NaN and no infinity, in a few microseconds a token: this is the fastest way to know."""
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def joined(pieces: Sequence[torch.Tensor], *, dim: int = 0) -> torch.Tensor:
    """The pieces in a row; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), dim=dim)
