from __future__ import annotations

import pytest

from shoal.client.config import CHOOSERS, ClientConfig
from shoal.errors import UserError
from shoal.spans import Span


def test_pins_are_spans_and_peers_in_the_order_of_the_blocks():
    config = ClientConfig.choosing(None, None, pinned={"4:8": "B", "0:4": "A"})
    assert config.pinned == ((Span(0, 4), "A"), (Span(4, 8), "B"))


def test_what_is_no_span_cannot_be_pinned():
    with pytest.raises(UserError, match="not a span of blocks: 'first'") as error:
        ClientConfig.choosing(None, None, pinned={"first": "A"})
    assert "0:4" in str(error.value.hint)


def test_a_block_is_pinned_to_one_peer_only():
    with pytest.raises(UserError, match="blocks 0:5 and 4:8 overlap"):
        ClientConfig.choosing(None, None, pinned={"0:5": "A", "4:8": "B"})
    assert len(ClientConfig.choosing(None, None, pinned={"0:5": "A", "4:8": "A"}).pinned) == 2


def test_a_chooser_that_is_not_there_is_named_with_those_that_are():
    assert [ClientConfig.choosing(None, None, chooser=each).chooser for each in CHOOSERS] == ["shortest", "nsga2"]
    with pytest.raises(UserError, match="'luck'") as error:
        ClientConfig.choosing(None, None, chooser="luck")
    assert error.value.hint == "use one of shortest, nsga2"
