"""The training of the bundled model: a tokenizer and a small Llama, on stories that are generated during training.

No story is seen twice: each batch is written fresh, so the training loss is a loss on text that the model has not met,
and the held-out stories (of a seed of their own) only confirm it.
"""

# B rows of a batch, T positions of a row

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stories.grammar import NAMES, write_scene, write_story

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
NUM_TOKENIZER_STORIES = 20_000
HELD_OUT_SEED = 2**32  # far from all seeds of the training
NUM_HELD_OUT_STORIES = 200


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parameters of the training. They determine the model."""

    seed: int = 0
    num_steps: int = 800
    tokens_per_step: int = 4096
    scene_share: float = 0.1  # the first of the steps, which have scenes instead of stories
    short_share: float = 0.5  # the first of the steps, whose rows hold half a story
    long_share: float = 0.08  # the last of the steps, whose rows are as long as the model allows
    short_length: int = 128
    row_length: int = 256
    joined_share: float = 0.15  # stories that a blank line, not an end-of-text token, parts from the next
    peak_lr: float = 3e-3
    final_lr: float = 1e-4
    num_warmup_steps: int = 40
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    embedding_std: float = 0.1  # not Llama's 0.02: names stand in the same places, and must keep apart nonetheless
    vocab_size: int = 1024
    max_positions: int = 2048

    def lr(self, step: int) -> float:
        """A linear warm-up, then a cosine from the peak to the final rate."""
        if step < self.num_warmup_steps:
            return self.peak_lr * (step + 1) / self.num_warmup_steps
        progress = (step - self.num_warmup_steps) / (self.num_steps - self.num_warmup_steps)
        return self.final_lr + (self.peak_lr - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2

    def length(self, step: int) -> int:
        """Positions of a row: short ones first, as they are quick; the whole context last, for long generations."""
        if step < self.num_steps * self.short_share:
            return self.short_length
        return self.max_positions if step >= self.num_steps * (1 - self.long_share) else self.row_length


@dataclass(frozen=True)
class HeldOutLoss:
    """Losses in nats per token: of all tokens, of names that occurred before in the story, and of all other tokens."""

    mean: float
    repeated_names: float
    others: float


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: it encodes any text, and decoding restores all spaces."""
    rng = Random(recipe.seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((write_story(rng) for _ in range(NUM_TOKENIZER_STORIES)), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=recipe.max_positions,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Twelve blocks, so that there is something to split; thin ones, so that it fits into a package."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=recipe.embedding_std)
    return model


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """One batch [B, T + 1] a step. Each row starts with the start of a story, so that it has met whom it names."""
    rng = Random(recipe.seed + 1)
    blank_line = tokenizer.encode("\n\n", add_special_tokens=False)
    for step in range(recipe.num_steps):
        length = recipe.length(step)
        write = write_scene if step < recipe.num_steps * recipe.scene_share else write_story
        rows = []
        for _ in range(recipe.tokens_per_step // length):
            ids = [tokenizer.bos_token_id]
            while len(ids) <= length:
                ids += tokenizer.encode(write(rng), add_special_tokens=False)
                is_joined = rng.random() < recipe.joined_share
                ids += blank_line if is_joined else [tokenizer.eos_token_id, tokenizer.bos_token_id]
            rows.append(ids[: length + 1])
        yield torch.tensor(rows)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[float]:
    """Trains the model; yields the mean loss of each step, in nats per token."""
    embeddings = model.get_input_embeddings().weight
    decayed = [p for p in model.parameters() if p.dim() > 1 and p is not embeddings]
    kept = [embeddings, *(p for p in model.parameters() if p.dim() == 1)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    model.train()
    for step, batch in enumerate(batches(recipe, tokenizer)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr(step)
        # A step in float32 takes half as long again, and the weights themselves stay in float32 anyway.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_stories: int = NUM_HELD_OUT_STORIES
) -> HeldOutLoss:
    """The loss on held-out stories, each in a row of its own, with its end-of-text token."""
    rng = Random(HELD_OUT_SEED)
    model.eval()
    stories = [write_story(rng) + EOS for _ in range(num_stories)]
    name_ids = torch.tensor(tokenizer.convert_tokens_to_ids([f"\u0120{name}" for name in NAMES]))
    losses, repeated = [], []
    for first in range(0, num_stories, 20):
        encoded = tokenizer(stories[first : first + 20], return_tensors="pt", padding=True, padding_side="right")
        ids, targets = encoded.input_ids[:, :-1], encoded.input_ids[:, 1:]
        losses_BT = F.cross_entropy(model(**encoded).logits[:, :-1].transpose(1, 2), targets, reduction="none")
        is_told_BT = (targets[:, :, None] == ids[:, None, :]).tril().any(-1)
        is_real_BT = encoded.attention_mask[:, 1:] == 1
        losses.append(losses_BT[is_real_BT])
        repeated.append((is_told_BT & torch.isin(targets, name_ids))[is_real_BT])
    loss, is_repeated = torch.cat(losses), torch.cat(repeated)
    return HeldOutLoss(loss.mean().item(), loss[is_repeated].mean().item(), loss[~is_repeated].mean().item())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Save model and tokenizer for Transformers. Returns the saved model, with weights rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()  # the measurement of the held-out loss has turned it on
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
