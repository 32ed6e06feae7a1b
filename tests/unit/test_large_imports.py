"""No garbage is looked for during large imports, and they fetch no native code from the hub."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType

import pytest

from shoal.host.large_imports import HUB_KERNELS, forbid_hub_kernels, large_imports

KERNELS_VERSION = "0.18.2"
"""One that Transformers would use."""
KERNELS = """
import os

class Anything:
    def __init__(self, *_, **__): pass
    def __call__(self, given=None, *_, **__): return given
    def __getattr__(self, name): return Anything()

def get_kernel(name, *_, **__):
    with open(os.environ["FETCHED"], "a") as fetched:
        fetched.write(name + chr(10))
    raise FileNotFoundError(name)

def __getattr__(name):
    return Anything
"""
"""A package `kernels` that notes what it is asked for and has nothing."""
IMPORTS = """
import shoal
import bitsandbytes
from transformers.integrations.hub_kernels import lazy_load_kernel
lazy_load_kernel("mamba-ssm")
from transformers.utils import is_kernels_available
print(is_kernels_available())
"""


class Circle:
    """Garbage, once it is forgotten."""

    def __init__(self) -> None:
        self.itself = self


def test_no_garbage_is_looked_for_until_the_imports_are_done() -> None:
    with large_imports():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_garbage_is_looked_for_after_imports_that_failed() -> None:
    with pytest.raises(ImportError), large_imports():
        raise ImportError
    assert gc.isenabled()


def test_what_was_imported_is_not_looked_at_again_and_other_garbage_is_found() -> None:
    before = gc.get_freeze_count()
    with large_imports():
        imported = [Circle() for _ in range(1000)]
    assert gc.get_freeze_count() >= before + len(imported)
    garbage = Circle()
    is_there = weakref.ref(garbage)
    del garbage
    gc.collect()
    assert is_there() is None


def test_who_looks_for_no_garbage_looks_for_none_afterwards() -> None:
    gc.disable()
    try:
        with large_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("asked", [None, "YES"])
def test_no_library_fetches_native_code_unless_the_user_asks_for_it(asked: str | None, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    about = tmp_path / f"kernels-{KERNELS_VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_VERSION}\n")
    fetched = tmp_path / "fetched"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "FETCHED": str(fetched)}
    environment.pop(HUB_KERNELS, None)
    if asked is not None:
        environment[HUB_KERNELS] = asked
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(asked is not None)]
    assert fetched.exists() == (asked is not None)


def test_kernels_that_the_program_has_imported_already_are_left_to_it() -> None:
    theirs = ModuleType("kernels")
    modules: dict[str, ModuleType | None] = {"kernels": theirs}
    forbid_hub_kernels({}, modules)
    assert modules["kernels"] is theirs
