"""Trainers that know nothing of swarms run unchanged, and what they save is an adapter for one machine."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from .harness import Swarm

PROBE = torch.arange(3, 35).view(4, 8)
WORDS = ("red", "blue", "green", "black", "white")


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def rows(count: int) -> Dataset:
    """Sequences that count up: something to learn."""
    ids = (torch.arange(count)[:, None] % 60 + torch.arange(3, 15)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    """What both trainers are told: three steps, on one CPU, heard of by nobody."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 0,
        **options,
    }


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logits_of_saved(adapter: Path) -> torch.Tensor:
    """What plain Transformers and PEFT make of a saved folder, which names its model, on one machine."""
    return AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()(PROBE).logits


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=PROBE).logits


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_transformers_trainer_trains_evaluates_and_saves_as_on_one_machine(
    checkpointing: bool, swarm: Callable[..., Swarm], whole: PreTrainedModel, tmp_path: Path
):
    def trained(model: Any, where: Path) -> Trainer:
        torch.manual_seed(0)
        trainer = Trainer(
            get_peft_model(model, lora()),
            TrainingArguments(
                **arguments(
                    where,
                    gradient_accumulation_steps=2,
                    gradient_checkpointing=checkpointing,
                    eval_strategy="steps",
                    eval_steps=1,
                )
            ),
            train_dataset=rows(24),
            eval_dataset=rows(6),
            data_collator=default_data_collator,
        )
        trainer.train()
        trainer.save_model(str(where))
        return trainer

    ours = trained(swarm("0:2", "2:4").model(), tmp_path / "ours")
    theirs = trained(copy.deepcopy(whole), tmp_path / "theirs")
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert [ours.evaluate()["eval_loss"]] == pytest.approx([theirs.evaluate()["eval_loss"]], rel=1e-5)
    assert losses(ours)[-1] < losses(ours)[0]
    torch.testing.assert_close(logits_of_saved(tmp_path / "ours"), logits(ours.model))
    assert not torch.allclose(logits(ours.model), logits(whole))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", *WORDS))}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_trls_sft_trainer_makes_and_trains_an_adapter_as_on_one_machine(
    swarm: Callable[..., Swarm],
    whole: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
):
    examples = [
        {"prompt": f"{word} {word}", "completion": f" {after}"} for word, after in itertools.pairwise(WORDS)
    ] * 3

    def trained(model: Any, where: Path) -> SFTTrainer:
        torch.manual_seed(0)
        trainer = SFTTrainer(
            model,
            SFTConfig(**arguments(where, bf16=False)),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            peft_config=lora(),
        )
        trainer.train()
        trainer.save_model(str(where))
        return trainer

    ours = trained(swarm("0:2", "2:4").model(), tmp_path / "ours")
    theirs = trained(copy.deepcopy(whole), tmp_path / "theirs")
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert losses(ours)[-1] < losses(ours)[0]
    torch.testing.assert_close(logits_of_saved(tmp_path / "ours"), logits(ours.model))
