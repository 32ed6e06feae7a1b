"""`POST /v1/embeddings`: the mean of a text's last hidden states, which is what a causal model has to offer."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import torch

from shoal.gateway.bodies import EmbeddingRequest
from shoal.gateway.endpoints.prompt_passes import mean_hidden_state
from shoal.gateway.replies import Asker, Usage
from shoal.gateway.served_model import ServedModel


async def embeddings(served: ServedModel, request: EmbeddingRequest, *, asker: Asker) -> tuple[dict[str, Any], Usage]:
    """OpenAI's `CreateEmbeddingResponse`, and how many tokens were read."""
    texts = await asyncio.to_thread(lambda: [served.ids_of_prompt(text) for text in request.inputs])
    usage = Usage(sum(ids_1S.shape[1] for ids_1S in texts))
    for ids_1S in texts:
        served.most_new_tokens(ids_1S.shape[1], 0, param="input")
    data = []
    for index, ids_1S in enumerate(texts):
        async with asker.text():
            mean_D = await mean_hidden_state(served, ids_1S)
        data.append({"object": "embedding", "index": index, "embedding": _encoded(mean_D, request.encoding_format)})
    counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": counts}, usage


def _encoded(vector_D: torch.Tensor, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector_D.numpy().astype("<f4").tobytes()).decode()
    return vector_D.tolist()
