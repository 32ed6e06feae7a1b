"""A description of the machine, for results."""

from __future__ import annotations

import platform

import torch
import transformers

from shoal.host.computer import describe_host


def describe_machine() -> str:
    """One line: processor, cores, memory, versions."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{describe_host()}; {versions}"
