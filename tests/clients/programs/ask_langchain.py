"""langchain-openai: a chat, the same as a stream and as one of several at once, and objects of a class, in two ways."""

import json
import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel

what = json.loads(sys.argv[1])
model = ChatOpenAI(
    model="smollm2",
    base_url=what["url"],
    api_key=what["key"],
    temperature=0,
    max_tokens=what["num_tokens"],
    stream_usage=True,
    max_retries=0,
)


class City(BaseModel):
    """A city."""

    name: Literal[tuple(what["names"])]
    is_large: bool


whole = model.invoke(what["messages"])
chunks = list(model.stream(what["messages"]))
objects = [
    model.with_structured_output(City, method=method).invoke(what["messages"])
    for method in ("json_schema", "function_calling")
]
print(
    json.dumps(
        {
            "whole": whole.content,
            "finish_reason": whole.response_metadata["finish_reason"],
            "num_tokens": whole.usage_metadata["output_tokens"],
            "stream": "".join(chunk.content for chunk in chunks),
            "num_streamed_tokens": sum(
                chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata
            ),
            "batch": [answer.content for answer in model.batch([what["messages"], what["prompt"]])],
            "objects": [each.model_dump(mode="json") if isinstance(each, City) else None for each in objects],
        }
    )
)
