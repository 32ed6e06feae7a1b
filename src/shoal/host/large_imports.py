"""Importing what is large: in less time, and without native code that these libraries would fetch from a hub."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, MutableMapping
from types import ModuleType

HUB_KERNELS = "USE_HUB_KERNELS"
"""Transformers' environment variable for native code from the hub. Here its default is no."""
YES = frozenset({"1", "ON", "YES", "TRUE"})


def forbid_hub_kernels(environment: MutableMapping[str, str], modules: MutableMapping[str, ModuleType | None]) -> None:
    """Let no library load native code from the Hugging Face hub, unless the user asks for it in the environment.

    Where the package `kernels` is installed, bitsandbytes downloads a library and runs it when it is imported, and
    Transformers does so for some families, in some quantizations, and for what a model's config names as attention. No
    option of theirs stops all of that, so the package counts as missing: among the loaded `modules` it is None. One
    that the program has imported already is left to the program.
    """
    if environment.setdefault(HUB_KERNELS, "NO").upper() not in YES:
        modules.setdefault("kernels", None)


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
