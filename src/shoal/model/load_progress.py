"""Progress of loading blocks, taken from Transformers' progress bar over the weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from transformers.utils.logging import set_tqdm_hook

from shoal.model.families import Family

WEIGHTS = "Loading weights"
"""The description of the bar that advances with each weight."""


@contextlib.contextmanager
def reporting_blocks(family: Family, report: Callable[[int], None]) -> Iterator[None]:
    """In this context, call `report` with the number of a block before each weight of the block is loaded.

    It is called in the current thread, for what this thread loads. An exception from it ends the loading.
    """
    thread = threading.get_ident()

    def hook(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if threading.get_ident() == thread and options.get("desc") == WEIGHTS and arguments:
            weights, *others = arguments
            return factory(_reported(family, weights, report), *others, total=len(weights), **options)
        return factory(*arguments, **options)

    former = set_tqdm_hook(hook)
    try:
        yield
    finally:
        set_tqdm_hook(former)


def _reported(family: Family, weights: Iterable[tuple[str, Any]], report: Callable[[int], None]) -> Iterator[Any]:
    for name, weight in weights:
        block = family.block_of(name)
        if block is not None:
            report(block)
        yield name, weight
