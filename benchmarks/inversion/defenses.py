"""What a client might do against servers that read along, and what each of these costs."""

# N texts, T tokens of each, V vocabulary, D hidden size

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.inversion.attack import Change
from shoal.model.families import find_backbone

RIDGE = 1e-3
LEARNING_RATE = 2e-3
ROWS_OF_A_STEP = 8
PASS_ROWS = 8
INIT_DEVIATION = 0.02


@dataclass(frozen=True)
class Noise:
    """Gaussian noise that a client adds to hidden states. `strength` is its size relative to each vector's own."""

    strength: float
    random: torch.Generator

    def __call__(self, hidden_NTD: Tensor) -> Tensor:
        """The hidden states with noise."""
        size = hidden_NTD.square().mean(-1, keepdim=True).sqrt()
        drawn = torch.randn(hidden_NTD.shape, generator=self.random)
        return hidden_NTD + self.strength * size * drawn


@dataclass(frozen=True)
class Cost:
    """What a change of hidden states does to a model's text.

    `perplexity` of the text, the part of positions with another likeliest next token than the unchanged model, and the
    mean divergence (KL, nats) of the next token's distribution from that of the unchanged model.
    """

    perplexity: float
    changed: float
    divergence: float


def layers_of(model: Any) -> nn.ModuleList:
    _, backbone, name = find_backbone(model, model.config)
    found: nn.ModuleList = backbone.get_submodule(name)
    return found


@contextlib.contextmanager
def changed_at(layer: nn.Module, change: Change | None) -> Iterator[None]:
    """While it lasts, the layer gets changed hidden states; with `None`, those that it gets anyway."""
    if change is None:
        yield
        return
    hook = layer.register_forward_pre_hook(lambda _, arguments: (change(arguments[0]), *arguments[1:]))
    try:
        yield
    finally:
        hook.remove()


@torch.inference_mode()
def cost_of(model: Any, public: Any, texts_NT: Tensor, *, depth: int = 0, change: Change | None = None) -> Cost:
    """What it costs that `model`, with its inputs of block `depth` changed, computes the text instead of `public`."""
    totals = torch.zeros(3, dtype=torch.float64)
    num = 0
    for ids in texts_NT.split(PASS_ROWS):
        expected = public(ids).logits[:, :-1].float().log_softmax(-1)
        with changed_at(layers_of(model)[depth], change):
            found = model(ids).logits[:, :-1].float().log_softmax(-1)
        losses = -found.gather(-1, ids[:, 1:, None])
        divergences = (expected.exp() * (expected - found)).sum(-1)
        changed = found.argmax(-1) != expected.argmax(-1)
        totals += torch.tensor([float(losses.sum()), float(changed.sum()), float(divergences.sum())])
        num += losses.numel()
    loss, changed_part, divergence = (totals / num).tolist()
    return Cost(math.exp(loss), changed_part, divergence)


@torch.inference_mode()
def written_by(model: Any, num_texts: int, num_tokens: int, *, seed: int) -> Iterator[Tensor]:
    """Texts [N, T] that a model writes at temperature 1, in parts, without a prompt."""
    torch.manual_seed(seed)
    first = model.config.bos_token_id
    for _ in range(num_texts // 32):
        yield model.generate(
            torch.full((32, 1), first),
            attention_mask=torch.ones(32, 1, dtype=torch.long),
            do_sample=True,
            top_k=0,
            min_new_tokens=num_tokens - 1,
            max_new_tokens=num_tokens - 1,
            pad_token_id=first,
        )


def secret_copy(
    public: Any,
    texts_NT: Tensor,
    *,
    num_blocks: int,
    from_random: bool,
    with_embeddings: bool,
    num_steps: int,
    tell: Callable[[str], None],
) -> Any:
    """A model whose first blocks are only the client's: trained on text until they work with the public ones behind.

    All other weights stay the public ones. Blocks, and embeddings if they are secret too, begin as they are or, with
    `from_random`, as before any training.
    """
    torch.manual_seed(0)
    model = copy.deepcopy(public)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # the head stays, if it was tied
    own = [*layers_of(model)[:num_blocks].parameters()]
    if with_embeddings:
        own.append(model.get_input_embeddings().weight)
    model.requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_(True)
        if from_random and parameter.dim() > 1:
            deviation = float(parameter.std()) if parameter is own[-1] and with_embeddings else INIT_DEVIATION
            nn.init.normal_(parameter.data, std=deviation)
        elif from_random:
            nn.init.ones_(parameter.data)
    optimizer = torch.optim.AdamW(own, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
    for step in range(num_steps):
        ids = texts_NT[torch.randint(len(texts_NT), (ROWS_OF_A_STEP,))]
        logits = model(ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == num_steps - 1:
            tell(f"step {step + 1} of {num_steps}, loss {float(loss):.3f}")
    return model.requires_grad_(False)


def learned_map(secret_MD: Tensor, public_MD: Tensor) -> Change:
    """A linear map, fitted to M known tokens, from what a secret model sends to what the public one would send."""
    ones = torch.ones(len(secret_MD), 1)
    inputs = torch.cat((secret_MD, ones), dim=1).double()
    scale = RIDGE * inputs.square().mean() * len(inputs)
    gram = inputs.T @ inputs + scale * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(gram, inputs.T @ public_MD.double()).float()
    return lambda received_TD: torch.cat((received_TD, torch.ones(len(received_TD), 1)), dim=1) @ weights
