"""langchain-openai: a chat, alone, as a stream and as one of two; objects of a class, in two ways; an embedding."""

import json
import sys
from typing import Literal

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

what = json.loads(sys.argv[1])
server = {"model": "smollm2", "base_url": what["url"], "api_key": what["key"], "max_retries": 0}
model = ChatOpenAI(temperature=0, max_tokens=what["num_tokens"], stream_usage=True, **server)
embeddings = OpenAIEmbeddings(check_embedding_ctx_length=False, **server)


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
            "embedding": embeddings.embed_query(what["prompt"]),
        }
    )
)
