"""What a server takes on where its config does not say."""

from __future__ import annotations

import pytest
import torch

from shoal.errors import UserError
from shoal.server.capacity import choose_device, default_device, most_blocks
from shoal.server.config import ServerConfig


def test_a_server_computes_on_the_gpu_if_there_is_one():
    assert default_device(cuda=True) == "cuda"
    assert default_device(cuda=False) == "cpu"


def test_a_device_that_the_config_names_is_used_or_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="finds no device 'cuda' on this machine"):
        choose_device("cuda")


def test_a_server_may_hold_as_many_blocks_as_fit_or_as_its_options_say():
    sizes = [100] * 20
    assert most_blocks(ServerConfig("m"), sizes, memory=1000) == 8
    assert most_blocks(ServerConfig("m"), sizes, memory=100_000) == 20
    assert most_blocks(ServerConfig("m", num_blocks=3), sizes, memory=1000) == 3
    assert most_blocks(ServerConfig("m"), sizes, memory=50) == 0
