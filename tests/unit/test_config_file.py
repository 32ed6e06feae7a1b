"""`--config FILE`: options from a TOML file."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from shoal.cli import LONG_RUNNING, dht, gateway, join, run, serve, up
from shoal.cli.service.config_file import read_config, with_config_file
from shoal.cli.terminal.console import WrongUsage
from shoal.joining.invite_code import InviteCode, Way

ADDRESS = "/ip4/203.0.113.5/tcp/31337/p2p/12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Write a file, and return its path."""

    def write(text: str, *, mode: int = 0o600) -> Path:
        path = tmp_path / "shoal.toml"
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


def called_with(command: Any, *arguments: str) -> dict[str, Any]:
    """What a command is called with."""
    seen: dict[str, Any] = {}
    app = typer.Typer()

    def record(**values: Any) -> None:
        seen.update(values)

    record.__signature__ = inspect.signature(command, eval_str=True)  # type: ignore[attr-defined]
    app.command()(with_config_file(record))
    typer.main.get_command(app).main(list(arguments), prog_name="shoal", standalone_mode=False)
    return seen


def read(command: Any, path: Path) -> Any:
    """The file as the command reads it."""
    app = typer.Typer()
    app.command()(with_config_file(command))
    parsed = typer.main.get_command(app)
    return read_config(path, typer.Context(parsed, info_name="shoal"))


def test_options_come_from_the_file_under_their_long_names(config: Any) -> None:
    path = config(
        f'model = "org/model"\nnew-swarm = true\nnum_blocks = 8\nmove = false\nprefill-share = 0\nport = 31337\n'
        f'dtype = "bfloat16"\nannounce = ["{ADDRESS}", "{ADDRESS}"]\nadapter = "one"\nidentity = "key"\n'
    )
    values = called_with(serve.command, "--config", str(path))
    assert (values["model"], values["new_swarm"], values["num_blocks"], values["move"]) == ("org/model", True, 8, False)
    assert (values["prefill_share"], values["port"], values["dtype"].value) == (0.0, 31337, "bfloat16")
    assert (values["announce"], values["adapter"]) == ([ADDRESS, ADDRESS], ["one"])
    assert values["identity"] == Path("key")
    assert values["training"] is True  # which the file does not say


def test_the_command_line_overrides_the_file(config: Any) -> None:
    path = config('model = "org/model"\nport = 1\nmove = false\nannounce = ["a"]\nname = "file"\n')
    values = called_with(
        serve.command, "other/model", "--port", "2", "--move", "--announce", "b", "--config", str(path)
    )
    assert (values["model"], values["port"], values["move"], values["announce"]) == ("other/model", 2, True, ["b"])
    assert values["name"] == "file"
    path = config('model = "org/model"\nnew-swarm = true\nverbose = true\n')
    values = called_with(serve.command, "--no-new-swarm", "--no-verbose", "--config", str(path))
    assert (values["new_swarm"], values["verbose"]) == (False, False)


