"""What `shoal gateway` makes of its options."""

from __future__ import annotations

import pytest

from shoal.cli.gateway import GatewayAdapter, adapter_of
from shoal.cli.terminal.console import WrongUsage


@pytest.mark.parametrize(
    ("given", "models", "expected"),
    [
        ("someone/tales", ["llama"], GatewayAdapter("llama", "tales", "someone/tales")),
        ("/data/tales/", ["org/llama"], GatewayAdapter("org/llama", "tales", "/data/tales/")),
        ("fox=someone/tales", ["llama"], GatewayAdapter("llama", "fox", "someone/tales")),
        ("qwen:fox=/data/a=b", ["llama", "qwen"], GatewayAdapter("qwen", "fox", "/data/a=b")),
    ],
)
def test_an_adapter_has_a_name_and_a_model(given: str, models: list[str], expected: GatewayAdapter):
    assert adapter_of(given, models) == expected


@pytest.mark.parametrize(
    ("given", "models", "message"),
    [
        ("someone/tales", ["llama", "qwen"], "which model"),
        ("other:fox=someone/tales", ["llama"], "not an adapter of a model"),
        ("=someone/tales", ["llama"], "not an adapter of a model"),
        ("fox=", ["llama"], "not an adapter of a model"),
    ],
)
def test_an_adapter_of_no_model_is_refused(given: str, models: list[str], message: str):
    with pytest.raises(WrongUsage, match=message) as refused:
        adapter_of(given, models)
    assert refused.value.hint is not None
    assert "--adapter llama:" in refused.value.hint
