"""Importing what is large in less time: PyTorch, Transformers and PEFT."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def large_imports() -> Iterator[None]:
    """While it lasts, no garbage is looked for, and what is there in the end is never looked at again.

    Imports make half a million objects and hardly any garbage. To look for it takes a quarter of their time, and 0.3
    seconds each time afterwards. It is for programs, not for libraries: what is garbage in the end is kept.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
