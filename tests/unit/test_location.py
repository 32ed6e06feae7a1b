"""Telling a folder from a model on the hub, and refusing a bad name before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import CheckpointError, UserError
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.location import check_model, folder_of


def test_an_existing_folder_takes_precedence_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("owner/model", "./owner/model", "~/owner/model", str(tmp_path / "owner" / "model"), "owner", "."):
        folder = folder_of(place)
        assert folder is not None
        assert folder.is_dir()
    assert folder_of("owner/other") is None


@pytest.mark.parametrize(
    "place", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere-at-all", "~nowho/x", Path("nowhere")]
)
def test_a_path_without_a_folder_is_not_taken_for_a_model_on_the_hub(place):
    with pytest.raises(UserError, match="there is no folder") as refused:
        folder_of(place)
    assert refused.value.hint


@pytest.mark.parametrize("name", ["", "models/llama/8b", "a model", "models/", "https://huggingface.co/a/b"])
def test_a_text_that_cannot_be_a_repository_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is neither a folder nor the id of a model on the hub"):
        folder_of(name)


@pytest.mark.parametrize("model", ["gpt2", "meta-llama/Llama-3.1-8B", "01-ai/Yi_6b"])
def test_repository_ids_are_accepted_without_asking_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_of(model) is None
    check_model(model)


def test_a_folder_without_a_config_is_refused_before_it_is_read(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        check_model(tmp_path)
    (tmp_path / "config.json").touch()
    check_model(tmp_path)


@pytest.mark.parametrize("what", ["the file", "the folder"])
@pytest.mark.parametrize("check", [check_model, Checkpoint.open])
def test_a_gguf_model_is_refused_with_a_hint_how_to_convert_it(tmp_path: Path, what, check):
    file = tmp_path / "tiny-q4.gguf"
    file.touch()
    with pytest.raises(CheckpointError, match=r"has its weights in tiny-q4\.gguf, and only model\.safeten") as refused:
        check(file if what == "the file" else tmp_path)
    hint = refused.value.hint or ""
    assert f"from_pretrained({str(tmp_path)!r}, gguf_file='tiny-q4.gguf', quantization_config" in hint
    assert hint.count("save_pretrained(FOLDER)") == 2
