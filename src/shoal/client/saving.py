"""What a distributed model writes to a folder: the trained parameters, in a form that cannot be taken for a model.

The file has the name under which `Trainer` looks for a checkpoint's weights, so that `Trainer` can resume from it and
load the best one. No config is written beside it, so that nothing loads it as a model and makes up the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoal.errors import CheckpointError, UnsupportedOperation, UserError
from shoal.model.copying import NotPicklable
from shoal.model.weights.location import CONFIG, SINGLE_FILE

Versions = Mapping[str, tuple[tuple[int, ...], int]]


def versions_of(model: nn.Module) -> Versions:
    """The shapes and versions of all parameters. It differs once a parameter is changed in place or replaced."""
    return {name: (tuple(own.shape), own._version) for name, own in model.named_parameters()}


def save_trained(
    model: nn.Module, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None, as_opened: Versions
) -> None:
    """Write the trainable parameters of a model to a folder, for `load_trained`.

    Raises `UnsupportedOperation` if nothing was trained: all parameters are frozen, or none is and all are `as_opened`.
    Raises `UserError` for a folder that holds a model.
    """
    names = {name: own.requires_grad for name, own in model.named_parameters()}
    trained = [name for name, trains in names.items() if trains]
    if not trained or (len(trained) == len(names) and versions_of(model) == as_opened):
        raise UnsupportedOperation(
            "a distributed model cannot be saved as a whole: its blocks are on servers",
            hint="save what you train: get_peft_model(model, ...) saves a PEFT folder, and with tuning_mode=, or "
            "after model.requires_grad_(False) of the rest, save_pretrained writes the trainable parameters",
        )
    tensors = model.state_dict() if state_dict is None else state_dict
    if not (written := [name for name in trained if name in tensors]):
        raise UserError("this state_dict has none of the model's trainable parameters")
    path = Path(folder)
    if (path / CONFIG).exists():
        raise UserError(
            f"{path} holds a model: its weights are not overwritten with the parts that are trained",
            hint="name another folder",
        )
    path.mkdir(parents=True, exist_ok=True)
    origin = str(getattr(model, "name_or_path", ""))
    save_file(
        {name: tensors[name].detach().contiguous().clone() for name in written},
        path / SINGLE_FILE,
        metadata={"format": "pt", "shoal": "trained parameters only, not a model", "base_model": origin},
    )


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Load what `save_trained` wrote into a model that was opened in the same way.

    Raises `CheckpointError` if the folder has no such file, or a parameter that the model has not.
    """
    path = Path(folder) / SINGLE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {SINGLE_FILE}", hint="name a folder that save_pretrained wrote")
    found: dict[str, Tensor] = load_file(path)
    places: dict[str, Any] = dict(model.named_parameters())
    for name, tensor in found.items():
        if name not in places or places[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path} does not fit: the model has no {name} of shape {list(tensor.shape)}",
                hint="open the model as it was opened for training: tuning_mode, pre_seq_len, num_labels",
            )
    model.load_state_dict(found, strict=False)


class SavesTrained(NotPicklable):
    """Mixed into a distributed model's class: `save_pretrained` writes what was trained."""

    _as_opened: Versions

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = super().__deepcopy__(memo)
        other._as_opened = versions_of(other) if versions_of(self) == self._as_opened else {}  # type: ignore[arg-type]
        return other

    def save_pretrained(
        self: Any,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the trained parameters, or, after `model.add_adapter`, the adapters as PEFT does.

        `load_trained` loads the parameters into a model that was opened in the same way. Raises `UnsupportedOperation`
        if nothing was trained, because the blocks are on servers, and `UserError` for a folder that holds a model.
        """
        if push_to_hub:
            raise UserError("save_pretrained writes a folder here", hint="upload it: hf upload REPOSITORY FOLDER")
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)  # type: ignore[misc]
        elif is_main_process:
            save_trained(self, save_directory, state_dict=state_dict, as_opened=self._as_opened)

    def load_trained(self: Any, folder: str | Path) -> None:
        """Load what `save_pretrained` wrote. Raises `CheckpointError` if it does not fit this model."""
        load_trained(self, folder)
