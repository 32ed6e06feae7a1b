"""`generate()` with guesses: each sequence of the batch is a stream of its own, and all are computed together."""

# B sequences, S tokens of what was passed, N new tokens

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.client.generation.token_stream import TokenStream
from shoal.errors import UserError


def whole_texts(
    stream: Callable[..., TokenStream], ids_BS: Tensor | None, *, pad_token_id: int, options: Mapping[str, Any]
) -> Tensor:
    """What was passed, and what follows, [B, S + N]. Texts that end early are filled up with `pad_token_id`.

    `stream` is the model's. Without `ids_BS` its session goes on, and only what follows is returned. Where texts are
    sampled, each has a seed that PyTorch's own random numbers give. Raises what `stream` and its iteration raise.
    """
    options = dict(options)
    mask_BS, streamer = options.pop("attention_mask", None), options.pop("streamer", None)
    if streamer is not None and ids_BS is not None and len(ids_BS) != 1:
        raise UserError("a streamer shows one text", hint="pass one text, or leave the streamer out")
    rows: list[Tensor | None] = [None]
    if ids_BS is not None:
        mask_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS
        rows = [row_S[mask_S.bool()][None] for row_S, mask_S in zip(ids_BS, mask_BS, strict=True)]
    seeds = torch.randint(2**62, (len(rows),)).tolist()
    streams = [stream(row, seed=seed, **options) for row, seed in zip(rows, seeds, strict=True)]
    if streamer is not None and ids_BS is not None:
        streamer.put(ids_BS.cpu())
    new: list[list[int]] = []
    try:
        for each in streams:
            new.append([])
            for token in each:
                new[-1].append(token.id)
                if streamer is not None:
                    streamer.put(torch.tensor([token.id]))
    finally:
        for each in streams:
            each.close()
    if streamer is not None:
        streamer.end()
    longest = max(map(len, new))
    new_BN = torch.tensor([[*each, *[pad_token_id] * (longest - len(each))] for each in new])
    return new_BN if ids_BS is None else torch.cat((ids_BS, new_BN.to(ids_BS.device)), dim=1)
