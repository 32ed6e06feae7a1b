"""An answer that a lying server had a part in says how many of its tokens may be wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from shoal.bundled import STORIES
from shoal.gateway.app import Gateway, application
from shoal.gateway.guard.admission import Admission
from shoal.gateway.served_model import ServedModel

from ..gateways import served_at
from ..harness import QUICK, swarm_of
from ..lies import Liars, shifted
from .asked import PROMPT


@pytest.mark.parametrize("lies", [True, False])
def test_usage_counts_the_tokens_that_may_be_wrong(tokenizer: Any, tmp_path: Path, lies: bool):
    config = replace(QUICK, audits="high", evidence_folder=tmp_path)
    # Each of the first two audits the other, and no third can say which of them is right.
    with swarm_of(STORIES, "0:6", "0:6", "6:12") as swarm:
        if lies:
            Liars(swarm.network).add("s0", shifted)
        served = ServedModel("stories", swarm.model(config=config), tokenizer)
        with served_at(application(Gateway([served], Admission()))) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            assert (doubtful_tokens(client) > 0) == lies


def doubtful_tokens(client: openai.OpenAI) -> int:
    """How many tokens of an answer may be wrong. On a busy machine, an audit may end after the answer: ask again."""
    for _ in range(4):
        answer = client.completions.create(model="stories", prompt=PROMPT, max_tokens=60, temperature=0)
        assert answer.usage is not None
        details = answer.usage.completion_tokens_details
        if details is not None and (found := details.model_dump().get("doubtful_tokens")):
            return int(found)
    return 0
