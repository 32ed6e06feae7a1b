"""`shoal doctor` on a machine of a scene: what it says is compared with words as a user would read them.

The words are rows of the printed table, with what to do under a row that has it. `#` is any number, `...` any text,
and `any` is any sign:

    clock      ok    within # s of that of one member
    reached    note  other machines reach this one through 1 relay
                     direct is faster: open the port in the router and --announce it, if you can
"""

from __future__ import annotations

import json
import re
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal.cli.doctor import SIGNS
from shoal.cli.doctor.diagnosis import Health
from shoal.host.processes import Process

VISIT_SECONDS = 120.0
"""How long a visit is waited for: much longer than it may take on a machine that does nothing else."""
_PROBLEM = SIGNS[Health.PROBLEM]
_ANY = "any"
_ROW = re.compile(rf"(\S+) +({'|'.join([*SIGNS.values(), _ANY])}) +(.+)", re.DOTALL)
_WILD = {"#": r"[\d.e+-]+", "...": r".*"}

Row = tuple[str, str, str]
"""The subject of a finding, its sign, and its text with what to do."""


class Visit:
    """A run of `shoal doctor`, which goes on beside the scene. `seconds` are what it took, once `report` has returned.

    It is a process on `host`, whose output nothing else reads.
    """

    def __init__(self, host: str, process: Process, log: Path) -> None:
        self.host = host
        self.seconds = 0.0
        self._process = process
        self._log = log
        self._printed = ""
        self._began = time.monotonic()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def wrong(self, says: str) -> str | None:
        """What is wrong with it, in one line, when it has ended: it did not say just this; `None` if nothing is.

        Each row of these words has to be there. Rows of which they say nothing must not be problems. The exit status is
        1 if there are problems, and else 0.
        """
        self._reading.join(VISIT_SECONDS)
        if self._reading.is_alive():
            return f"it does not end: {self._log.read_text()[-500:]}"
        status, found, wanted = self._process.wait(VISIT_SECONDS), rows_of(self._printed), [*rows_in(says)]
        unsaid = [row for row in wanted if not any(_matches(row, each) for each in found)]
        new = [each for each in found if each[1] == _PROBLEM and not any(_matches(row, each) for row in wanted)]
        if status != any(sign == _PROBLEM for _, sign, _ in found):
            return f"its status is {status}: {self._printed or self._log.read_text()[-500:]}"
        if unsaid or new:
            return f"it does not say {unsaid}; it says {found}"
        return None

    def _read(self) -> None:
        assert self._process.stdout is not None
        self._printed = self._process.stdout.read()
        self.seconds = time.monotonic() - self._began


def rows_of(printed: str) -> list[Row]:
    """What `shoal doctor` printed, as a table or in JSON."""
    if not printed.startswith("{"):
        return [*rows_in(printed)]
    found = json.loads(printed)["findings"]
    return [(each["subject"], SIGNS[each["health"]], f"{each['text']} {each['hint']}".strip()) for each in found]


def rows_in(table: str) -> Iterator[Row]:
    """The rows of a table. What is indented belongs to the row above."""
    for row in re.split(r"\n(?=\S)", textwrap.dedent(table).strip()):
        found = _ROW.fullmatch(row)
        if found is not None:
            subject, sign, text = found.groups()
            yield subject, sign, " ".join(text.split())


def _matches(wanted: Row, found: Row) -> bool:
    pattern = "".join(_WILD.get(part, re.escape(part)) for part in re.split(r"(#|\.\.\.)", wanted[2]))
    return wanted[0] == found[0] and wanted[1] in (found[1], _ANY) and re.fullmatch(pattern, found[2]) is not None


def seconds_of(visits: Sequence[Visit]) -> str:
    """How long each visit took, for a table."""
    return ", ".join(f"{visit.host} {visit.seconds:.0f} s" for visit in visits) or "-"
