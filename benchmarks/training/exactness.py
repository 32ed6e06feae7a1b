"""The errors of gradients that a swarm computes: those of LoRA factors, soft prompts and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig

from benchmarks.common.swarm import servers
from benchmarks.common.tuning import Table, Tuner, client, local_model, log, relative_error, tokens_of
from shoal.bundled import STORIES

SPANS = ("0:6", "6:12")
LIMIT = 1e-5
PROMPT_TOKENS = 8
KINDS = ("LoRA factors", "soft prompt", "inputs")

Gradients = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """The dtype of both sides, and the options that only a swarm has: those of the servers, and the wire encoding."""

    name: str
    dtype: torch.dtype
    serving: tuple[str, ...]
    local: Mapping[str, Any] = field(default_factory=dict)
    wire: str = "raw"
    limit: float | None = None


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


FLOAT32, BFLOAT16 = ("--dtype", "float32"), ("--dtype", "bfloat16")
CASES = (
    Case("float32", torch.float32, FLOAT32, limit=LIMIT),
    Case("float32, int8 on the wire", torch.float32, FLOAT32, wire="int8"),
    Case("float32, NF4 weights", torch.float32, (*FLOAT32, "--quantization", "nf4"), {"quantization_config": nf4()}),
    Case("bfloat16", torch.bfloat16, BFLOAT16),
    Case("bfloat16, int8 on the wire", torch.bfloat16, BFLOAT16, wire="int8"),
)


def gradients(new_model: Any) -> Gradients:
    """The gradients of one pass for each kind. PEFT changes the model, so each kind has its own."""
    return {**_of_factors_and_inputs(new_model()), **_of_prompt(new_model())}


def _of_factors_and_inputs(model: Any) -> Gradients:
    tuner = Tuner(model)
    chance = torch.Generator().manual_seed(1)
    for name, parameter in tuner.parameters.items():
        if "lora_B" in name:  # they begin as zeros, which would give the A factors no gradient
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=chance))
    tokens = tokens_of(model, 8, seed=0)
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    tuner.model(inputs_embeds=inputs, labels=tokens, use_cache=False).loss.backward()
    factors = torch.cat([each.grad.flatten() for each in tuner.parameters.values()])
    return {"LoRA factors": factors, "inputs": inputs.grad}


def _of_prompt(model: Any) -> Gradients:
    torch.manual_seed(0)
    tokens = tokens_of(model, 8, seed=0)
    tuned = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=PROMPT_TOKENS, task_type="CAUSAL_LM"))
    tuned(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    (prompt,) = (each for each in tuned.parameters() if each.requires_grad)
    return {"soft prompt": prompt.grad}


def errors(found: Gradients, expected: Gradients) -> list[float]:
    return [relative_error(found[kind], expected[kind]) for kind in KINDS]


def in_swarm(case: Case) -> Gradients:
    with servers(STORIES, SPANS, *case.serving) as address:
        models: list[Any] = []

        def new_model() -> Any:
            models.append(client(STORIES, address, case.dtype, wire=case.wire))
            return models[-1]

        try:
            return gradients(new_model)
        finally:
            for model in models:
                model.close()


def exactness() -> Table:
    rows = []
    exact = gradients(lambda: local_model(STORIES, torch.float32))
    for case in CASES:
        local = gradients(lambda case=case: local_model(STORIES, case.dtype, **case.local))
        found = errors(in_swarm(case), local)
        goal = None if case.limit is None else f"≤ {case.limit:g}"
        rows.append((case.name, *found, goal, None if case.limit is None else max(found) <= case.limit))
        log(f"exactness, {case.name}: {found}")
        if case.dtype != torch.float32 and case.wire == "raw":
            rows.append((f"(PEFT alone: {case.name} vs. float32)", *errors(local, exact), None, None))
    return Table(
        "Relative error of gradients, compared with PEFT on one machine", ("both in", *KINDS, "goal"), tuple(rows)
    )
