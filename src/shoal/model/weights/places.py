"""Where a model is: in a folder here, or in a repository on the hub. Told without importing anything slow.

So a mistyped path is refused at once, and not after PyTorch has been imported and the hub has been asked.
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
    """Whether this can only be a place on this machine, be anything there or not."""
    return isinstance(model, Path) or model in (".", "..") or model.startswith(_PATH_BEGINNINGS)


def folder_of(model: str | Path) -> Path | None:
    """The folder that is meant; None if it is the id of a repository on the hub.

    Raises `UserError` for a file, for a path where no folder is, and for what no repository is called.
    """
    try:
        folder = Path(model).expanduser()
    except RuntimeError:  # of a user who does not exist
        folder = Path(model)
    if str(model) and folder.is_dir():
        return folder
    if str(model) and folder.exists():
        if folder.suffix == GGUF:
            raise not_read(folder.name, folder.name, place=folder.parent)
        raise UserError(f"{model} is a file", hint="name the folder that the model's files are in")
    if is_path(model):
        raise UserError(f"there is no folder {model}", hint="check the path; a model on the hub is named OWNER/NAME")
    if not _HUB_ID.fullmatch(str(model)):
        raise UserError(
            f"{str(model)!r} is neither a folder nor the id of a model on the hub",
            hint="check the path; a model on the hub is named OWNER/NAME",
        )
    return None


def check_model(model: str | Path) -> None:
    """What is wrong with a model that can be seen without reading it. Raises `UserError`, and `CheckpointError`."""
    folder = folder_of(model)
    if folder is not None and not (folder / CONFIG).is_file():
        raise no_config(model, sorted(path.name for path in folder.iterdir()))


def no_config(model: str | Path, files: Iterable[str]) -> CheckpointError:
    """Why a model with these files cannot be opened: it has no config, which is a hint of what it is instead."""
    gguf = next((file for file in files if file.endswith(GGUF)), None)
    if gguf is not None:
        return not_read(str(model), gguf, place=model)
    return CheckpointError(f"{model} has no {CONFIG}", hint="is it the folder or the id of a Transformers model?")


def not_read(name: str, file: str, *, place: str | Path) -> CheckpointError:
    """Why a model, at some place, whose weights are in this file cannot be opened, and how to convert it."""
    hint = "convert them: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER), if you trust it"
    if file.endswith(GGUF):
        hint = (
            f"convert it once, after `pip install gguf`: AutoModelForCausalLM.from_pretrained({str(place)!r}, "
            f"gguf_file={file!r}, quantization_config=GgufConfig(dequantize=True), dtype='bfloat16')"
            f".save_pretrained(FOLDER), and AutoTokenizer.from_pretrained({str(place)!r}, gguf_file={file!r})"
            ".save_pretrained(FOLDER); or name the model that it was made from"
        )
    return CheckpointError(f"{name} has its weights in {file}, and only {SINGLE_FILE} (or {INDEX}) is read", hint=hint)
