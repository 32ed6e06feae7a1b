"""Where a model is: in a local folder or in a repository on the hub.

This module imports nothing slow, so that a mistyped path is refused before PyTorch is imported and the hub is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from shoal.errors import CheckpointError, UserError

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GGUF = ".gguf"
_PATH_BEGINNINGS = ("/", "./", "../", "~")
_HUB_ID = re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)


def is_path(model: str | Path) -> bool:
    """Whether this can only be a path on this machine, whether or not the path exists."""
    return isinstance(model, Path) or model in (".", "..") or model.startswith(_PATH_BEGINNINGS)


def folder_of(model: str | Path) -> Path | None:
    """The local folder that `model` names; None if it names a repository on the hub.

    Raises `UserError` for a file, for a path without a folder, and for a text that cannot be the id of a repository.
    """
    try:
        folder = Path(model).expanduser()
    except RuntimeError:  # "~name" of a user that does not exist
        folder = Path(model)
    if str(model) and folder.is_dir():
        return folder
    if str(model) and folder.exists():
        if folder.suffix == GGUF:
            raise unreadable_weights(folder.name, folder.name, place=folder.parent)
        raise UserError(f"{model} is a file", hint="name the folder of the model's files")
    if is_path(model):
        raise UserError(f"there is no folder {model}", hint="check the path; a model on the hub is named OWNER/NAME")
    if not _HUB_ID.fullmatch(str(model)):
        raise UserError(
            f"{str(model)!r} is neither a folder nor the id of a model on the hub",
            hint="check the path; a model on the hub is named OWNER/NAME",
        )
    return None


def check_model(model: str | Path) -> None:
    """Check what can be checked on this machine without reading the model. Raises `UserError` or `CheckpointError`."""
    folder = folder_of(model)
    if folder is not None and not (folder / CONFIG).is_file():
        raise missing_config(model, sorted(path.name for path in folder.iterdir()))


def check_on_hub(model: str, *, revision: str | None) -> None:
    """Ask the hub for a model that is in no folder and was never downloaded. Raises `UserError` if it has none."""
    if folder_of(model) is None:
        from shoal.model.weights.hub import check_repository  # here, because it takes longer than all of `--help`

        check_repository(model, revision=revision)


def missing_config(model: str | Path, files: Iterable[str]) -> CheckpointError:
    """The error for a model with these files, none of which is a config."""
    gguf = next((file for file in files if file.endswith(GGUF)), None)
    if gguf is not None:
        return unreadable_weights(str(model), gguf, place=model)
    return CheckpointError(f"{model} has no {CONFIG}", hint="is it the folder or the id of a Transformers model?")


def unreadable_weights(name: str, file: str, *, place: str | Path) -> CheckpointError:
    """The error for a model whose weights are in a file of an unsupported format. Its hint says how to convert them.

    `place` is the folder or the id on the hub, as Transformers takes it.
    """
    hint = "convert them: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER), if you trust it"
    if file.endswith(GGUF):
        hint = (
            f"convert it once, after `pip install gguf`: AutoModelForCausalLM.from_pretrained({str(place)!r}, "
            f"gguf_file={file!r}, quantization_config=GgufConfig(dequantize=True), dtype='bfloat16')"
            f".save_pretrained(FOLDER), and AutoTokenizer.from_pretrained({str(place)!r}, gguf_file={file!r})"
            ".save_pretrained(FOLDER); or name the model that it was made from"
        )
    return CheckpointError(f"{name} has its weights in {file}, and only {SINGLE_FILE} (or {INDEX}) is read", hint=hint)
