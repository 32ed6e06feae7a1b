"""The work of clients with adapters. Results are compared with the same adapters on blocks in one piece."""

# B sequences, S all tokens, D hidden size, N factors

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from shoal.adapters import Lora
from shoal.client.decoding.session import Session
from shoal.client.training.pass_plan import PassPlan
from shoal.client.training.remote_passes import RemotePasses
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.model.peft.factors import ActiveAdapters
from shoal.model.peft.skeleton import num_features
from shoal.spans import Span

from ..parity import assert_equal
from ..random_adapters import factors_of, linears
from .bed import Client
from .oracle import NUM_BLOCKS, oracle, positions_of

WHOLE = Span(0, NUM_BLOCKS)
DROPOUT = 0.3
SEED = 7 << 20
IDS = torch.tensor([[0, 0, 5, 17, 42], [7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()


def version(number: int, *, dropout: float = 0.0) -> ActiveAdapters:
    """LoRA in all blocks but one. Each version has other numbers."""
    generator = torch.Generator().manual_seed(number)
    found = {}
    for block in (0, 1, 3):
        own = linears(oracle().body(WHOLE).block(block))
        paths = ("self_attn.v_proj", "mlp.down_proj")
        layers = tuple(Lora(module=path, rank=2, scaling=2.0, dropout=dropout) for path in paths)
        size = sum(2 * sum(num_features(own[path])) for path in paths)
        found[block] = factors_of(block, layers, 0.3 * torch.randn(size, generator=generator), origin=block)
    return ActiveAdapters(found)


@functools.cache
def adapters(number: int, dropout: float) -> Mapping[int, BlockAdapter]:
    """The same adapters, to compute with on one machine."""
    body, hidden_size = oracle().body(WHOLE), oracle().hidden_size
    return {
        block: BlockAdapter(body.block(block), each.layers, each.values, name=each.name, hidden_size=hidden_size)
        for block, each in version(number, dropout=dropout).blocks.items()
    }


def computed(hidden_BSD: Tensor, mask_BS: Tensor, own: Mapping[int, BlockAdapter], *, seed: int | None) -> Tensor:
    """The outputs of the blocks in one piece."""
    for block, adapter in ((block, own.get(block)) for block in WHOLE):
        drops = nullcontext() if adapter is None else adapter.seeded_dropout(None if seed is None else seed + block)
        with drops:
            hidden_BSD = oracle().body(WHOLE)(
                hidden_BSD,
                span=Span(block, block + 1),
                attention_mask=mask_BS,
                position_ids=positions_of(mask_BS),
                overrides=None if adapter is None else {block: adapter.on},
            )
    return hidden_BSD


async def tuning(client: Client) -> None:
    """Forward and backward passes with dropout in the adapters, and with other adapters each time."""
    async with RemotePasses(client.swarm) as passes:
        for number in range(2):
            await _tune(client, passes, number)


async def _tune(client: Client, passes: RemotePasses, number: int) -> None:
    client.enters("forward")
    inputs_BSD, positions_BS, seed = oracle().embed(IDS), positions_of(MASK), SEED + (number << 10)
    plan = PassPlan(client.span, version(number, dropout=DROPOUT), inputs_wanted=True, wanted_from=0, seed=seed)
    output_BSD, pieces = await passes.forward(plan, inputs_BSD, positions_BS, MASK.to(torch.uint8))
    own, entered_BSD = adapters(number, DROPOUT), inputs_BSD.clone().requires_grad_(True)
    expected_BSD = computed(entered_BSD, MASK, own, seed=seed)
    assert_equal(output_BSD[MASK.bool()], expected_BSD[MASK.bool()])
    grad_BSD = output_BSD.detach() * MASK[..., None]
    client.enters("backward")
    found = await passes.backward(plan, pieces, grad_BSD)
    parameters = [parameter for block in sorted(own) for parameter in own[block].parameters]
    right, *factors = torch.autograd.grad(expected_BSD, [entered_BSD, *parameters], grad_BSD)
    assert found.inputs_BTD is not None
    assert_equal(found.inputs_BTD, right)
    assert_equal(
        torch.cat([found.factors[block].values for block in sorted(own)]),
        torch.cat([each.flatten() for each in factors]),
    )


async def tuned(client: Client) -> None:
    """A session with an adapter: a prompt, and more tokens one by one."""
    session = Session(client.swarm, client.span, batch_size=1, max_length=48, tuning=version(0))
    ids = torch.randint(3, oracle().vocabulary, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BSD = computed(oracle().embed(ids), torch.ones_like(ids), adapters(0, 0.0), seed=None)
    client.enters("prefill")
    try:
        for start, end in [(0, 17), *((token, token + 1) for token in range(17, 24))]:
            output = await session.step(oracle().embed(ids[:, start:end]), start, None, None)
            assert isinstance(output, Tensor)
            assert_equal(output, expected_BSD[:, start:end])
            client.enters("decode")
    finally:
        client.enters("close")
        await session.close()
