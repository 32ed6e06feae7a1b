"""What PEFT can add to a model on one machine but not to blocks that servers hold ends in one clear error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import PreTrainedModel

from shoal.errors import UnsupportedOperation

from .harness import Swarm, swarm_of
from .test_adapters import TOKENS, adapted, close
from .tiny_models import tiny_config, tiny_model

MakeSwarm = Callable[..., Swarm]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **changes})


def loss(model: Any, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS, labels=TOKENS, **options).loss
    return found


def with_another(model: PeftModel, **changes: Any) -> PeftModel:
    """The model with a second adapter, named "other"."""
    model.add_adapter("other", lora(**changes))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


def two_at_once(model: Any) -> None:
    both = with_another(adapted(model, lora()))
    both.base_model.set_adapter(["default", "other"])
    loss(both)


MERGED = "servers hold these weights"
OTHER_KINDS = ["LoHaConfig", "LoKrConfig", "OFTConfig", "BOFTConfig", "VeraConfig", "FourierFTConfig", "HRAConfig"]
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an adapter that is merged": (
        lambda model: adapted(model, lora()).merge_and_unload(),
        MERGED,
    ),
    "the same in a copy": (
        lambda model: adapted(model, lora()).merge_and_unload(safe_merge=True),
        MERGED,
    ),
    "the same for a while": (lambda model: adapted(model, lora()).merge_adapter(), MERGED),
    "IA3 that is merged": (
        lambda model: adapted(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[])).merge_adapter(),
        MERGED,
    ),
    **{
        f"factors that begin as {kind} has them": (
            lambda model, kind=kind: get_peft_model(model, lora(init_lora_weights=kind)),
            MERGED,
        )
        for kind in ("pissa", "pissa_niter_4", "olora")
    },
    **{
        f"{where}, trained whole": (
            lambda model, where=where: loss(adapted(model, lora(modules_to_save=[where]))),
            f"{where} is in a block, which servers hold",
        )
        for where in ("o_proj", "input_layernorm")
    },
    **{
        kind: (
            lambda model, kind=kind: loss(get_peft_model(model, getattr(peft, kind)(target_modules=["q_proj"]))),
            r"self_attn.q_proj: servers do not compute peft\.tuners",
        )
        for kind in OTHER_KINDS
    },
    "AdaLoRA": (
        lambda model: loss(get_peft_model(model, peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"]))),
        r"servers do not compute peft\.tuners\.adalora",
    ),
    "activated LoRA": (
        lambda model: loss(get_peft_model(model, lora(alora_invocation_tokens=[5, 6]))),
        r"servers do not compute peft\.tuners\.lora",
    ),
    "norms that are tuned": (
        lambda model: loss(get_peft_model(model, peft.LNTuningConfig(target_modules=["input_layernorm"]))),
        r"input_layernorm: servers do not compute peft\.tuners\.ln_tuning",
    ),
    "a prefix of keys and values": (
        lambda model: loss(get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))),
        "the blocks are on servers",
    ),
    "factors of parameters": (
        lambda model: get_peft_model(model, lora(target_modules=["v_proj"], target_parameters=["q_proj.weight"])),
        r"not to parameters such as those of experts: q_proj\.weight",
    ),
    "two adapters at once": (two_at_once, "2 adapters are active at once"),
    "another adapter for each sequence": (
        lambda model: loss(with_another(adapted(model, lora())), adapter_names=["default", "other"] * 2),
        "q_proj has hooks, which servers do not call",
    ),
    "another adapter for each sequence that is generated": (
        lambda model: with_another(adapted(model, lora())).generate(
            input_ids=TOKENS, max_new_tokens=2, adapter_names=["default", "other"] * 2
        ),
        "q_proj has hooks, which servers do not call",
    ),
}


@pytest.fixture(scope="module")
def swarm(folder: Path) -> Any:
    """One swarm for all tests of this module."""
    with swarm_of(folder, "0:2", "2:4") as started:
        yield started


@pytest.mark.parametrize("what", REFUSED)
def test_what_servers_cannot_compute_is_refused_in_one_line(swarm: Swarm, what: str):
    attempt, reason = REFUSED[what]
    model = swarm.model()
    with pytest.raises(UnsupportedOperation, match=reason) as refusal:
        attempt(model)
    assert "\n" not in str(refusal.value)


def test_if_all_linear_includes_experts_the_hint_names_the_other_layers(tmp_path: Path):
    tiny_model(tiny_config("mixtral")).save_pretrained(tmp_path)
    with swarm_of(tmp_path, "0:5") as net:
        model = net.model()
        with pytest.raises(UnsupportedOperation, match="parameters such as those of experts") as refusal:
            get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert refusal.value.hint == "name the linear layers: target_modules=['k_proj', 'o_proj', 'q_proj', 'v_proj']"


# -- and what works as on one machine --------------------------------------------------------------------------------

ALIKE: dict[str, Callable[[], LoraConfig]] = {
    "biases": lambda: lora(bias="all"),
    "layers by a pattern": lambda: lora(target_modules=r".*layers\.[12]\.mlp\.(up|down)_proj"),
    "some that are left out": lambda: lora(exclude_modules=["down_proj"]),
    "the head and the embeddings": lambda: lora(target_modules=["q_proj", "lm_head", "embed_tokens"]),
    "the head, trained whole": lambda: lora(modules_to_save=["lm_head"]),
    "some embeddings, trained whole": lambda: lora(trainable_token_indices=[3, 4]),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_parts_around_the_blocks_are_trained_too(swarm: Swarm, whole: PreTrainedModel, kind: str):
    ours, theirs = adapted(swarm.model(), ALIKE[kind]()), adapted(copy.deepcopy(whole), ALIKE[kind]())
    for model in (ours, theirs):
        loss(model).backward()
    mine, expected = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs))
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert close(mine[name], gradient), name


def test_gradient_checkpointing_changes_nothing(swarm: Swarm, whole: PreTrainedModel):
    ours, theirs = adapted(swarm.model(), lora()), adapted(copy.deepcopy(whole), lora())
    ours.gradient_checkpointing_enable()
    ours.enable_input_require_grads()
    for model in (ours, theirs):
        loss(model.train()).backward()
    gradients = {name: each.grad for name, each in theirs.named_parameters() if each.requires_grad}
    for name, each in ours.named_parameters():
        if each.requires_grad:
            assert close(each.grad, gradients[name])


def test_a_model_whose_adapter_is_unloaded_is_as_before(swarm: Swarm, whole: PreTrainedModel):
    model = adapted(swarm.model(), lora())
    assert not close(loss(model), loss(whole))
    assert close(loss(model.unload()), loss(whole))


def test_adapters_are_added_to_each_other_as_on_one_machine(swarm: Swarm, whole: PreTrainedModel):
    models = [with_another(adapted(model, lora())) for model in (swarm.model(), copy.deepcopy(whole))]
    for model in models:
        model.add_weighted_adapter(["default", "other"], [0.5, 0.3], "sum", combination_type="linear")
        model.set_adapter("sum")
    assert close(*(loss(model) for model in models))


def test_a_copy_of_the_model_has_factors_of_its_own(swarm: Swarm, whole: PreTrainedModel):
    model = adapted(swarm.model(), lora())
    before, other = loss(model), copy.deepcopy(model)
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    assert close(loss(other), loss(whole))
    assert torch.equal(loss(model), before)
    assert "LlamaRMSNorm" in repr(other)


def test_an_adapter_is_saved_and_loaded_in_both_kinds_of_model(swarm: Swarm, whole: PreTrainedModel, tmp_path: Path):
    expected = adapted(swarm.model(), lora())
    expected.save_pretrained(tmp_path)
    for model in (copy.deepcopy(whole), swarm.model()):
        assert close(loss(PeftModel.from_pretrained(model, tmp_path)), loss(expected))
    assert close(loss(PeftModel.from_pretrained(swarm.model(), tmp_path, low_cpu_mem_usage=True)), loss(expected))
