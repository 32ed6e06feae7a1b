"""This machine: its processor, cores, memory and drivers."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model of this machine's processor, or at least its architecture."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text(errors="replace").splitlines()]
    except OSError:
        lines = []
    names = [value.strip() for key, _, value in lines if key.strip() in ("model name", "Model", "Hardware")]
    return names[0] if names else platform.processor() or platform.machine()


def available_memory() -> int:
    """The bytes of memory that the system can provide without swapping."""
    return int(psutil.virtual_memory().available)


def may_have_gpu() -> bool:
    """Whether a driver for GPUs that PyTorch could use is loaded: NVIDIA's, or that of WSL."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_host() -> str:
    """Processor, cores that this process may use, and memory, for the tables of measurements."""
    return f"{processor_name()}, {usable_cores()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
