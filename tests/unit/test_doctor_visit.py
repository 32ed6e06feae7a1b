"""How what `shoal doctor` prints is compared with the words of a scene."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.net.doctor_visit import Visit, rows_in, rows_of

PRINTED = """processor  ok       2 cores
clock      ok       within 0.1 s of that of one member
reached    problem  other machines cannot dial this one (1 peer tried), and
                    there is no relay for it
                    open TCP port 4001 in the router
"""
CLOCK = "    clock    ok       within # s of that of one member\n"
REACHED = """
    reached  problem  other machines cannot dial this one ..., and there is no relay for it
                      open TCP port # in the router
"""


def wrong(printed: str, says: str, *, status: int, tmp_path: Path) -> str | None:
    command = [sys.executable, "-c", "import sys; print(sys.argv[1], end=''); sys.exit(int(sys.argv[2]))"]
    with subprocess.Popen([*command, printed, str(status)], stdout=subprocess.PIPE, text=True) as process:
        log = tmp_path / "log"
        log.write_text("its log")
        return Visit("host", process, log).wrong(says)


def test_rows_are_the_same_of_a_table_and_of_json():
    row = ("reached", "problem", "nothing comes through open the port")
    assert [
        *rows_in("reached  problem  nothing comes\n                  through\n                  open the port")
    ] == [row]
    finding = {"subject": "reached", "health": "problem", "text": "nothing comes through", "hint": "open the port"}
    assert rows_of(json.dumps({"findings": [finding]})) == [row]


@pytest.mark.parametrize(
    ("says", "status", "complaint"),
    [
        (CLOCK + REACHED, 1, None),
        (REACHED.replace("problem", "any"), 1, None),
        (CLOCK, 1, "it does not say []"),
        (CLOCK.replace("one member", "2 members") + REACHED, 1, "2 members"),
        (CLOCK.replace("ok ", "note ") + REACHED, 1, "it does not say [('clock', 'note'"),
        (CLOCK + REACHED.replace("router", "firewall"), 1, "firewall"),
        (CLOCK + REACHED, 0, "its status is 0"),
    ],
)
def test_all_words_are_there_and_no_other_problem(says, status, complaint, tmp_path):
    found = wrong(PRINTED, says, status=status, tmp_path=tmp_path)
    if complaint is None:
        assert found is None
    else:
        assert found is not None
        assert complaint in found


def test_a_visit_that_printed_nothing_shows_its_log(tmp_path):
    assert wrong("", CLOCK, status=1, tmp_path=tmp_path) == "its status is 1: its log"
