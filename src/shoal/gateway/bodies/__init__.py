"""The bodies of requests, typed, with their limits. What is not here is refused.

The fields are OpenAI's and Anthropic's. `top_k`, `min_p` and `repetition_penalty` are in addition, as vLLM has them.
Fields that change nothing in an answer, such as `user`, are taken and ignored.
It imports pydantic, and nothing of shoal.
"""

from __future__ import annotations

from shoal.gateway.bodies.chat_body import ChatRequest, Message, NamedTool
from shoal.gateway.bodies.messages_body import MessagesRequest, PromptBody
from shoal.gateway.bodies.responses_body import FlatNamedTool, ResponsesRequest
from shoal.gateway.bodies.sampling_body import SamplingBody
from shoal.gateway.bodies.text_bodies import CompletionRequest, EmbeddingRequest

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "FlatNamedTool",
    "Message",
    "MessagesRequest",
    "NamedTool",
    "PromptBody",
    "ResponsesRequest",
    "SamplingBody",
]
