"""The run on a GPU (`scripts/gpu`): what fails is in its table, and what a machine lacks is carried there."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.gpu.rows import ROWS, Figure, Setting, compared, measure
from benchmarks.gpu.run import Outcome, measured, report
from benchmarks.gpu.wheels import needed

NOWHERE = Setting("/nowhere", "/ip4/127.0.0.1/tcp/1/p2p/A", "cpu", tiny=True)


def test_a_row_that_fails_says_why(capfd: pytest.CaptureFixture[str]):
    said = measure("step", NOWHERE)
    assert "figures" not in said
    assert "/nowhere" in said["failure"]
    assert "Traceback" in capfd.readouterr().err


def test_a_row_without_time_is_not_begun():
    assert measured("step", NOWHERE, seconds=1.0).failure == "no time was left"


def test_the_table_has_the_figures_and_the_failures_and_names_the_trial():
    figure = compared("decoding", "tok/s", [(9.0, 10.0), (8.0, 10.0), (9.5, 10.0)], at_least=0.9)
    assert figure == Figure("decoding", "tok/s", 9.0, 10.0, 0.9, "≥ 0.9", met=True)
    outcomes = [Outcome("decode-1", 3.0, (asdict(figure),)), Outcome("lora", 80.0, failure="not done after 80 s")]
    text = report("5 passed", outcomes, "the bits", "", Namespace(device="cpu", tiny=True), 100.0)
    assert "these figures say nothing" in text
    assert "| decoding | 9 | 10 | tok/s | **0.90** | ≥ 0.9 | met |" in text
    assert "| lora | | | | | ≥ 0.85 | failed: not done after 80 s |" in text
    assert "5 passed" in text
    assert "the bits" in text


def test_all_rows_fit_into_the_time_of_the_run():
    assert sum(row.seconds for row in ROWS.values()) <= 460


def test_what_is_carried_is_all_that_is_needed_beside_pytorch():
    packages = needed()
    assert packages.keys() >= {"shoal", "hivemind", "transformers", "peft", "pytest"}
    assert not packages.keys() & {"torch", "numpy", "bitsandbytes", "triton"}
    assert (Path(__file__).parents[2] / "scripts" / "gpu").stat().st_mode & 0o100
