"""What adapters drop at random: the same for the same seed, in every kind of layer, and nothing without one."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from shoal.adapters import Lora
from shoal.model.body import Body
from shoal.model.families import text_config
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.model.peft.skeleton import num_features
from shoal.spans import Span

from .harness import Swarm
from .random_adapters import linears
from .visitors import tiny_body

PATH = "mlp.down_proj"
TOKENS = torch.arange(3, 35).view(4, 8)


@pytest.fixture(scope="module")
def body() -> Body:
    return tiny_body("llama")


def adapter(body: Body, *, dropout: float, dora: bool) -> BlockAdapter:
    layer = Lora(module=PATH, rank=3, scaling=2.0, dropout=dropout, dora=dora)
    shapes = layer.shapes(*num_features(linears(body.block(0))[PATH]))
    values = 0.5 * torch.randn(sum(math.prod(shape) for shape in shapes), generator=seeded(1))
    size = text_config(body.backbone.config).hidden_size
    return BlockAdapter(body.block(0), [layer], values, name="", hidden_size=size)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def computed(body: Body, own: BlockAdapter) -> torch.Tensor:
    hidden = torch.randn(2, 5, text_config(body.backbone.config).hidden_size, generator=seeded(2))
    with torch.no_grad():
        return body(hidden, span=Span(0, 1), overrides={0: own.on})


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_what_is_dropped_follows_from_the_seed_and_ends_with_it(body: Body, dora: bool):
    plain = computed(body, adapter(body, dropout=0.0, dora=dora))
    dropping = adapter(body, dropout=0.5, dora=dora)
    found = []
    for seed in (7, 7, 8):
        with dropping.seeded_dropout(seed):
            found.append(computed(body, dropping))
        torch.testing.assert_close(computed(body, dropping), plain)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[0], plain)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_dropout_is_applied_in_training_and_leaves_nothing_to_sessions(swarm, dora: bool):
    net: Swarm = swarm("0:2", "2:4")
    config = LoraConfig(r=4, lora_dropout=0.5, use_dora=dora, target_modules=[PATH], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(net.model(), config)
    expected = model.eval().generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False).tolist()
    with torch.no_grad():
        exact = model(input_ids=TOKENS, use_cache=False).logits
        losses = [model.train()(input_ids=TOKENS, use_cache=False).logits for _ in range(2)]
        assert not torch.allclose(losses[0], losses[1])
        torch.testing.assert_close(model.eval()(input_ids=TOKENS, use_cache=False).logits, exact)
    model.train()(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    assert model.train().generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False).tolist() == expected
