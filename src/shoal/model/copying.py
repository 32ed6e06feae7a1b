"""Modules that can be copied within their process but not pickled, because they hold connections."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, Self

from shoal.errors import UnsupportedOperation


class NotPicklable:
    """Mixed into a distributed model and its parts: they can be copied, and pickling raises `UnsupportedOperation`."""

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise UnsupportedOperation(
            f"{type(self).__name__} cannot be pickled: its blocks are on servers",
            hint="save what you train (save_pretrained, or torch.save(model.state_dict())), and open the model anew "
            "with from_pretrained in each process",
        )

    def _state(self) -> dict[str, Any]:
        # The compiled forward of the original is left out: it would be called instead of the copy's own.
        return {name: value for name, value in self.__dict__.items() if name != "_compiled_call_impl"}

    def __copy__(self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self._state())
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self._state(), memo))
        return other
