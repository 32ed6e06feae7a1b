"""What the tests of the gateway ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROMPT = "Once upon a time"
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }} {% endfor %}"
MESSAGES: Any = [{"role": "system", "content": "Once upon"}, {"role": "user", "content": "a time"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 12},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
]

Expected = Callable[..., str]
"""What plain Transformers continues a prompt with: the prompt, the number of tokens, options of `generate()`."""
