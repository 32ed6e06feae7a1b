"""What the examples share: their options, the model, and the loss and accuracy of answers.

They need a swarm that serves the bundled model. One server on this machine is enough. Start it in a clone,
after `source .venv/bin/activate` and `pip install -e '.[examples]'`; it prints the ADDRESS:

    shoal serve src/shoal/bundled/stories --new-swarm --dtype float32
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES


def options(description: str | None, *, steps: int, lr: float) -> ArgumentParser:
    """A parser with the options of all examples."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--initial-peers", nargs="*", help="peers of the swarm; default: $SHOAL_INITIAL_PEERS")
    parser.add_argument("--model", default=str(STORIES), help="the model of the swarm")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="the folder for results")
    parser.add_argument("--steps", type=int, default=steps, help="number of training steps")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def load(chosen: Namespace) -> tuple[Any, Any]:
    """The tokenizer, and the model, whose blocks are in the swarm."""
    model = AutoDistributedModelForCausalLM.from_pretrained(
        chosen.model, initial_peers=chosen.initial_peers, dtype="float32"
    )
    return AutoTokenizer.from_pretrained(chosen.model), model


def answer_loss(model: Any, tokenizer: Any, tasks: Sequence[dict[str, str]]) -> torch.Tensor:
    """The mean loss of a token of the completions, after their prompts."""
    answers = [task["completion"] + tokenizer.eos_token for task in tasks]
    texts = [task["prompt"] + answer for task, answer in zip(tasks, answers, strict=True)]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    labels = inputs.input_ids.clone()
    for row, answer in zip(labels, tokenizer(answers, add_special_tokens=False).input_ids, strict=True):
        row[: -len(answer)] = -100
    return model(**inputs, labels=labels).loss


@torch.no_grad()
def exact_answers(model: Any, tokenizer: Any, tasks: Sequence[dict[str, str]]) -> float:
    """The fraction of prompts that greedy decoding through the swarm continues with exactly their completion."""
    prompts = tokenizer([task["prompt"] for task in tasks], padding=True, padding_side="left", return_tensors="pt")
    ids = model.eval().generate(**prompts, max_new_tokens=8, do_sample=False)[:, prompts.input_ids.shape[1] :]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(answer == task["completion"] for answer, task in zip(answers, tasks, strict=True)) / len(tasks)
