"""`shoal up`: a swarm's first machine in one command: it serves, answers OpenAI's API, shows the page, and invites."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import segno
import typer

from shoal.cli import network_options, options, serve
from shoal.cli.gateway import API_KEYS, checked_keys, listen
from shoal.cli.service.devices import OnDevices, as_arguments, chosen_devices, shared_out
from shoal.cli.service.long_running import end_with_parent
from shoal.cli.service.several_servers import LOOK_SECONDS, START_SECONDS, Servers, tell_marked
from shoal.cli.terminal.console import FAILED, WRONG_USAGE, WrongUsage, start_logging, stdout
from shoal.cli.terminal.notify import notify
from shoal.errors import SwarmError
from shoal.host.computer import usable_cores
from shoal.host.processes import Child, Children, interruptible
from shoal.joining.invite_code import InviteCode, is_code, is_for_this_machine
from shoal.net.swarm_key import file_of_key

DRAIN_SECONDS = 40.0
"""How long both processes may take to end: answers that have begun go on for a while."""


def command(
    model: options.Model,
    blocks: Annotated[
        str | None,
        typer.Option(metavar="START:END", help="Serve these blocks, such as 0:8. Default: as many as fit into memory."),
    ] = None,
    device: OnDevices = options.Device.auto,
    dtype: Annotated[
        options.DType,
        typer.Option(metavar="DTYPE", help=f"Compute in this dtype: {options.DTYPES}. auto: the model's own."),
    ] = options.DType.auto,
    quantization: options.StoredAs = options.Quantization.none,
    http_host: Annotated[
        str, typer.Option(metavar="IP", help="The page and the API listen here; 0.0.0.0 lets other machines ask too.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="The port of the page and the API.")] = (
        8000
    ),
    api_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Answer only clients that have this key; may be repeated.")
    ] = None,
    swarm_key: network_options.SwarmKeyFile = None,
    host: network_options.Host = None,
    port: network_options.Port = 0,
    upnp: network_options.Upnp = False,
    lan: network_options.OnLan = None,
    revision: options.Revision = None,
    allow_uncertified: options.AllowUncertified = False,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
    verbose: options.Verbose = False,
) -> None:
    """Start a swarm: serve a model, answer OpenAI's API, show a page, and print the code by which others join.

    It is `shoal serve --new-swarm` and `shoal gateway` together; these have more options. Ctrl-C ends both.
    """
    start_logging(verbose=verbose)
    if is_code(model):
        raise WrongUsage("an invite code is for a swarm that is there", hint=f"join it: shoal join {model}")
    _, name = serve.check_options(
        blocks=blocks, num_blocks=None, name=None, zone=None, adapter=None, host=host, announce=None, relay=None
    )
    options.check_places(model, revision=revision)
    secrets = {API_KEYS: ",".join(checked_keys(api_key))} if api_key else {}
    # The gateway listens there after the server's start, which may take an hour.
    listen(http_host, http_port, option="--http-port").close()
    if exit_with_stdin:
        end_with_parent()
    form = {
        "dtype": dtype,
        "revision": revision,
        "allow_uncertified": allow_uncertified,
        "swarm_key": file_of_key(swarm_key),
        "verbose": verbose,
    }
    hold = {
        **form,
        "blocks": blocks,
        "quantization": quantization,
        "host": host,
        "port": port,
        "lan": lan,
        "upnp": upnp,
        "serve_head": blocks is None,  # the head needs the last block, which may not be among these blocks
    }
    shares = shared_out(chosen_devices(device), {**hold, "model": model, "name": name}, cores=usable_cores())
    ask = as_arguments({**form, "remote_head": True, "host": http_host, "port": http_port})
    with (
        contextlib.suppress(KeyboardInterrupt),  # which is how this command is meant to end
        interruptible() as check,
        Children(
            num_threads=None,
            grace_seconds=DRAIN_SECONDS,
            shares_stderr=True,
            tell=None if len(shares) == 1 else _tell_errors,
        ) as children,
        _told_when_it_stops(),
    ):
        servers = Servers(children, shares, is_new=True)
        server = servers.first.child
        _wait(children, server, check)
        servers.start_others()
        peer = ("--initial-peers", server.facts["address"])
        gateway = children.start("gateway", "gateway", model, *ask, *peer, environment=secrets)
        _wait(children, gateway, check)
        for fact in ("model", "page", "address"):
            print(f"{fact:<10}{gateway.facts[fact]}", flush=True)
        notify(READY="1", STATUS=f"Serving, and answering at {gateway.facts['address']}")
        _watch(children, servers, gateway, check)


def _wait(children: Children, child: Child, check: Callable[[], None]) -> None:
    """Wait until a child is ready, and call `check` meanwhile. Raises `SwarmError` if it does not come up.

    One that has reported why has done so where this process reports: then its exit status is that of this process.
    """
    notify(STATUS=f"Starting the {child.name}")
    try:
        for _ in children.wait_for([child], seconds=START_SECONDS):
            check()
    except SwarmError:
        if child.process.returncode in (FAILED, WRONG_USAGE):
            raise typer.Exit(child.process.returncode) from None
        raise


@contextlib.contextmanager
def _told_when_it_stops() -> Iterator[None]:
    """Tell systemd of an interrupt in this context, before the children are ended, which takes a while."""
    try:
        yield
    except KeyboardInterrupt:
        notify(STOPPING="1", STATUS="Leaving the swarm")
        raise


def _watch(children: Children, servers: Servers, gateway: Child, check: Callable[[], None]) -> None:
    """Print the code and where it is announced when that is known, until the gateway or the last server ends.

    Raises `SwarmError` then.
    """
    server = servers.first.child
    to_show = {"code": _print_code, "lan": _print_lan}
    while not gateway.has_ended:
        servers.tend()
        for fact in [each for each in to_show if each in server.facts]:
            to_show.pop(fact)(server.facts[fact])
        children.wait_for_news(LOOK_SECONDS)
        check()
    raise SwarmError(f"the gateway has ended with status {gateway.process.wait()}", hint="see its messages above")


def _tell_errors(child: Child, line: str, is_error: bool) -> None:
    """Print what a server or the gateway reports. What they print is a part of what this command prints."""
    if is_error:
        tell_marked(child, line, is_error)


def _print_code(text: str) -> None:
    code = InviteCode.parse(text)
    print(f"{'code':<10}{code}\n\nAnother machine joins with this line:\n  shoal join {code}\n", flush=True)
    if all(map(is_for_this_machine, code.ways)):
        print("This machine has no address that others can use, so the code is for this machine only.\n", flush=True)
    if stdout.is_terminal:
        segno.make(str(code), error="m").terminal(out=sys.stdout, compact=True)
        print(flush=True)


def _print_lan(text: str) -> None:
    print(f"{'lan':<10}{text}", flush=True)
