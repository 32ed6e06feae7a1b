"""Lets a command show parameters that its function does not list: those of another command, or of a group."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def with_options_of(
    other: Callable[..., None], *, without: Sequence[str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command also the parameters of another one, but for some; it takes them as `**values`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            each
            for each in inspect.signature(command, eval_str=True).parameters.values()
            if each.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        taken = {each.name for each in own} | set(without)
        others = [
            each for name, each in inspect.signature(other, eval_str=True).parameters.items() if name not in taken
        ]

        @functools.wraps(command)
        def wrapped(**values: Any) -> None:
            command(**values)

        return with_parameters(wrapped, [*own, *others])

    return decorate


def with_parameters(command: Callable[..., None], given: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """Let a function that takes keywords show these parameters."""
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in given]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
