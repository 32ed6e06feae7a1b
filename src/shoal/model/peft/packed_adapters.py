"""One pass for tokens of several clients, each with its own adapter.

The weights of a block are multiplied by all tokens at once. Only what an adapter adds is computed for its own rows.
"""

# B sequences, T tokens, D hidden size, N rows of the pass

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shoal.model.module_view import with_input_change, with_submodules
from shoal.model.peft.block_adapters import BlockAdapter, add_prompt


@dataclass(frozen=True)
class AdapterRows:
    """The rows of a packed pass that belong to one client.

    They hold the tokens from `position` on of `num_sequences` sequences, one sequence after the other.
    """

    rows: slice
    num_sequences: int
    position: int
    adapter: BlockAdapter


def with_row_adapters(block: nn.Module, parts: Sequence[AdapterRows], *, num_rows: int) -> nn.Module:
    """A copy of a block that computes N tokens in a row, with each client's adapter on its own rows.

    The tokens may be one sequence [1, N, D] or a batch [G, T, D], of which the rows are counted one after another.
    """
    paths = dict.fromkeys(path for part in parts for path in part.adapter.layers)
    layers = {path: _RowAdapters(block.get_submodule(path), _layers_at(path, parts), num_rows) for path in paths}
    view = with_submodules(block, layers)
    prompted = [
        part for part in parts if part.adapter.prompt_PD is not None and part.position < len(part.adapter.prompt_PD)
    ]
    return with_input_change(view, lambda hidden: _with_prompts(hidden, prompted)) if prompted else view


def _layers_at(path: str, parts: Sequence[AdapterRows]) -> list[tuple[slice, nn.Module]]:
    return [(part.rows, part.adapter.layers[path]) for part in parts if path in part.adapter.layers]


def _with_prompts(hidden: Tensor, parts: Sequence[AdapterRows]) -> Tensor:
    hidden_ND = hidden.flatten(0, -2).clone()
    for part in parts:
        assert part.adapter.prompt_PD is not None
        own_ND = hidden_ND[part.rows]
        own_BTD = own_ND.view(part.num_sequences, -1, own_ND.shape[-1])
        hidden_ND[part.rows] = add_prompt(own_BTD, part.adapter.prompt_PD, part.position).view(own_ND.shape)
    return hidden_ND.view(hidden.shape)


class _LinearReplacement(nn.Module):
    """Replaces a linear layer. PEFT and some routers read its weight, which is that of the original layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.__dict__["_base"] = base  # not registered as a submodule, because all clients use it

    @property
    def weight(self) -> Any:
        return self.__dict__["_base"].weight

    @property
    def bias(self) -> Any:
        return self.__dict__["_base"].bias


class _RowAdapters(_LinearReplacement):
    """A linear layer for N rows [..., inputs] of several clients: one product, then each client's PEFT layer."""

    def __init__(self, base: nn.Module, layers: Sequence[tuple[slice, nn.Module]], num_rows: int) -> None:
        super().__init__(base)
        self._layers = layers
        self._num_rows = num_rows

    def forward(self, x: Tensor) -> Tensor:
        rows_of_x = x.flatten(0, -2)
        if len(rows_of_x) != self._num_rows:
            raise ValueError(
                f"the pass has {self._num_rows} rows, but this layer got {len(rows_of_x)}: their adapters are unknown"
            )
        base: nn.Module = self.__dict__["_base"]
        result: Tensor = base(x)
        rows_of_result = result.flatten(0, -2)  # a view: products are contiguous
        for rows, layer in self._layers:
            if not getattr(layer, "is_feedforward", False):  # a feedforward IA3 layer changes the input of the product
                layer = with_submodules(layer, {"base_layer": _KnownOutput(base, rows_of_result[rows])})
            rows_of_result[rows] = layer(rows_of_x[rows])
        return rows_of_result.view(result.shape)


class _KnownOutput(_LinearReplacement):
    """A linear layer whose output has been computed already."""

    def __init__(self, base: nn.Module, output: Tensor) -> None:
        super().__init__(base)
        self.__dict__["_output"] = output

    def forward(self, _: Tensor) -> Tensor:
        output: Tensor = self.__dict__["_output"]
        return output