@pytest.mark.parametrize(
    ("command", "text", "name", "value"),
    [
        (join.command, 'code = "24G0"', "code", "24G0"),
        (up.command, 'model = "org/model"', "model", "org/model"),
        (gateway.command, 'model = ["a", "b"]', "models", ["a", "b"]),
        (gateway.command, 'model = "a"\napi-key = "k"', "api_key", ["k"]),
        (dht.command, "serve-relay = true", "serve_relay", True),
    ],
)
def test_every_command_that_runs_for_long_takes_a_file(
    command: Any, text: str, name: str, value: Any, config: Any
) -> None:
    assert called_with(command, "--config", str(config(text)))[name] == value


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("prot = 1", "there is no option prot", "is it port?"),
        ("no-move = true", "there is no option no-move", "is it move?"),
        ("initial_pears = []", "there is no option initial_pears", "is it initial-peers?"),
        ("exit-with-stdin = true", "there is no option exit-with-stdin", ""),
        ("config = 'x'", "there is no option config", ""),
        ("[qqqq]", "there is no option qqqq", "there are: model, "),
        ('port = "1"', "port takes a whole number", "port = 8"),
        ("port = true", "port takes a whole number", "port = 8"),
        ("port = 1.5", "port takes a whole number", "port = 8"),
        ("port = 70000", "port: Input should be less than or equal to 65535", "--help"),
        ("port = [1]", "port takes a whole number", "port = 8"),
        ("prefill-share = 'much'", "prefill-share takes a number", "0.5"),
        ("move = 'yes'", "move takes true or false", "move = true"),
        ("name = 1", "name takes text in quotes", 'name = "..."'),
        ("announce = [1]", "announce takes text in quotes", 'announce = ["..."]'),
        ("dtype = 'float8'", "dtype: 'float8' is not one of 'auto', 'float32'", "--help"),
        ("num-blocks = 1\nnum_blocks = 1", "num_blocks stands there twice", "with - or with _"),
        ("port = ", "is not TOML", "KEY = VALUE"),
        ("port = 1\nport = 2", "is not TOML", "KEY = VALUE"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_with_the_key_and_a_hint(
    text: str, message: str, hint: str, config: Any
) -> None:
    path = config(text)
    with pytest.raises(WrongUsage) as caught:
        read(serve.command, path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert hint in str(caught.value.hint)


def test_bytes_that_are_no_text_and_a_file_that_is_not_there_are_wrong_usage(config: Any, tmp_path: Path) -> None:
    path = config("")
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(WrongUsage, match="is not TOML"):
        read(serve.command, path)
    with pytest.raises(WrongUsage, match=r"nowhere.toml cannot be read: No such file"):
        read(serve.command, tmp_path / "nowhere.toml")


def test_an_error_about_a_value_of_the_file_names_the_file(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = config('model = "./nowhere"\nnew-swarm = true\nhost = "localhost"\nzone = "a\\nb"\n')
    for arguments, expected in (
        ([], "zone: not the name of a zone"),
        (["--zone", ""], "host: not an IP address to listen on: 'localhost'"),
        (["--zone", "", "--host", "127.0.0.1"], "model: there is no folder ./nowhere"),
    ):
        assert run(["serve", "--config", str(path), *arguments]) == 2
        assert f"error: {path}: {expected}" in capsys.readouterr().err
    assert run(["serve", "--config", str(path), "--zone", "", "--host", "nohost"]) == 2
    assert "error: not an IP address to listen on: 'nohost'" in capsys.readouterr().err


def test_the_key_whose_value_an_error_shows_is_blamed_and_no_other(
    config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config('name = "alpha"\nmodel = "/nope/alpha"\nnew-swarm = true\n')
    assert run(["serve", "--config", str(path)]) == 2
    assert f"error: {path}: model: there is no folder /nope/alpha\n" in capsys.readouterr().err
    path = config('model = "m"\nnum-blocks = 1\nblocks = "0:4"\nnew-swarm = true\n')  # which of the two is wrong?
    assert run(["serve", "--config", str(path)]) == 2
    assert "error: --blocks and --num-blocks exclude each other\n" in capsys.readouterr().err
    path = config('blocks = "0:4"\n')
    assert run(["serve", "m", "--new-swarm", "--num-blocks", "1", "--config", str(path)]) == 2
    assert f"error: {path}: blocks: --blocks and --num-blocks exclude" in capsys.readouterr().err


@pytest.mark.parametrize("module", LONG_RUNNING, ids=lambda module: module.__name__.rpartition(".")[2])
def test_each_flag_of_a_file_has_a_negative_for_the_command_line(module: Any) -> None:
    app = typer.Typer(add_completion=False)
    app.command()(with_config_file(module.command))
    flags = [each for each in typer.main.get_command(app).params if getattr(each, "is_flag", False) and not each.hidden]
    assert flags
    for flag in flags:
        positive = max(flag.opts, key=len).removeprefix("--")
        assert flag.secondary_opts == [f"--no-{positive}"]


def test_mistakes_in_the_file_import_nothing_slow(config: Any) -> None:
    path = config('model = "./nowhere"\n')
    program = (
        f"import sys\nfrom shoal.cli import run\nprint(run(['serve', '--new-swarm', '--config', {str(path)!r}]))\n"
        "print([name for name in ('torch', 'transformers', 'hivemind') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["2", "[]"]


@pytest.mark.parametrize(("mode", "is_told"), [(0o644, True), (0o640, False), (0o600, False)])
def test_keys_that_all_users_can_read_are_told(
    mode: int, is_told: bool, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    read(gateway.command, config('model = "m"\napi_key = ["secret"]\n', mode=mode))
    assert ("can read the api-key" in capsys.readouterr().err) is is_told
    read(gateway.command, config('model = "m"\n', mode=0o644))
    assert capsys.readouterr().err == ""
    code = InviteCode("0123456789abcdef", (Way("203.0.113.5", 31337),))
    commands = {
        join.command: f'code = "{code}"',
        serve.command: f'model = "{code}"',
        gateway.command: f'model = ["{code}"]',
    }
    for command, text in commands.items():
        read(command, config(f"{text}\n", mode=mode))
        assert ("can read the invite code" in capsys.readouterr().err) is is_told


def test_a_file_without_secrets_may_be_read_by_all(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    read(serve.command, config('name = "alpha"\n', mode=0o644))
    assert capsys.readouterr().err == ""


def test_the_commands_that_have_the_option_are_those_that_run_for_long() -> None:
    assert {module.__name__.rpartition(".")[2] for module in LONG_RUNNING} == {"serve", "join", "up", "gateway", "dht"}
