"""How far the loading of blocks is: Transformers tells it by a progress bar, which is heard here and not drawn."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from transformers.utils.logging import set_tqdm_hook

from shoal.model.families import Family

WEIGHTS = "Loading weights"
"""How Transformers names the bar that advances with each weight."""


@contextlib.contextmanager
def hearing(family: Family, heard: Callable[[int], None]) -> Iterator[None]:
    """While this is entered, `heard` is called with a block's number before each of its weights is loaded.

    It is called on this thread, for what this thread loads, and may raise: then the loading ends there.
    """
    thread = threading.get_ident()

    def hook(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if threading.get_ident() == thread and options.get("desc") == WEIGHTS and arguments:
            weights, *others = arguments
            return factory(_telling(family, weights, heard), *others, total=len(weights), **options)
        return factory(*arguments, **options)

    former = set_tqdm_hook(hook)
    try:
        yield
    finally:
        set_tqdm_hook(former)


def _telling(family: Family, weights: Iterable[tuple[str, Any]], heard: Callable[[int], None]) -> Iterator[Any]:
    for name, weight in weights:
        block = family.block_of(name)
        if block is not None:
            heard(block)
        yield name, weight
