"""Layers of a checkpoint that predict further tokens guess for a distributed model, as they do in Transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.candidate_generator import MTPCandidateGenerator

from shoal import CheckpointError, UnsupportedOperation
from shoal.client.generation.drafting.mtp_drafter import MtpDrafter

from .harness import QUICK, Swarm, swarm_of
from .test_remote_head import REMOTE
from .test_streams import expected
from .tiny_models import tiny_config, tiny_model

NUM_BLOCKS = 3
FAMILIES = [("deepseek_v3", 1), ("deepseek_v3", 3), ("glm4_moe", 1), ("glm4_moe", 2), ("mellum", 1)]
"""With the number of layers that predict further tokens."""
USUAL_ENDS = "eh_proj", "enorm", "hnorm", "shared_head.norm"
ENDS = {"mellum": ["mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"]}
"""What only a further layer has: its projection, and three norms."""
NUM_TOKENS = 16
"""What `expected` generates."""
PROMPT = torch.tensor([[6, 18, 43, 6, 18, 10, 31]])


def write_checkpoint(folder: Path, model_type: str, num_layers: int) -> Path:
    """A checkpoint as they are published: further layers stand behind the blocks, each with what only it has."""
    torch.manual_seed(3)
    changes: dict[str, Any] = {"num_hidden_layers": NUM_BLOCKS + num_layers}
    if model_type == "mellum":  # its further layer is a sliding one, which the model has to have, too
        changes["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    tiny_model(tiny_config(model_type, **changes)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": NUM_BLOCKS, "num_nextn_predict_layers": num_layers}
    for name in ("layer_types", "mlp_layer_types"):
        if name in config:
            config[name] = config[name][:NUM_BLOCKS]
    (folder / "config.json").write_text(json.dumps(config))
    tensors, size = load_file(folder / "model.safetensors"), config["hidden_size"]
    for number in range(NUM_BLOCKS, NUM_BLOCKS + num_layers):
        block = f"model.layers.{number}"
        projection, *norms = ENDS.get(model_type, [f"{block}.{name}" for name in USUAL_ENDS])
        tensors[f"{projection}.weight"] = torch.randn(size, 2 * size) * 0.2
        for norm in norms:
            tensors[f"{norm}.weight"] = 1 + 0.1 * torch.randn(size)
    if model_type in ENDS:  # its further layer has a name of its own
        tensors = {name.replace(f"model.layers.{NUM_BLOCKS}.", "mtp.layers.0."): each for name, each in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain(folder: Path) -> PreTrainedModel:
    """The model on one machine, which finds its further layers as those of a published checkpoint."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    numbers = range(NUM_BLOCKS, NUM_BLOCKS + model.config.num_mtp_layers)
    patterns = [rf"model\.layers\.{number}\..*" for number in numbers]
    model._keys_to_ignore_on_load_unexpected = [*patterns, r"^mtp\."]
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("further") / "tiny", "deepseek_v3", 2)


@pytest.fixture(scope="module")
def alone(folder: Path) -> PreTrainedModel:
    return plain(folder)


@pytest.fixture
def net(folder: Path) -> Iterator[Swarm]:
    with swarm_of(folder, "0:2", "2:3", "0:2", "2:3") as made:
        yield made


