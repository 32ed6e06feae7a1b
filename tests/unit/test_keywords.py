"""Keywords of Transformers and PETALS are accepted, renamed, or refused with a hint."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.client.options.keywords import DEFAULTS, KEYWORDS, Refused, Renamed, Taken, resolve, similar
from shoal.client.options.model_checks import device_of
from shoal.errors import UserError


@pytest.mark.parametrize("name", sorted(name for name, fate in KEYWORDS.items() if isinstance(fate, Taken)))
def test_a_keyword_that_changes_nothing_is_accepted(name: str):
    assert resolve({name: "anything"}, DEFAULTS) == resolve({}, DEFAULTS)


@pytest.mark.parametrize("name", sorted(name for name, fate in KEYWORDS.items() if isinstance(fate, Refused)))
def test_a_keyword_that_is_not_supported_is_refused_with_a_hint(name: str):
    with pytest.raises(UserError, match=f"no {name}='such'") as error:
        resolve({name: "such"}, DEFAULTS)
    assert error.value.hint
    assert "\n" not in f"{error.value}{error.value.hint}"


@pytest.mark.parametrize("name", sorted(KEYWORDS))
def test_a_value_that_asks_for_nothing_is_accepted(name: str):
    assert resolve({name: None}, DEFAULTS) == resolve({}, DEFAULTS)


@pytest.mark.parametrize(
    ("brought", "own", "value"),
    [
        ({"torch_dtype": "float16"}, "dtype", "float16"),
        ({"torch_dtype": "auto"}, "dtype", "auto"),
        ({"device_map": "cuda"}, "device", "cuda"),
        ({"device_map": "auto"}, "device", "auto"),
        ({"device_map": 1}, "device", "cuda:1"),
        ({"device_map": {"": "cuda:0"}}, "device", "cuda:0"),
        ({"device_map": {"model.embed_tokens": 0, "lm_head": 0}}, "device", "cuda:0"),
        ({"use_auth_token": "hf_x"}, "token", "hf_x"),
        ({"use_auth_token": True}, "token", None),
    ],
    ids=str,
)
def test_a_keyword_with_another_name_is_renamed(brought: dict[str, Any], own: str, value: Any):
    assert resolve(brought, DEFAULTS).own == {**DEFAULTS, own: value}


def test_every_new_name_is_one_of_ours():
    assert {fate.to for fate in KEYWORDS.values() if isinstance(fate, Renamed)} == set(DEFAULTS)


@pytest.mark.parametrize("device_map", [{"a": "cpu", "b": "cuda"}, "disk", {}], ids=str)
def test_a_device_map_of_several_devices_is_refused(device_map: Any):
    with pytest.raises(UserError, match="device_map") as error:
        resolve({"device_map": device_map}, DEFAULTS)
    assert error.value.hint == 'everything except the blocks is on one device: device="cuda"'


def test_two_names_of_one_keyword_have_to_agree():
    assert resolve({"torch_dtype": "float16"}, {**DEFAULTS, "dtype": "float16"}).own["dtype"] == "float16"
    with pytest.raises(UserError, match="torch_dtype='float16', and dtype='float32'") as error:
        resolve({"torch_dtype": "float16"}, {**DEFAULTS, "dtype": "float32"})
    assert error.value.hint == "pass only dtype="


@pytest.mark.parametrize(("name", "value"), [("use_safetensors", False), ("use_server_to_server", False)])
def test_a_fixed_behavior_cannot_be_turned_off(name: str, value: bool):
    assert resolve({name: not value}, DEFAULTS) == resolve({}, DEFAULTS)
    with pytest.raises(UserError, match=f"no {name}=False"):
        resolve({name: value}, DEFAULTS)


def test_a_long_value_does_not_fill_the_screen():
    with pytest.raises(UserError) as error:
        resolve({"state_dict": {"weight": [0] * 1000}}, DEFAULTS)
    assert len(str(error.value)) < 120


def test_other_keywords_change_the_config():
    assert resolve({"num_labels": 3, "show_route": True}, DEFAULTS).config_changes == {"num_labels": 3}


def test_a_keyword_that_is_nearly_right_is_recognized():
    assert similar("initial_peer", ["initial_peers", "dtype"]) == "did you mean initial_peers?"
    assert similar("colour", ["initial_peers", "dtype"]) is None


def test_an_automatic_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        assert (device_of("auto"), device_of("cpu")) == (expected, "cpu")


@pytest.mark.parametrize("device", ["banana", "cuda:77", torch.device("cuda", 77)])
def test_a_device_that_this_machine_does_not_have_is_refused(device):
    with pytest.raises(UserError, match="cannot compute on") as error:
        device_of(device)
    assert error.value.hint is not None
