"""The making of the bundled draft: two blocks that learn to foresee the bundled model.

    PYTHONPATH=scripts python -m stories.distill

The draft begins with the model's embeddings, its first block and its last one. On stories of the grammar it learns the
model's probabilities of each next token (Hinton et al., 2015, "Distilling the Knowledge in a Neural Network"). The
model reads each story once, and the draft several times: it says more of a story than which word comes next, and its
twelve blocks take longer to run than two take to train.
"""

# B rows of a batch, T positions of a row, V tokens of the vocabulary

import copy
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from stories.grammar import write_story
from stories.training import HELD_OUT_SEED

BUNDLED = Path(__file__).resolve().parents[2] / "src/shoal/bundled"
NUM_PROMPT = 12
"""How many tokens of a story the model is given to measure the draft: the hero, and little more."""
MOST_WRITTEN = 300
"""How many tokens it then writes at the most: it ends most stories before."""


@dataclass(frozen=True, kw_only=True)
class DraftRecipe:
    """The parameters of the distillation. They determine the draft."""

    seed: int = 0
    blocks: tuple[int, ...] = (0, 11)
    """The model's blocks with which the draft begins."""
    num_batches: int = 60
    num_rounds: int = 4
    """How often the draft reads each batch."""
    num_rows: int = 12
    row_length: int = 320
    long_every: int = 8  # of these batches, one has few long rows, for texts of several stories
    long_length: int = 1280
    peak_lr: float = 2e-3
    final_lr: float = 5e-5
    num_warmup_steps: int = 20
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0

    @property
    def num_steps(self) -> int:
        """All steps of the training."""
        return self.num_batches * self.num_rounds

    def lr(self, step: int) -> float:
        """A linear warm-up, then a cosine from the peak to the final rate."""
        if step < self.num_warmup_steps:
            return self.peak_lr * (step + 1) / self.num_warmup_steps
        progress = (step - self.num_warmup_steps) / (self.num_steps - self.num_warmup_steps)
        return self.final_lr + (self.peak_lr - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def build_draft(recipe: DraftRecipe, model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of a few blocks, with the embeddings, the norm and these blocks of `model`."""
    torch.manual_seed(recipe.seed)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(recipe.blocks)
    draft = LlamaForCausalLM(config).float()
    draft.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(model.model.norm.state_dict())
    for own, index in zip(draft.model.layers, recipe.blocks, strict=True):
        own.load_state_dict(model.model.layers[index].state_dict())
    return draft


def batches(
    recipe: DraftRecipe, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One batch a step: tokens [B, T], and the model's logits of the token behind each [B, T, V]."""
    rng = Random(recipe.seed + 1)
    read = []
    for index in range(recipe.num_batches):
        is_long = index % recipe.long_every == recipe.long_every - 1
        length = recipe.long_length if is_long else recipe.row_length
        ids_BT = told(rng, tokenizer, recipe.num_rows * recipe.row_length // length, length)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits.bfloat16()
        read.append((ids_BT, logits_BTV))
        yield read[-1]
    for _ in range(recipe.num_rounds - 1):
        yield from rng.sample(read, len(read))


def told(rng: Random, tokenizer: PreTrainedTokenizerFast, num_rows: int, length: int) -> torch.Tensor:
    """Fresh stories of the grammar, [B, T]. Each row starts with the start of one."""
    rows = []
    for _ in range(num_rows):
        ids: list[int] = []
        while len(ids) < length:
            ids += [*tokenizer.encode(write_story(rng)), tokenizer.eos_token_id]
        rows.append(ids[:length])
    return torch.tensor(rows)


def distill(
    draft: LlamaForCausalLM, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: DraftRecipe
) -> Iterator[float]:
    """Trains the draft; yields the mean divergence of each step from the model's probabilities, in nats per token."""
    optimizer = torch.optim.AdamW(draft.parameters(), weight_decay=recipe.weight_decay, betas=(0.9, 0.95), fused=True)
    draft.train()
    for step, (ids_BT, logits_BTV) in enumerate(batches(recipe, model, tokenizer)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr(step)
        with torch.autocast("cpu", torch.bfloat16):
            own_BTV = draft(input_ids=ids_BT, use_cache=False).logits
        wanted, own = (F.log_softmax(each.float(), dim=-1).flatten(0, 1) for each in (logits_BTV, own_BTV))
        loss = F.kl_div(own, wanted, log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@torch.no_grad()
def acceptance(draft: LlamaForCausalLM, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num: int) -> float:
    """The part of the tokens that the draft guesses right, of what the model writes greedily.

    It begins with the first `NUM_PROMPT` tokens of this many stories that the draft has not met.
    """
    rng = Random(HELD_OUT_SEED)
    prompts_BT = torch.tensor([tokenizer.encode(write_story(rng))[:NUM_PROMPT] for _ in range(num)])
    ids_BT = model.generate(prompts_BT, do_sample=False, max_new_tokens=MOST_WRITTEN)
    guesses_BT = draft(input_ids=ids_BT).logits[:, NUM_PROMPT - 1 : -1].argmax(-1)
    written_BT = ids_BT[:, NUM_PROMPT:]
    is_text_BT = written_BT != tokenizer.pad_token_id
    return float((guesses_BT == written_BT)[is_text_BT].float().mean())


def main(
    model_folder: Annotated[Path, typer.Option(help="The folder of the model.")] = BUNDLED / "stories",
    draft_folder: Annotated[Path, typer.Option(help="The folder for the draft.")] = BUNDLED / "stories_draft",
) -> None:
    """Distil the bundled draft, and print how often it is right on texts that it has not met."""
    torch.set_num_threads(1)
    recipe = DraftRecipe()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    draft = build_draft(recipe, model)
    started, recent = time.process_time(), []
    for step, loss in enumerate(distill(draft, model, tokenizer, recipe), start=1):
        recent.append(loss)
        if step % 20 == 0:
            print(f"step {step:4}  divergence {sum(recent) / len(recent):.4f}", flush=True)
            recent.clear()
    print(f"{time.process_time() - started:.0f} seconds of one core", flush=True)
    draft.to(torch.bfloat16).save_pretrained(draft_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, draft_folder)
    draft = AutoModelForCausalLM.from_pretrained(draft_folder, dtype=torch.float32)
    print(f"parameters     {draft.num_parameters():,}")
    print(f"right guesses  {acceptance(draft, model, tokenizer, 20):.3f}  (of greedy text that it has not met)")


if __name__ == "__main__":
    typer.run(main)
