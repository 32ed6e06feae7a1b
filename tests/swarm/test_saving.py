"""What a distributed model writes is what is trained here, is loaded again, and is never taken for a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from shoal import AutoDistributedModelForSequenceClassification
from shoal.errors import CheckpointError, UnsupportedOperation, UserError

from .harness import QUICK, Swarm

TOKENS = torch.arange(3, 19).view(2, 8)
DORA = LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")

MakeSwarm = Callable[..., Swarm]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def train_a_little(model: Any) -> None:
    """Two steps: what is trained differs from what it was, whatever it is."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):
        options = {"labels": torch.tensor([0, 1])} if hasattr(model, "score") else {"labels": TOKENS}
        model(input_ids=TOKENS, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def prompted(net: Swarm) -> Any:
    torch.manual_seed(0)
    return net.model(tuning_mode="deep_ptune", pre_seq_len=3)


def classifier(net: Swarm) -> Any:
    model = net.model(AutoDistributedModelForSequenceClassification, num_labels=2)
    model.base_model.requires_grad_(False)
    return model


def all_here(net: Swarm) -> Any:
    return net.model()


@pytest.mark.parametrize("copied", [False, True], ids=["opened", "copied"])
def test_a_model_of_which_nothing_is_trained_is_not_saved(copied: bool, swarm: MakeSwarm, tmp_path: Path):
    model = swarm("0:4").model()
    model = copy.deepcopy(model) if copied else model
    for refused in (model, model.requires_grad_(False)):
        with pytest.raises(UnsupportedOperation, match="its blocks are on servers") as error:
            refused.save_pretrained(tmp_path / "saved")
        assert "PEFT" in str(error.value.hint)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("make", [prompted, classifier, all_here])
def test_what_was_trained_is_saved_and_loaded(make: Callable[[Swarm], Any], swarm: MakeSwarm, tmp_path: Path):
    net = swarm("0:2", "2:4")
    model, other = make(net), make(net)
    train_a_little(model)
    model.save_pretrained(tmp_path)
    assert not torch.allclose(logits(other), logits(model))
    other.load_trained(tmp_path)
    torch.testing.assert_close(logits(other), logits(model))


def test_what_is_frozen_is_not_written(swarm: MakeSwarm, tmp_path: Path):
    model = prompted(swarm("0:4"))
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 6000 < sum(each.numel() * 4 for each in model.parameters())


def test_what_was_saved_is_not_taken_for_a_model(swarm: MakeSwarm, tmp_path: Path):
    net = swarm("0:4")
    prompted(net).save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        net.model(folder=tmp_path)


def test_the_weights_of_a_model_are_not_overwritten(swarm: MakeSwarm, whole: PreTrainedModel, tmp_path: Path):
    whole.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds a model"):
        prompted(swarm("0:4")).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_what_was_trained_otherwise_is_not_loaded(swarm: MakeSwarm, tmp_path: Path):
    net = swarm("0:4")
    prompted(net).save_pretrained(tmp_path)
    other = net.model(tuning_mode="ptune", pre_seq_len=3)
    before = other.prompt_embeddings.weight.clone()
    with pytest.raises(CheckpointError, match=r"the model has no model\.layers\.0\.soft_prompt"):
        other.load_trained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        other.load_trained(tmp_path / "elsewhere")
    assert torch.equal(other.prompt_embeddings.weight, before)


def test_an_upload_is_left_to_its_own_command(swarm: MakeSwarm, tmp_path: Path):
    with pytest.raises(UserError, match="writes a folder here"):
        prompted(swarm("0:4")).save_pretrained(tmp_path, push_to_hub=True)


def test_only_the_main_process_writes(swarm: MakeSwarm, tmp_path: Path):
    prompted(swarm("0:4")).save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_an_adapter_that_transformers_has_added_is_saved_as_an_adapter(
    swarm: MakeSwarm, whole: PreTrainedModel, tmp_path: Path
):
    model = swarm("0:4").model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))


def rows(count: int) -> Dataset:
    ids = (torch.arange(count)[:, None] % 60 + torch.arange(3, 15)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def trainer(model: Any, folder: Path, *, steps: int) -> Trainer:
    """A checkpoint at each step, the best of which is loaded at the end."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        save_steps=1,
        save_strategy="steps",
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        use_cpu=True,
        seed=0,
    )
    return Trainer(model, arguments, train_dataset=rows(24), eval_dataset=rows(6), data_collator=default_data_collator)


def test_a_trainer_saves_resumes_and_finds_its_best_checkpoint(swarm: MakeSwarm, tmp_path: Path):
    net = swarm("0:2", "2:4")
    straight, first, second = (prompted(net) for _ in range(3))
    trainer(straight, tmp_path / "straight", steps=3).train()
    trainer(first, tmp_path / "resumed", steps=2).train()
    resumed = trainer(second, tmp_path / "resumed", steps=3)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(logits(second), logits(straight))
    best = prompted(net)
    best.load_trained(resumed.state.best_model_checkpoint)
    torch.testing.assert_close(logits(second), logits(best))
    assert not torch.allclose(logits(first), logits(second))


def magnitudes(model: Any) -> dict[str, torch.Tensor]:
    return {name: own.detach() for name, own in model.named_parameters() if "magnitude" in name}


@pytest.mark.parametrize("read", [magnitudes, lambda model: model.state_dict()], ids=["parameters", "state"])
def test_dora_begins_with_the_weights_before_anything_was_computed(
    read: Callable[[Any], dict[str, torch.Tensor]], swarm: MakeSwarm, whole: PreTrainedModel
):
    ours, theirs = (get_peft_model(model, DORA) for model in (swarm("0:2", "2:4").model(), copy.deepcopy(whole)))
    found, expected = (
        {name: each for name, each in read(model).items() if "magnitude" in name} for model in (ours, theirs)
    )
    assert found.keys() == expected.keys() != set()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each)


def test_dora_saved_before_the_first_pass_is_right_on_one_machine(
    swarm: MakeSwarm, whole: PreTrainedModel, tmp_path: Path
):
    get_peft_model(swarm("0:2", "2:4").model(), DORA).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(whole))


def test_dora_that_could_not_be_measured_at_first_is_measured_when_it_is_saved(
    swarm: MakeSwarm, whole: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    net = swarm("0:2")
    model = get_peft_model(net.model(config=QUICK), DORA)
    assert "the magnitudes of DoRA are measured later" in caplog.text
    net.start("2:4")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path)), logits(whole))


def test_a_second_adapter_with_dora_is_measured_when_it_is_saved(
    swarm: MakeSwarm, whole: PreTrainedModel, tmp_path: Path
):
    model = get_peft_model(swarm("0:4").model(), LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.add_adapter("second", DORA)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path / "second")
    torch.testing.assert_close(logits(loaded), logits(whole))


def test_an_adapter_with_dora_that_is_loaded_is_not_measured(swarm: MakeSwarm, whole: PreTrainedModel, tmp_path: Path):
    torch.manual_seed(0)
    theirs = get_peft_model(copy.deepcopy(whole), DORA)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path)
    net = swarm("0:2", "2:4")
    kinds: list[bytes] = []
    net.network.on_frame = lambda frame: kinds.append(bytes(frame.header)) or frame
    model = PeftModel.from_pretrained(net.model(), tmp_path)
    assert not any(b'"norms"' in kind for kind in kinds)
    torch.testing.assert_close(logits(model), logits(theirs))
