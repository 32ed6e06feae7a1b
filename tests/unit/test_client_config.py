from __future__ import annotations

import pytest

from shoal.client.options.client_config import CHOOSERS, chooser_of, pins_of, salt_of
from shoal.errors import UserError
from shoal.spans import Span


def test_pins_are_spans_and_peers_in_the_order_of_the_blocks():
    pinned = pins_of({"4:8": "B", "0:4": "A"})
    assert pinned == ((Span(0, 4), "A"), (Span(4, 8), "B"))


def test_what_is_no_span_cannot_be_pinned():
    with pytest.raises(UserError, match="not a span of blocks: 'first'") as error:
        pins_of({"first": "A"})
    assert "0:4" in str(error.value.hint)


def test_a_block_is_pinned_to_one_peer_only():
    with pytest.raises(UserError, match="blocks 0:5 and 4:8 overlap"):
        pins_of({"0:5": "A", "4:8": "B"})
    assert len(pins_of({"0:5": "A", "4:8": "A"})) == 2


def test_a_chooser_that_is_not_there_is_named_with_those_that_are():
    assert [chooser_of(each) for each in CHOOSERS] == ["shortest", "nsga2"]
    with pytest.raises(UserError, match="'luck'") as error:
        chooser_of("luck")
    assert error.value.hint == "use one of shortest, nsga2"


def test_a_salt_that_could_not_travel_is_refused_before_anybody_is_asked():
    assert salt_of("s" * 256) == "s" * 256
    with pytest.raises(UserError, match="a salt of 257 characters"):
        salt_of("s" * 257)