class Noting(MtpDrafter):
    """Keeps what it guessed behind texts, by their lengths."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.length, self.guessed = 0, dict[int, list[int]]()

    def append(self, tokens: Any) -> None:
        super().append(tokens)
        self.length += len(tokens)

    def guesses(self, count: int) -> list[int]:
        found = super().guesses(count)
        if found:
            self.guessed[self.length] = found
        return found


@pytest.mark.parametrize(("family", "num_layers"), FAMILIES)
def test_they_guess_what_they_guess_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, num_layers: int
):
    folder = write_checkpoint(tmp_path / "tiny", family, num_layers)
    alone, theirs = plain(folder), dict[int, list[int]]()
    usual = MTPCandidateGenerator.get_candidates

    def noting(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found, logits = usual(self, input_ids, *args, **kwargs)
        theirs[input_ids.shape[1]] = found[0, input_ids.shape[1] :].tolist()
        return found, logits

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", noting)
    wanted = alone.generate(PROMPT, max_new_tokens=NUM_TOKENS, use_mtp=True)[0, PROMPT.shape[1] :].tolist()
    with swarm_of(folder, "0:2", "2:3") as net:
        model = net.model()
        drafter = Noting(model.draft_models.own_layers(model))
        stream = model.stream(PROMPT, max_new_tokens=NUM_TOKENS, draft=drafter, num_guesses=num_layers)
        assert [token.id for token in stream] == wanted
    ours = {length: found for length, found in drafter.guessed.items() if length in theirs}
    assert len(wanted) == NUM_TOKENS
    assert len(ours) >= NUM_TOKENS / 2
    assert ours == {length: theirs[length][: len(found)] for length, found in ours.items()}


def test_what_is_taken_back_leaves_no_trace(net: Swarm):
    """However many tokens are guessed, beyond what the layers were made for too, the first ones are the same."""
    model = net.model()
    found = []
    for num_guesses in (1, 2, 6):
        drafter = Noting(model.draft_models.own_layers(model))
        list(model.stream(PROMPT, max_new_tokens=NUM_TOKENS, draft=drafter, num_guesses=num_guesses))
        found.append(drafter.guessed)
    few, some, many = found
    assert max(map(len, many.values())) == 6
    for length in set(few) & set(some) & set(many):
        assert few[length] == some[length][:1] == many[length][:1]
        assert some[length] == many[length][: len(some[length])]
    assert len(set(few) & set(some) & set(many)) > NUM_TOKENS / 3


def test_no_token_changes(net: Swarm, alone: PreTrainedModel):
    """Sampled or not, of prompts that are read in pieces, in sessions that go on, and when servers are lost."""
    model = net.model(config=replace(QUICK, draft="mtp"))
    long = 1 + torch.arange(44)[None] * 31 % 89
    for seed, (prompt, options) in enumerate([(PROMPT, {}), (long, {}), (long, {"do_sample": True, "top_k": 20})]):
        stream = model.stream(prompt, max_new_tokens=NUM_TOKENS, num_guesses=3, seed=seed, **options)
        assert [token.id for token in stream] == expected(alone, prompt, seed, options)
        assert stream.num_guessed > 0
    wanted = expected(alone, PROMPT, 0, {})
    with model.inference_session(max_length=64) as session:
        found = [token.id for token in model.stream(PROMPT, max_new_tokens=6, num_guesses=2)]
        net.kill(session.servers[0])
        going_on = model.stream(None, max_new_tokens=NUM_TOKENS - 6, num_guesses=2)
        for token in going_on:
            found.append(token.id)
            if len(found) == 10:
                net.kill(session.servers[1])
    assert found == wanted
    assert going_on.num_guessed > 0


def test_generate_takes_transformers_option(net: Swarm, alone: PreTrainedModel):
    model = net.model()
    ids = PROMPT.repeat(2, 1)
    ids[1] += 1
    assert (
        model.generate(ids, max_new_tokens=8, use_mtp=True).tolist() == alone.generate(ids, max_new_tokens=8).tolist()
    )
    for options in ({"use_mtp": True, "num_beams": 2}, {"generation_config": GenerationConfig(use_mtp=True)}):
        with pytest.raises(UnsupportedOperation, match="use_mtp"):
            model.generate(ids, max_new_tokens=8, **options)


def test_what_cannot_guess_is_refused(net: Swarm, folder: Path, tmp_path: Path):
    with pytest.raises(UnsupportedOperation, match="where a server computes the head"):
        net.model(config=replace(REMOTE, draft="mtp")).stream(PROMPT)
    without = tmp_path / "without"
    tiny_model(tiny_config("llama")).save_pretrained(without)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    del tensors[f"model.layers.{NUM_BLOCKS}.hnorm.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    for wrong, error in ((without, UnsupportedOperation), (damaged, CheckpointError)):
        with swarm_of(wrong, "0:1") as other, pytest.raises(error, match=r"predict further tokens|hnorm"):
            other.model(config=replace(QUICK, draft="mtp"))
