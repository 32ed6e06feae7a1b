"""Who is blamed by a receipt."""

from __future__ import annotations

import pytest

from shoal.policy.audits.receipt_verdict import ReceiptVerdict, receipt_verdict

V = ReceiptVerdict


@pytest.mark.parametrize(
    ("inputs", "are_pushed", "answered", "pushed", "expected"),
    [
        (True, False, True, None, V.AGREES),
        (True, True, True, True, V.AGREES),
        (True, False, None, None, V.AGREES),  # logits
        (False, False, True, True, V.CONTRADICTS),
        (True, False, False, None, V.CONTRADICTS),
        (None, True, False, None, V.CONTRADICTS),
        (False, True, True, True, V.MISLED),  # by the server before, or it says so
        (True, True, True, False, V.PUSHED_OTHERS),
        (True, True, False, False, V.PUSHED_OTHERS),  # it signs what it pushed for what it answered
        (False, True, True, False, V.PUSHED_OTHERS),
        (None, True, True, False, V.PUSHED_OTHERS),
        (None, True, True, True, V.OPEN),
    ],
)
def test_the_server_is_blamed_that_its_own_signature_contradicts(
    inputs: bool | None, are_pushed: bool, answered: bool | None, pushed: bool | None, expected: ReceiptVerdict
):
    found = receipt_verdict(is_signed=True, inputs=inputs, are_pushed=are_pushed, answered=answered, pushed=pushed)
    assert found is expected


@pytest.mark.parametrize("equal", [None, False, True])
def test_nothing_that_is_not_signed_shuts_a_server_out(equal: bool | None):
    found = receipt_verdict(is_signed=False, inputs=equal, are_pushed=True, answered=equal, pushed=equal)
    assert found is V.FORGED
    assert found.is_fault
    assert not V.PUSHED_OTHERS.is_fault
