"""Packed linear layers compute what ordinary ones compute. Without the kernels these tests pass trivially."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from shoal.model.body import Body, build_body
from shoal.model.families import CERTIFIED, family_of, find_backbone
from shoal.model.linear import packed_linear as linear
from shoal.model.linear.packed_linear import (
    MIN_FREE_COPIES,
    LinearWithPackedCopy,
    PackedLinear,
    can_pack,
    enable_packed_copy,
    pack_linears,
)
from shoal.spans import Span

from ..swarm.tiny_models import tiny_config

IN, OUT = 512, 384


def make_linear(*, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)


def packed(module: nn.Linear) -> nn.Module:
    around = nn.Sequential(module)
    pack_linears(around)
    return around[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "make_input",
    [
        pytest.param(lambda: torch.randn(IN), id="a vector"),
        pytest.param(lambda: torch.randn(0, IN), id="no rows"),
        pytest.param(lambda: torch.randn(1, 1, IN), id="one token"),
        pytest.param(lambda: torch.randn(2, 3, 5, IN), id="four dimensions"),
        pytest.param(lambda: torch.randn(IN, 7).t(), id="transposed"),
        pytest.param(lambda: torch.randn(4, 6, IN)[:, ::2], id="every other token"),
        pytest.param(lambda: torch.randn(3, 2 * IN)[:, ::2], id="every other number"),
        pytest.param(lambda: torch.randn(1, 1, IN).expand(2, 3, IN), id="expanded"),
    ],
)
def test_a_packed_product_is_as_accurate_as_an_ordinary_one(make_input: Callable[[], Tensor], bias: bool) -> None:
    plain = make_linear(bias=bias)
    x = make_input().bfloat16()
    exact = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    expected = plain(x)
    actual = packed(plain)(x)
    assert actual.shape == expected.shape
    assert actual.dtype == torch.bfloat16
    error, usual = ((each.double() - exact).abs().sum() for each in (actual, expected))
    assert error <= usual * 1.01


@pytest.mark.parametrize("shape", [(IN,), (1, 1, IN), (2, 33, IN)])
def test_the_gradient_of_the_input_is_that_of_an_ordinary_linear(shape: tuple[int, ...]) -> None:
    plain = make_linear()
    x = torch.randn(shape).bfloat16()
    towards = torch.randn(*shape[:-1], OUT).bfloat16()
    gradients = []
    for module in (plain, packed(plain)):
        each = x.clone().requires_grad_(True)
        module(each).backward(towards)
        gradients.append(each.grad)
    assert torch.equal(gradients[1], gradients[0])


def test_a_layer_that_is_packed_without_autograd_has_gradients() -> None:
    with torch.inference_mode():
        module = packed(make_linear())
        assert module(torch.ones(1, IN).bfloat16()).shape == (1, OUT)
    x = torch.ones(1, IN).bfloat16().requires_grad_(True)
    module(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_packed_layer_holds_its_weight_once_and_can_return_it() -> None:
    plain = make_linear()
    expected, original = plain.weight.clone(), weakref.ref(plain.weight)
    around = nn.Sequential(plain)
    del plain
    pack_linears(around)
    assert isinstance(around[0], PackedLinear) == can_pack()
    assert (original() is None) == can_pack()
    assert torch.equal(around[0].weight, expected)
    assert (around[0].in_features, around[0].out_features) == (IN, OUT)


def test_layers_that_gain_nothing_are_not_packed() -> None:
    class Special(nn.Linear):
        pass

    others = [
        make_linear(dtype=torch.float32),
        make_linear(dtype=torch.float16),
        Special(IN, OUT, dtype=torch.bfloat16),
        nn.Linear(8, 8, dtype=torch.bfloat16),
        nn.Linear(IN, OUT, dtype=torch.bfloat16, device="meta"),
    ]
    around = nn.Sequential(*others)
    pack_linears(around)
    assert list(around) == others


def test_without_the_kernels_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    can_pack.cache_clear()
    try:
        assert type(packed(make_linear())) is nn.Linear
    finally:
        can_pack.cache_clear()


def bodies(config: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Body, Body]:
    """The same blocks, as they are and packed."""
    whole = LlamaForCausalLM(config).state_dict()
    family = family_of(config)

    def build() -> Body:
        return build_body(family, config, Span(1, 3), whole, dtype=torch.bfloat16)

    with monkeypatch.context() as context:
        context.setattr(linear, "can_pack", lambda: False)
        plain = build()
    return plain, build()


def test_packed_blocks_compute_what_ordinary_blocks_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(num_hidden_layers=4, vocab_size=32, attention_bias=True, **sizes)
    plain, body = bodies(config, monkeypatch)
    assert sum(isinstance(module, PackedLinear) for module in body.modules()) == (14 if can_pack() else 0)
    hidden = torch.randn(2, 9, 256).bfloat16()
    with torch.inference_mode():
        cache, plain_cache = body.new_cache(), plain.new_cache()
        for part in (hidden[:, :5], hidden[:, 5:8], hidden[:, 8:]):
            torch.testing.assert_close(body(part, cache=cache), plain(part, cache=plain_cache), rtol=0.02, atol=0.02)
    gradients = []
    for each in (plain, body):
        x = hidden.clone().requires_grad_(True)
        each(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=0.02 * gradients[0].abs().max().item())


def test_no_certified_family_reads_a_packed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking it in every call would cost more than packing gains. Such layers belong in `LINEARS_READ_DIRECTLY`."""
    reads: list[str] = []
    unpack = PackedLinear.weight.fget

    def weight(module: PackedLinear) -> Tensor:
        reads.append(f"{model_type}: {inspect.stack()[1].frame.f_code.co_qualname}")
        return unpack(module)

    monkeypatch.setattr(linear, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(PackedLinear, "weight", property(weight))
    for model_type in sorted(CERTIFIED):
        config = tiny_config(model_type)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        _, backbone, layers_name = find_backbone(model, config)
        pack_linears(backbone.get_submodule(layers_name))
        with torch.inference_mode():
            model(torch.tensor([[5, 6, 7]]))
    assert reads == []


def with_packed_copy() -> nn.Linear:
    layer = make_linear().requires_grad_(True)
    enable_packed_copy(layer, free_bytes=1 << 40)
    assert isinstance(layer, LinearWithPackedCopy) == can_pack()
    return layer


def test_a_packed_copy_follows_its_weight_in_every_way_to_change_it() -> None:
    layer, x = with_packed_copy(), torch.randn(2, IN).bfloat16()

    def same() -> bool:
        with torch.no_grad():
            return torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=0.05)

    assert same()
    with torch.no_grad():
        layer.weight.mul_(3)
    assert same()
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    layer(x).square().sum().backward()
    optimizer.step()
    assert same()
    layer(x).sum()
    layer.weight.data.neg_()
    assert same()
    layer.load_state_dict(make_linear().state_dict())
    assert same()
    layer.bias = nn.Parameter(torch.ones(OUT, dtype=torch.bfloat16))
    assert same()
    layer.weight = nn.Parameter(torch.randn(OUT, IN, dtype=torch.bfloat16))
    assert same()


def test_a_layer_with_a_packed_copy_is_an_ordinary_linear_layer_otherwise() -> None:
    plain, layer, x = make_linear(), with_packed_copy(), torch.randn(2, IN).bfloat16()
    with torch.no_grad():
        layer(x)
        copied = copy.deepcopy(layer)
        assert torch.equal(copied(x), layer(x))
        wide = layer.float()
        torch.testing.assert_close(wide(x.float()), plain.float()(x.float()))
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert "_copy" not in layer.__getstate__()


def test_a_layer_gets_no_packed_copy_when_memory_is_short() -> None:
    layer = make_linear()
    enable_packed_copy(layer, free_bytes=layer.weight.nbytes * MIN_FREE_COPIES - 1)
    assert type(layer) is nn.Linear
