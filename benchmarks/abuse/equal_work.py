"""A process that computes as much as an attacker did, for nobody: `python -m benchmarks.abuse.equal_work PART`.

Attackers share the cores with the servers and the client. What the client has beside this process is what it would have
beside an attacker that harms by nothing but that. PART is the part of a core that it takes, at most 1.
"""

from __future__ import annotations

import os
import sys
import time

from benchmarks.abuse.attacker import NICENESS
from shoal.cli.service.long_running import end_with_parent

PERIOD_SECONDS = 0.02


def main() -> None:
    part = float(sys.argv[1])
    end_with_parent()
    os.nice(NICENESS)
    while True:
        began, used = time.perf_counter(), time.process_time()
        while time.process_time() - used < part * PERIOD_SECONDS:
            pass
        time.sleep(max(0.0, began + PERIOD_SECONDS - time.perf_counter()))


if __name__ == "__main__":
    main()
