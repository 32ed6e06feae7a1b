"""`shoal gateway`: OpenAI's HTTP API in front of models in the swarm."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import options
from shoal.cli.console import WrongUsage, stderr
from shoal.cli.generate import connected
from shoal.cli.long_running import end_with_parent, run_until_signalled
from shoal.client.options.client_options import ClientOptions
from shoal.errors import UserError

if TYPE_CHECKING:
    import uvicorn

    from shoal.gateway.served_model import ServedModel

API_KEYS = "SHOAL_API_KEYS"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
DRAIN_SECONDS = 30
"""How long answers that have begun may go on after Ctrl-C."""


@options.with_client_options
def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders, or ids on the Hugging Face hub.")],
    client: ClientOptions,
    host: Annotated[
        str, typer.Option(metavar="IP", help="Listen here; 0.0.0.0 lets other machines ask too.")
    ] = "127.0.0.1",
    port: options.Port = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help=f"Answer only clients that have this key; may be repeated. Default: ${API_KEYS}."
        ),
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option(min=1, metavar="N", help="What one key may ask. Default: no limit.")
    ] = None,
    tokens_per_minute: Annotated[
        float | None, typer.Option(min=1, metavar="N", help="The tokens that one key may use. Default: no limit.")
    ] = None,
    max_requests: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many requests run at once; four times as many may wait.")
    ] = 64,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let scripts of this origin's pages ask, such as https://chat.example."),
    ] = None,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
) -> None:
    """Answer requests to OpenAI's API with models in the swarm.

    Give any client of OpenAI's API the base URL that is printed. Requests of all clients are computed together, and a
    machine that is lost in the middle of an answer is replaced without a trace.
    """
    for model in models:
        options.check_places(model, client.model.active_adapter)
    keys = tuple(api_key or os.environ.get(API_KEYS, "").replace(",", " ").split())
    names = _names_of(models)
    if exit_with_stdin:
        end_with_parent()
    if not keys and host not in LOOPBACK:
        stderr.print(f"anybody who reaches {host} can use this gateway: see --api-key", style="yellow")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(host, port))
        from shoal.gateway.page.news import News

        opened = []
        for name, model in zip(names, models, strict=True):
            news = News()
            watched = replace(client, observers=(*client.observers, news.tell))
            opened.append(
                (name, *stack.enter_context(connected(model, watched)), news, _serve_arguments(model, client))
            )
        from shoal.gateway.app import Gateway, application
        from shoal.gateway.guard.admission import Admission
        from shoal.gateway.served_model import ServedModel

        async def run() -> None:
            admission = Admission(
                keys,
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                max_running=max_requests,
                max_waiting=4 * max_requests,
            )
            served = [ServedModel(*each) for each in opened]
            # A gateway for this machine answers to this machine's names only.
            hosts = LOOPBACK if host in LOOPBACK else None
            app = application(Gateway(served, admission), origins=tuple(cors_origin or ()), hosts=hosts)
            try:
                await _serve(app, served, listener)
            finally:
                for each in served:
                    await asyncio.to_thread(each.model.close)

        run_until_signalled(run())


def _listener(host: str, port: int) -> socket.socket:
    """The socket to listen on, before anything slow is done. Raises `UserError`."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"port {port} of {host} cannot be used: {error.strerror}", hint="choose another one with --port, or 0"
        ) from None


async def _serve(app: Any, served: Sequence[ServedModel], listener: socket.socket) -> None:
    """Serve until the task is cancelled; then let answers that have begun end."""
    server = _server(app, served, listener)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        for each in served:
            each.news.end()
        server.should_exit = True
        await serving
        raise


def _server(app: Any, served: Sequence[ServedModel], listener: socket.socket) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """Prints where it is, and leaves signals to the command."""

        def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
            return contextlib.nullcontext()

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            host, port, *_ = listener.getsockname()
            shown = f"[{host}]" if ":" in host else host
            for each in served:
                print(f"model     {each.name}")
            print(f"page      http://{shown}:{port}")
            print(f"address   http://{shown}:{port}/v1", flush=True)

    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            h11_max_incomplete_event_size=64 << 10,
        )
    )


def _serve_arguments(model: str, client: ClientOptions) -> str:
    """What makes `shoal serve` serve the same weights: the model as it was given here, and the options that count."""
    revision = f" --revision {shlex.quote(client.model.revision)}" if client.model.revision else ""
    return shlex.quote(model) + revision + (" --allow-uncertified" if client.model.allow_uncertified else "")


def _names_of(models: Sequence[str]) -> list[str]:
    """What requests call the models: ids as they are, folders by their last part.

    Raises `WrongUsage` if two are alike.
    """
    names = [
        Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model for model in models
    ]
    if twice := {name for name in names if names.count(name) > 1}:
        raise WrongUsage(f"two models are called {', '.join(sorted(twice))}", hint="rename one of the folders")
    return names
