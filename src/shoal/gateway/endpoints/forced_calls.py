"""`tool_choice`: a model that has to call tools writes the calls as JSON, and can write nothing else.

So every model with a chat template can be made to call tools, also one whose calls could not be recognized in free
text. vLLM does the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from shoal.gateway.bodies import ChatRequest, NamedTool
from shoal.gateway.endpoints.turns import Said
from shoal.gateway.error_objects import bad_field

ANYTHING: dict[str, Any] = {"type": "object"}
"""The arguments of a function that says nothing about them."""


@dataclass
class ForcedCalls:
    """The turn of a model that has to call the function `name`, or with `None` one of them or several.

    Its text keeps to `schema`: the arguments of the named function, or a list of calls.
    """

    name: str | None
    schema: dict[str, Any]
    is_marked = False
    """Whether the text must have its special tokens."""
    _text: str = ""
    has_calls: bool = False
    """Whether the answer ends because tools were called. OpenAI says so only where the model could choose."""

    @classmethod
    def of(cls, request: ChatRequest) -> ForcedCalls | None:
        """What a request forces; `None` if the model may answer as it likes. Raises `Refused`."""
        choice, functions = request.tool_choice, [tool.function for tool in request.tools or ()]
        if choice in (None, "auto", "none"):
            return None
        if not functions:
            raise bad_field("tool_choice", "there are no tools to choose from")
        if isinstance(choice, NamedTool):
            name = choice.function.name
            found = [each for each in functions if each.name == name]
            if not found:
                raise bad_field("tool_choice", f"there is no tool {name}")
            return cls(name, found[0].parameters or ANYTHING)
        definitions: dict[str, Any] = {}
        calls = []
        for each in functions:
            parameters = dict(each.parameters or ANYTHING)
            for place in ("$defs", "definitions"):  # references count from the root of a schema
                for key, schema in parameters.pop(place, {}).items():
                    if definitions.setdefault(place, {}).setdefault(key, schema) != schema:
                        raise bad_field("tools", f"two tools define {key} differently, which is not supported")
            properties = {"name": {"const": each.name}, "parameters": parameters}
            calls.append(
                {
                    "type": "object",
                    "properties": properties,
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
            )
        several = {} if request.parallel_tool_calls is not False else {"maxItems": 1}
        return cls(None, {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **several, **definitions})

    def after_text(self, text: str, *, ends: bool) -> Said:
        """The calls, once the text has ended. A text that was cut calls nothing."""
        self._text += text
        if not ends:
            return Said()
        try:
            written = json.loads(self._text)
        except ValueError:
            return Said()
        if self.name is not None:
            return Said(calls=(_call(0, self.name, self._text),))
        self.has_calls = True
        return Said(
            calls=tuple(
                _call(index, each["name"], json.dumps(each["parameters"], ensure_ascii=False))
                for index, each in enumerate(written)
            )
        )


def _call(index: int, name: str, arguments: str) -> dict[str, Any]:
    return {
        "index": index,
        "id": f"call_{uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
