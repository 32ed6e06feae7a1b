"""Speeds as people read them."""

from __future__ import annotations

import pytest

from shoal.cli.rates import figure, tokens_per_second


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (98765.4, "98,765 tokens/s"),
        (770.2, "770 tokens/s"),
        (99.96, "100 tokens/s"),
        (14.14, "14.1 tokens/s"),
        (2.0, "2 tokens/s"),
        (0.333, "0.333 tokens/s"),
        (0.0123, "0.0123 tokens/s"),
    ],
)
def test_a_rate_has_three_digits_that_say_something(rate, text):
    assert tokens_per_second(rate) == text


def test_what_was_not_measured_is_no_rate():
    assert figure(None) == "…"
    assert figure(0.0) == "…"
    assert tokens_per_second(None) == "not measured"
