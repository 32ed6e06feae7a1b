"""Where `scripts/clients` has put the clients, and how their programs are run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

CLIENTS = Path(sys.prefix) / "clients"
SMOLLM2 = CLIENTS / "smollm2"
"""SmolLM2-135M-Instruct, as a folder that Transformers loads."""
PROGRAMS = Path(__file__).parent / "programs"
SECONDS = 300.0
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What keeps the clients from asking anybody else, and from taking more than a core."""


def run(*command: str | Path, **environment: str) -> str:
    """What a client's command prints. It ends with all of its processes, also if it fails or takes too long."""
    process = subprocess.Popen(
        [str(CLIENTS / "bin" / command[0]), *map(str, command[1:])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE | environment,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{command} failed:\n{output[-3000:]}\n{errors[-6000:]}"
    return output


def asked(program: str, **what: Any) -> Any:
    """What one of the programs beside this file found, of what it is given. Both are JSON."""
    return json.loads(run("python", PROGRAMS / program, json.dumps(what)).splitlines()[-1])
