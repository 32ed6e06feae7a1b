"""The devices of a server's command. With several of them, the command is one server for each, and they share options.

A GPU is chosen by what the CUDA driver shows to the process: a process that computes on `cuda:1` sees no other GPU, so
none of its libraries can use one by mistake.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli.options import Device
from shoal.cli.terminal.console import WrongUsage
from shoal.host.computer import may_have_gpu
from shoal.spans import Span

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The variable by which the CUDA driver shows a process some GPUs only: their numbers or ids, with commas between."""
GPUS_OF_DRIVER = Path("/proc/driver/nvidia/gpus")
COUNT_SECONDS = 120.0
_NOT_SHARED = {"model", "new_swarm", "initial_peers", "when", "exit_with_stdin"}
"""Values of the command that its servers get in another way."""
_NAME = re.compile(r"cpu|mps|cuda(:\d+)?")
_PORT = re.compile(r"/tcp/(\d+)")

OnDevices = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        autocompletion=lambda: [each.value for each in Device],
        help="Compute on cpu, cuda or mps (untested). Several, such as cuda:0,cuda:1, are a server each. auto: all "
        "GPUs that there are, or else the CPU.",
    ),
]


@dataclass(frozen=True)
class Share:
    """One server of a command: its mark, which names it in what the command prints, and the values of its options.

    `model` is its argument. How it enters the swarm is not among the values.
    """

    mark: str
    model: str
    values: Mapping[str, Any]


def chosen_devices(text: str) -> tuple[str, ...]:
    """The devices that `--device` names, one for each server. Raises `WrongUsage`.

    "auto" stays, for one server, unless there are several GPUs: these are counted by PyTorch, in another process.
    """
    if text == Device.auto:
        count = _count_gpus()
        return tuple(f"cuda:{number}" for number in range(count)) if count > 1 else (text,)
    devices = tuple(each.strip() for each in text.split(","))
    for each in devices:
        if not _NAME.fullmatch(each):
            raise WrongUsage(f"not a device: {each!r}", hint="--device takes auto, cpu, cuda, mps, or cuda:0,cuda:1")
    if len(devices) > 1 and "cuda" in devices:
        raise WrongUsage("which GPU is cuda?", hint="number them: --device cuda:0,cuda:1")
    return devices


def show_only(device: str) -> str:
    """Let this process see no GPU but this one, before it imports PyTorch, and return PyTorch's name for it."""
    kind, _, number = device.partition(":")
    if number:
        visible = [each.strip() for each in os.environ.get(VISIBLE, "").split(",") if each.strip()]
        os.environ[VISIBLE] = number if not visible else visible[int(number)] if int(number) < len(visible) else "-1"
    return kind


def shared_out(devices: Sequence[str], values: Mapping[str, Any], *, cores: int) -> tuple[Share, ...]:
    """One server for each device, and what each gets of `values`, the options of `shoal serve`. Raises `WrongUsage`.

    A single server gets all of them. Of several, each has a name and an identity of its own; the blocks, their number,
    the threads and the upload limit are divided; and ports count up.
    """
    common = {name: value for name, value in values.items() if name not in _NOT_SHARED}
    if len(devices) == 1:
        return (Share("server", values["model"], common | {"device": devices[0]}),)
    if max(Counter(devices).values()) > 1 and values.get("blocks") is None and values.get("num_blocks") is None:
        raise WrongUsage(
            "several servers on one device would each take all of its memory",
            hint="say how many blocks they have together: --num-blocks N",
        )
    count = len(devices)
    marks = _marks(devices)
    blocks, num_blocks = values.get("blocks"), values.get("num_blocks")
    spans = None if blocks is None else _blocks(blocks, count)
    numbers = None if num_blocks is None else _divided(num_blocks, count, option="--num-blocks")
    threads = max(1, (values.get("threads") or cores) // count)
    limit = values.get("upload_limit")

    def share(index: int) -> dict[str, Any]:
        own = common | {"device": devices[index], "threads": threads, "mark": marks[index]}
        own |= {"blocks": spans and spans[index], "num_blocks": numbers and numbers[index]}
        if spans and values.get("serve_head"):  # the head follows the last block
            own["serve_head"] = index == count - 1
        own["upload_limit"] = None if limit is None else limit / count
        own["port"] = values.get("port", 0) and _port(values["port"], index)
        own["announce"] = [_with_port(each, index) for each in values.get("announce") or ()]
        own["name"] = f"{values['name']}-{marks[index]}" if values.get("name") else values.get("name")
        identity = values.get("identity")
        own["identity"] = None if identity is None else Path(identity).with_name(f"{identity.name}-{marks[index]}")
        return own

    return tuple(Share(marks[index], values["model"], share(index)) for index in range(count))


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """The options of the command line that have these values, by the names of the parameters. `None` is left out."""
    arguments: list[str] = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list | tuple):
            arguments += [part for each in value for part in (f"--{option}", str(each))]
        elif value is not None:
            arguments += [f"--{option}", str(value)]
    return arguments


def _marks(devices: Sequence[str]) -> list[str]:
    """A short name for each device, such as cuda0. Those of one device have a number more."""
    times, seen = Counter(devices), Counter[str]()
    marks = []
    for each in devices:
        plain = each.replace(":", "")
        marks.append(plain if times[each] == 1 else f"{plain}.{seen[each]}" if ":" in each else f"{plain}{seen[each]}")
        seen[each] += 1
    return marks


def _blocks(text: str, count: int) -> list[str]:
    """A span in `count` parts, one after the other."""
    span = Span.parse(text)
    ends = list(accumulate(_divided(len(span), count, option="--blocks"), initial=span.start))
    return [str(Span(start, end)) for start, end in pairwise(ends)]


def _divided(number: int, count: int, *, option: str) -> list[int]:
    """A number as the sum of `count` ones that are as equal as can be. Raises `WrongUsage` if one would be 0."""
    if number < count:
        raise WrongUsage(
            f"{number} blocks for {count} devices", hint=f"give {option} at least as many, or fewer devices"
        )
    return [number // count + (index < number % count) for index in range(count)]


def _with_port(address: str, index: int) -> str:
    return _PORT.sub(lambda found: f"/tcp/{_port(int(found[1]), index)}", address)


def _port(port: int, index: int) -> int:
    if port + index > 65535:
        raise WrongUsage(f"there is no port {port + index}", hint="each server has one: the ports count up")
    return port + index


def _count_gpus() -> int:
    """How many GPUs PyTorch can use: none and one are the same here, and then it is not imported."""
    if not may_have_gpu() or os.environ.get(VISIBLE, ",").count(",") == 0:
        return 0
    if GPUS_OF_DRIVER.is_dir() and len(list(GPUS_OF_DRIVER.iterdir())) < 2:
        return 0
    asking = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        done = subprocess.run(asking, capture_output=True, text=True, timeout=COUNT_SECONDS, check=True)  # noqa: S603
        return int(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0  # the server says what is wrong with its device
