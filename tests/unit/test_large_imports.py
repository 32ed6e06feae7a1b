"""No garbage is looked for during large imports."""

from __future__ import annotations

import gc
import weakref

import pytest

from shoal.large_imports import large_imports


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
