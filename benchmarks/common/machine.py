"""The machine of a benchmark: a description for results, and what processes compute on it."""

from __future__ import annotations

import contextlib
import platform

import psutil
import torch
import transformers

from shoal.host.computer import describe_host


def describe_machine() -> str:
    """One line: processor, cores, memory, versions."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{describe_host()}; {versions}"


def cpu_seconds(process: psutil.Process) -> float:
    """What a process and those that it started have computed until now."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
    return total
