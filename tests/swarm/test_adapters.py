"""A client's own layers in blocks that others hold: the same as with Transformers and PEFT on one machine."""

from __future__ import annotations

import asyncio
import copy
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from shoal.errors import UnsupportedOperation, UserError
from shoal.model.peft.peft_folder import PeftFolder
from shoal.net.memory import Frame

from .harness import Swarm

TOKENS = torch.arange(3, 35).view(4, 8)
SPANS = {"s0": "0:2", "s1": "2:4"}
KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
    "rsLoRA with a bias": lambda: LoraConfig(
        r=4, use_rslora=True, lora_bias=True, target_modules=["q_proj", "up_proj"]
    ),
    "DoRA": lambda: LoraConfig(r=2, use_dora=True, target_modules=["v_proj", "down_proj"]),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoRA in some layers": lambda: LoraConfig(r=4, layers_to_transform=[1, 2], target_modules=["o_proj"]),
    "ranks by pattern": lambda: LoraConfig(r=2, rank_pattern={"q_proj": 6}, target_modules=["q_proj", "gate_proj"]),
}


def adapted(model: Any, config: Any, *, seed: int = 0) -> PeftModel:
    """A model with factors that are not zero, the same for each model."""
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (1 + 0.1 * noise if parameter.dim() == 1 else 0.3 * noise).to(parameter.dtype)
    return tuned


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To a relative error of 1e-5 in norm, as gradients are measured."""
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_training_is_that_of_peft_on_one_machine(
    kind: str, swarm: Callable[..., Swarm], whole: PreTrainedModel
):
    net = swarm("0:2", "2:4")
    ours = adapted(net.model(), KINDS[kind]())
    theirs = adapted(copy.deepcopy(whole), KINDS[kind]())
    losses = [model(input_ids=TOKENS, labels=TOKENS).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert close(*losses)
    mine, expected = (
        {name: each.grad for name, each in model.named_parameters() if each.requires_grad} for model in (ours, theirs)
    )
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        assert close(mine[name], gradient), name


def test_generation_with_an_adapter_is_that_of_peft_on_one_machine(swarm: Callable[..., Swarm], whole: PreTrainedModel):
    net = swarm("0:2", "2:4")
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    model = net.model()
    plain = model.generate(TOKENS, max_new_tokens=20, do_sample=False)
    ours, theirs = adapted(model, config), adapted(copy.deepcopy(whole), config)
    for options in ({"do_sample": False}, {"num_beams": 3}):
        found = ours.generate(input_ids=TOKENS, max_new_tokens=20, **options)
        assert found.tolist() == theirs.generate(input_ids=TOKENS, max_new_tokens=20, **options).tolist()
        assert found.tolist() != plain.tolist()
    with ours.disable_adapter():
        assert ours.generate(input_ids=TOKENS, max_new_tokens=20, do_sample=False).tolist() == plain.tolist()


def test_a_saved_adapter_gives_the_same_on_one_machine_and_the_other_way_round(
    swarm: Callable[..., Swarm], whole: PreTrainedModel, tmp_path: Path
):
    net = swarm("0:2", "2:4")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ours, theirs = adapted(net.model(), config), adapted(copy.deepcopy(whole), config, seed=1)
    for source, target in ((ours, copy.deepcopy(whole)), (theirs, net.model())):
        source.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(target, tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=TOKENS).logits, source(input_ids=TOKENS).logits)


@pytest.mark.parametrize("hosts", [("s0", "s1"), ("s1",), ()])
def test_what_servers_host_is_not_sent_to_them(
    hosts: tuple[str, ...], folder: Path, swarm: Callable[..., Swarm], whole: PreTrainedModel, tmp_path: Path
):
    theirs = adapted(copy.deepcopy(whole), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    net = swarm()
    servers = [net.start(span, adapters=(str(tmp_path),) if name in hosts else ()) for name, span in SPANS.items()]
    model = net.model(active_adapter=PeftFolder.open(tmp_path))
    found = model.generate(TOKENS, max_new_tokens=8, do_sample=False)
    assert found.tolist() == theirs.generate(input_ids=TOKENS, max_new_tokens=8, do_sample=False).tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits)
    assert [bool(server.engine.adapters.num_bytes) for server in servers] == [name not in hosts for name in SPANS]


@pytest.mark.parametrize("trained", [(), (1,), (0, 3)], ids=str)
def test_gradients_of_frozen_factors_are_neither_computed_nor_sent(
    trained: tuple[int, ...], swarm: Callable[..., Swarm], whole: PreTrainedModel
):
    """A prompt is trained beside them, and the factors of some blocks."""
    net, sizes = swarm("0:2", "2:4"), list[int]()

    def note(frame: Frame) -> Frame:
        for tensor in json.loads(bytes(frame.header))["tensors"]:
            if tensor["name"] == "factor_grads":
                sizes.extend(tensor["shape"])
        return frame

    net.network.on_frame = note
    config = LoraConfig(r=4, target_modules=["q_proj"])
    found = []
    for model in (adapted(net.model(), config), adapted(copy.deepcopy(whole), config)):
        model.requires_grad_(False)
        factors = [
            own.requires_grad_()
            for name, own in model.named_parameters()
            if "lora_" in name and any(f"layers.{block}." in name for block in trained)
        ]
        embeds = model.get_input_embeddings()(TOKENS).requires_grad_()
        model(inputs_embeds=embeds, labels=TOKENS, use_cache=False).loss.backward()
        found.append([embeds.grad, *(own.grad for own in factors)])
    assert len(found[0]) == 1 + 2 * len(trained)
    assert all(close(mine, expected) for mine, expected in zip(*found, strict=True))
    assert sum(sizes) == len(trained) * (4 * 32 + 4 * 32)


def test_what_becomes_of_a_hosted_adapter_is_sent_first_and_is_not_for_others(
    folder: Path, swarm: Callable[..., Swarm], whole: PreTrainedModel, tmp_path: Path
):
    theirs = adapted(copy.deepcopy(whole), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    net = swarm("0:4", adapters=(str(tmp_path),))
    kinds, shared = Counter[str](), set[str | None]()

    def count(frame: Frame) -> Frame:
        header = json.loads(bytes(frame.header))
        kinds[header["kind"]] += 1
        if header["kind"] == "adapter":
            shared.add(header.get("shared"))
        return frame

    net.network.on_frame = count
    model = net.model(active_adapter=PeftFolder.open(tmp_path), tuning_mode="deep_ptune", pre_seq_len=2)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert kinds["adapter"] == kinds["adapter_stored"] == 3 * 4
    assert not kinds["not_cached"]
    assert shared == {None}


def test_a_folder_without_safetensors_is_refused(swarm: Callable[..., Swarm], tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        swarm("0:4").model(active_adapter=PeftFolder.open(tmp_path))


def test_servers_that_offer_no_training_generate_all_the_same(swarm: Callable[..., Swarm], whole: PreTrainedModel):
    net = swarm()
    net.start("0:2"), net.start("2:4", training=False)
    model = net.model()
    expected = whole.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert model.generate(TOKENS, max_new_tokens=4, do_sample=False).tolist() == expected.tolist()
    with pytest.raises(UnsupportedOperation, match="blocks 2:4 are served for generating only"):
        model(input_ids=TOKENS)
    net.start("2:4")
    torch.testing.assert_close(model(input_ids=TOKENS).logits, whole(input_ids=TOKENS).logits)


def test_dora_begins_with_the_weights_that_servers_hold(swarm: Callable[..., Swarm], whole: PreTrainedModel):
    config = LoraConfig(r=4, use_dora=True, target_modules="all-linear")
    ours, theirs = get_peft_model(swarm("0:2", "2:4").model(), config), get_peft_model(copy.deepcopy(whole), config)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=TOKENS).logits, whole(input_ids=TOKENS).logits)
    mine, expected = (
        {name: own for name, own in model.named_parameters() if "magnitude" in name} for model in (ours, theirs)
    )
    assert mine.keys() == expected.keys()
    for name, magnitudes in expected.items():
        torch.testing.assert_close(mine[name], magnitudes)


def test_threads_that_begin_together_measure_doras_magnitudes_once(swarm: Callable[..., Swarm]):
    net = swarm()  # so that nothing can be measured when the adapter is made
    blocks = get_peft_model(net.model(), LoraConfig(use_dora=True, target_modules=["q_proj"])).base_model.model.blocks
    net.start("0:4")
    kinds = Counter[str]()
    with ThreadPoolExecutor() as pool:
        outputs: list[Future[torch.Tensor]] = []

        def note(frame: Frame) -> Frame:
            kinds[kind := json.loads(bytes(frame.header))["kind"]] += 1
            if kind == "norms":  # a client is about to measure a block
                outputs.append(pool.submit(blocks[0:4], torch.ones(1, 5, 32)))
            return frame

        net.network.on_frame = note
        outputs.append(pool.submit(blocks, torch.ones(1, 5, 32)))
        net.settle(lambda: len(outputs) >= 5 and all(each.done() for each in outputs))
    assert kinds["norms"] == 4
    for each in outputs:
        each.result().sum().backward()


def test_servers_keep_what_several_clients_have_used_and_say_so(
    folder: Path, swarm: Callable[..., Swarm], whole: PreTrainedModel, tmp_path: Path
):
    theirs = adapted(copy.deepcopy(whole), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False).tolist()
    net = swarm("0:4")
    adapters = net.servers["s0"].engine.adapters
    for num_users in (1, 2, 3):
        assert bool(adapters.announced) == (num_users > 2)
        model = net.model(active_adapter=PeftFolder.open(tmp_path))
        assert model.generate(TOKENS, max_new_tokens=4, do_sample=False).tolist() == expected
        model.close()
        net.settle(lambda num_users=num_users: bool(adapters.num_bytes) == (num_users > 1))


def test_a_model_has_twins_with_adapters_that_share_its_weights_and_its_place(
    folder: Path, swarm: Callable[..., Swarm], whole: PreTrainedModel, tmp_path: Path
):
    """Adapters of the blocks and of both ends; all of them generate at once, and none of them sees the others."""
    configs = [
        LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["o_proj", "lm_head", "embed_tokens"], task_type="CAUSAL_LM"),
    ]
    theirs = [adapted(copy.deepcopy(whole), config) for config in configs]
    net = swarm("0:2", "2:4")
    model = net.model()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    twins = []
    for number, each in enumerate(theirs):
        each.save_pretrained(tmp_path / str(number))
        twins.append(model.with_adapter(tmp_path / str(number)))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for twin in twins:
        assert twin.get_input_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()

    async def together() -> list[list[int]]:
        async def answer(of: Any) -> list[int]:
            return [token.id async for token in of.stream(TOKENS[:1], max_new_tokens=8, do_sample=False)]

        return await asyncio.gather(*(answer(of) for of in (model, *twins)))

    def expected(of: Any) -> list[int]:
        return of.generate(input_ids=TOKENS[:1], max_new_tokens=8, do_sample=False)[0, TOKENS.shape[1] :].tolist()

    assert asyncio.run(together()) == [expected(each) for each in (whole, *theirs)]
    model.close()
    assert twins[0].generate(TOKENS[:1], max_new_tokens=8, do_sample=False)[0, TOKENS.shape[1] :].tolist() == expected(
        theirs[0]
    )
    with pytest.raises(UserError, match="has an adapter or prompts already"):
        twins[0].with_adapter(tmp_path / "1")
    for twin in twins:
        twin.close()
