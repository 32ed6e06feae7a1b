"""`shoal gateway`: OpenAI's HTTP API in front of models in the swarm."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import whitespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import network_options, options
from shoal.cli.generate import connected
from shoal.cli.service.long_running import end_with_parent, run_until_signalled
from shoal.cli.terminal.console import WrongUsage, as_usage, stderr
from shoal.cli.terminal.notify import notify
from shoal.client.options.client_options import ClientOptions
from shoal.errors import UserError
from shoal.joining.invite_code import is_code
from shoal.model.weights.location import folder_of

if TYPE_CHECKING:
    import uvicorn

    from shoal.gateway.served_model import ServedModel

API_KEYS = "SHOAL_API_KEYS"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
DRAIN_SECONDS = 30
"""How long answers that have begun may go on after Ctrl-C."""


@functools.partial(options.with_client_options, log="warning", shows_progress=True)
def command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders, ids on the Hugging Face hub, or invite codes.")
    ],
    client: ClientOptions,
    host: Annotated[
        str, typer.Option(metavar="IP", help="Listen here; 0.0.0.0 lets other machines ask too.")
    ] = "127.0.0.1",
    port: network_options.Port = 8000,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ADAPTER",
            help="Answer as MODEL:NAME too, with this PEFT adapter, a folder or a Hugging Face id; may be repeated. "
            "With several models: MODEL:NAME=ADAPTER.",
        ),
    ] = None,
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
        int,
        typer.Option(
            min=1, metavar="N", help="How many texts are computed at once; four times as many requests may wait."
        ),
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
    names = _names_of(models)
    adapters = [adapter_of(each, names) for each in adapter or ()]
    _check_different("adapters", [each.name for each in adapters], hint="name them: --adapter NAME=ADAPTER")
    for model in models:
        options.check_places(model, revision=client.model.revision)
    with as_usage():
        for each in adapters:
            folder_of(each.place)
    keys = checked_keys(api_key or os.environ.get(API_KEYS, "").replace(",", " ").split())
    if exit_with_stdin:
        end_with_parent()
    if not keys and host not in LOOPBACK:
        stderr.print(f"all who reach {host} can use this gateway: see --api-key", style="yellow")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        from shoal.gateway.page.news import News
        from shoal.gateway.served_model import ServedModel

        served: list[ServedModel] = []
        for name, model in zip(names, models, strict=True):
            news = News()
            watched = replace(client, observers=(*client.observers, news.tell))
            llm, tokenizer = stack.enter_context(connected(model, watched))
            arguments = _serve_arguments(model, client)
            shown = Path(llm.name_or_path).name if is_code(model) else name
            served.append(ServedModel(shown, llm, tokenizer, news, arguments))
            for each in adapters:
                if each.base == name:
                    twin = llm.with_adapter(each.place)
                    stack.callback(twin.close)
                    served.append(ServedModel(f"{shown}:{each.own}", twin, tokenizer, news, arguments, base=shown))
        _check_different("models", [each.name for each in served], hint="name a folder, and rename it")
        from shoal.gateway.app import Gateway, application
        from shoal.gateway.guard.admission import Admission

        async def run() -> None:
            admission = Admission(
                keys,
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                max_running=max_requests,
                max_waiting=4 * max_requests,
                salt=client.salt,
            )
            # A gateway for this machine answers to this machine's names only.
            hosts = LOOPBACK if host in LOOPBACK else None
            app = application(Gateway(served, admission), origins=tuple(cors_origin or ()), hosts=hosts)
            try:
                await _serve(app, served, listener)
            finally:
                for each in served:
                    await asyncio.to_thread(each.model.close)

        run_until_signalled(run(), cleanup="finishing the answers that have begun")


def checked_keys(keys: Sequence[str]) -> tuple[str, ...]:
    """The keys that clients may have. Raises `WrongUsage` for those that are empty, or no single word."""
    for key in keys:
        if not key or set(key) & {",", *whitespace}:
            raise WrongUsage("a key with a space or a comma, or an empty one", hint="--api-key takes a word of its own")
    return tuple(keys)


@dataclass(frozen=True)
class GatewayAdapter:
    """An adapter that requests name as `name`, "base:own"; it is at `place`, a folder or an id."""

    base: str
    own: str
    place: str

    @property
    def name(self) -> str:
        """The name by which requests ask for it."""
        return f"{self.base}:{self.own}"


def adapter_of(given: str, models: Sequence[str]) -> GatewayAdapter:
    """What `--adapter` says: [[MODEL:]NAME=]ADAPTER. Raises `WrongUsage`."""
    before, equals, place = given.partition("=")
    if not equals:
        before, place = Path(given).name, given
    base, _, own = before.rpartition(":") if equals else ("", "", before)
    if not base and len(models) > 1:
        raise WrongUsage(f"which model is the adapter {given} for?", hint=f"--adapter {models[0]}:{own}={place}")
    if not own or not place or (base and base not in models):
        raise WrongUsage(
            f"not an adapter of a model that is served: {given}", hint=f"--adapter {models[0]}:NAME=FOLDER_OR_ID"
        )
    return GatewayAdapter(base or models[0], own, place)


def listen(host: str, port: int, *, option: str = "--port") -> socket.socket:
    """The socket to listen on, before anything slow is done. `option` gives the port. Raises `UserError`."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"port {port} of {host} cannot be used: {error.strerror}", hint=f"choose another one with {option}, or 0"
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

    from shoal.gateway.guard.connections import LimitedConnection

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
            notify(READY="1", STATUS=f"Answering at http://{shown}:{port}/v1")

    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    return Server(
        uvicorn.Config(
            app,
            http=LimitedConnection,
            ws="none",
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
    _check_different("models", names, hint="rename one of the folders")
    return names


def _check_different(what: str, names: Sequence[str], *, hint: str) -> None:
    if twice := {name for name in names if names.count(name) > 1}:
        raise WrongUsage(f"two {what} are called {', '.join(sorted(twice))}", hint=hint)
