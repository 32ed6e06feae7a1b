"""What other libraries say about matters that do not concern a user of shoal."""

from __future__ import annotations

import logging

import pytest

import shoal


def test_bitsandbytes_does_not_complain_about_a_kernel_that_it_can_do_without(caplog: pytest.LogCaptureFixture):
    assert shoal.__all__  # importing it is enough
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING, logger=log.name):
        log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
        log.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]
