"""Modules that are copied within their process only: what they are connected to, no file can hold."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, Self

from shoal.errors import UnsupportedOperation


class NotPickled:
    """Mixed into a distributed model and its parts. They can be copied, and say clearly that they cannot be pickled."""

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise UnsupportedOperation(
            f"{type(self).__name__} cannot be pickled: its blocks are on servers",
            hint="save what you train (save_pretrained, or torch.save(model.state_dict())), and open the model anew "
            "with from_pretrained in each process",
        )

    def _state(self) -> dict[str, Any]:
        # Without what `compile()` has made of the original: it would be called in place of the copy.
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
