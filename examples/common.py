"""What the examples share: their options, the accuracy of answers, and a picture of the loss."""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES


def options(description: str | None, *, steps: int, lr: float) -> ArgumentParser:
    """Which swarm, for how long, and where the results go."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--initial-peers", nargs="*", help="addresses of the swarm; else those in $SHOAL_INITIAL_PEERS")
    parser.add_argument("--model", default=str(STORIES), help="what the swarm serves")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="where the results go")
    parser.add_argument("--steps", type=int, default=steps, help="of training")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def load(chosen: Namespace) -> tuple[Any, Any]:
    """The tokenizer, and the model whose blocks are in the swarm."""
    model = AutoDistributedModelForCausalLM.from_pretrained(
        chosen.model, initial_peers=chosen.initial_peers, dtype="float32"
    )
    return AutoTokenizer.from_pretrained(chosen.model), model


def answer_loss(model: Any, tokenizer: Any, tasks: Sequence[dict[str, str]]) -> torch.Tensor:
    """What the completions cost the model after their prompts, a token."""
    answers = [task["completion"] + tokenizer.eos_token for task in tasks]
    texts = [task["prompt"] + answer for task, answer in zip(tasks, answers, strict=True)]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    labels = inputs.input_ids.clone()
    for row, answer in zip(labels, tokenizer(answers, add_special_tokens=False).input_ids, strict=True):
        row[: -len(answer)] = -100
    return model(**inputs, labels=labels).loss


@torch.no_grad()
def exact_answers(model: Any, tokenizer: Any, tasks: Sequence[dict[str, str]]) -> float:
    """The share of the prompts that the model continues with their completion, as it generates through the swarm."""
    prompts = tokenizer([task["prompt"] for task in tasks], padding=True, padding_side="left", return_tensors="pt")
    ids = model.eval().generate(**prompts, max_new_tokens=8, do_sample=False)[:, prompts.input_ids.shape[1] :]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(answer == task["completion"] for answer, task in zip(answers, tasks, strict=True)) / len(tasks)


def plot(losses: dict[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw the losses of the steps, by the name of whose they are."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set(xlabel="step", ylabel="loss", title=title, ylim=(0, None))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
