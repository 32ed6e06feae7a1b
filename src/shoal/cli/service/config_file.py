"""`--config FILE`: the options of a command from a TOML file. Those of the command line override it.

A key is the long name of an option, with `-` or `_`: `initial-peers = ["/ip4/..."]`, `move = false`. The argument of
the command, MODEL or CODE, is the key `model` or `code`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import stat
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any

import typer

from shoal.cli.terminal.console import WrongUsage, stderr
from shoal.cli.terminal.shown_parameters import with_parameters
from shoal.errors import UserError
from shoal.joining.invite_code import is_code

SECRETS = {"api-key"}
"""The keys whose values other users of the machine should not read, beside invite codes."""
SHORTEST_SHOWN = 3
"""Characters of a value by which an error is known to be about it. Shorter ones occur in any text: only in quotes."""
CERTAIN = 1 << 30
"""How surely an error is about a value that it quotes, or whose option it names."""


@dataclass(frozen=True)
class ConfigFile:
    """What a file says: the values of the command's parameters, by their names, and the key of each in the file."""

    path: Path
    values: Mapping[str, Any]
    keys: Mapping[str, str]

    def blamed(self, error: UserError, used: Mapping[str, Any]) -> UserError:
        """The error with the name of the file, if it is about a value that stands there and was not overridden.

        `used` is what the command was called with.
        """
        sure = {
            key: _surely_about(error, key, self.values[name])
            for name, key in self.keys.items()
            if used.get(name) == self.values[name]
        }
        best = max(sure.values(), default=0)
        found = [key for key, each in sure.items() if each == best > 0]
        if len(found) != 1:  # an error with the wrong key would mislead
            return error
        return type(error)(f"{self.path}: {found[0]}: {error}", hint=error.hint)


def with_config_file(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option `--config`, which it does not see. Imports nothing slow."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    added = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_Option)

    @functools.wraps(command)
    def wrapped(*, config: ConfigFile | None, **values: Any) -> None:
        try:
            command(**values)
        except UserError as error:
            raise error if config is None else config.blamed(error, values) from None

    return with_parameters(wrapped, [*own, added])


def read_config(path: Path, context: typer.Context) -> ConfigFile:
    """The options in a file, for the command of the context. Raises `WrongUsage` that names the file and the key."""
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
            is_public = bool(stat.S_IROTH & path.stat().st_mode)
    except OSError as failure:
        raise WrongUsage(f"{path} cannot be read: {failure.strerror}", hint="--config FILE takes a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise WrongUsage(
            f"{path} is not TOML: {failure}", hint='a line is KEY = VALUE, such as name = "alpha"'
        ) from None
    parameters = {_key(each): each for each in context.command.params if not getattr(each, "hidden", False)}
    for name in ("config", "help"):
        parameters.pop(name, None)
    values: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for key, given in found.items():
        parameter = parameters.get(key.replace("_", "-"))
        if parameter is None:
            raise WrongUsage(f"{path}: there is no option {key}", hint=_nearest(key, parameters))
        if parameter.name in values:
            raise WrongUsage(f"{path}: {key} stands there twice", hint="it may be written with - or with _")
        values[parameter.name] = _value(parameter, given, (path, key), context)
        keys[parameter.name] = key.replace("_", "-")
    if is_public and (
        secret := next((word for name, key in keys.items() if (word := _secret(key, values[name]))), None)
    ):
        stderr.print(f"all users of this machine can read the {secret} in {path}: chmod o-r {path}", style="yellow")
    return ConfigFile(path, values, keys)


def _read(context: typer.Context, path: Path | None) -> ConfigFile | None:
    if path is None or context.resilient_parsing:
        return None
    config = read_config(path, context)
    context.default_map = {**(context.default_map or {}), **config.values}
    return config


_Option = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,  # the other options have its values for defaults
        callback=_read,
        help="Take options from this TOML file, by their long names. The command line overrides it.",
    ),
]


def _secret(key: str, value: Any) -> str | None:
    """What other users should not read of this value; `None` if they may."""
    if key in SECRETS:
        return key
    values = value if isinstance(value, list | tuple) else [value]
    return "invite code" if key in ("code", "model") and any(map(is_code, values)) else None


def _key(parameter: Any) -> str:
    """What the parameter is called in a file."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name).strip("[.]").lower()
    return str(max(parameter.opts, key=len)).removeprefix("--")


def _value(parameter: Any, given: Any, file_and_key: tuple[Path, str], context: typer.Context) -> Any:
    """A value of the file as the parameter takes it. Raises `WrongUsage`."""
    path, key = file_and_key
    takes_several = parameter.multiple or parameter.nargs == -1
    values = given if takes_several and isinstance(given, list) else [given]
    wanted = _type_of(parameter.type_descriptor.annotation)
    if any(type(each) is not wanted and not (wanted is float and type(each) is int) for each in values):
        word, example = _TYPES[wanted]
        raise WrongUsage(
            f"{path}: {key} takes {word}", hint=f"write it as {key} = {f'[{example}]' if takes_several else example}"
        )
    try:
        return parameter.process_value(context, values if takes_several else given)
    except typer.BadParameter as error:
        raise WrongUsage(
            f"{path}: {key}: {error.message.removeprefix('Value error, ')}", hint=f"{context.command_path} --help"
        ) from None


_TYPES: dict[type, tuple[str, str]] = {
    bool: ("true or false", "true"),
    int: ("a whole number", "8"),
    float: ("a number", "0.5"),
    str: ("text in quotes", '"..."'),
}
"""What a key takes whose option has this type, and an example."""


def _type_of(annotation: Any) -> type:
    """The type that TOML has for values of a parameter: bool, int, float or str."""
    for each in typing.get_args(annotation):
        if each is not NoneType:
            return _type_of(each)
    return annotation if annotation in (bool, int, float) else str


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key.replace("_", "-").removeprefix("no-"), known, n=1)
    return f"is it {near[0]}? the keys are the names of the options" if near else f"there are: {', '.join(known)}"


def _surely_about(error: UserError, key: str, value: Any) -> int:
    """How surely an error is about this value of this key: `CERTAIN`, or the length of the text that it shows, or 0.

    A path may have the name of the server in it, so longer texts count for more.
    """
    text = f"{error} {error.hint or ''}"
    if re.search(rf"--{re.escape(key)}(?![\w-])", text):
        return CERTAIN
    values = value if isinstance(value, list | tuple) else [value]
    shown = [str(each) for each in values if isinstance(each, str | Path)]
    if any(repr(each) in text for each in shown):
        return CERTAIN
    long = [each for each in shown if len(each) >= SHORTEST_SHOWN]
    return max((len(each) for each in long if re.search(rf"(?<!\w){re.escape(each)}(?!\w)", str(error))), default=0)
