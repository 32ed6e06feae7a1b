"""`shoal status`: the servers of each model, their blocks and speeds, and the blocks that are missing."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import network_options, options
from shoal.cli.terminal.console import hush_transformers, start_logging, stdout, waiting
from shoal.cli.terminal.contribution_table import render_contribution
from shoal.cli.terminal.render import render, render_route, usable
from shoal.client.options.client_options import ClientOptions
from shoal.errors import UserError
from shoal.joining.invite_code import InviteCode, code_in
from shoal.model.weights.disk_cache import cache_folder
from shoal.model.weights.location import is_path
from shoal.policy.dtypes import mixture
from shoal.policy.view import SwarmView, format_blocks
from shoal.protocol import PROTOCOL_VERSION
from shoal.spans import Span

if TYPE_CHECKING:
    from shoal.net.ping import PingAnswer
    from shoal.peers import Capacity, ModelInfo, ServerInfo
    from shoal.policy.routing.route import Route


MOST_ASKED = 200
"""The servers of a model that are asked whether they answer."""
AT_ONCE = 16
ASK_SECONDS = 15.0


@dataclass(frozen=True)
class ModelStatus:
    """A model, its servers, and the route that a client on this machine would choose.

    `answers` are what the servers say that were asked from here, by peer id; `None` of one that does not answer.
    """

    model: ModelInfo
    view: SwarmView
    route: Route | None = None
    answers: Mapping[str, PingAnswer | None] = field(default_factory=dict)

    @property
    def usable(self) -> SwarmView:
        """The servers that a token could go through: online, of this version of the protocol, and not silent."""
        return usable(self.view, self.answers)

    @property
    def missing(self) -> list[int]:
        """The blocks that no usable server holds."""
        return self.usable.missing()

    def as_json(self, *, route: bool = False) -> dict[str, Any]:
        """What `--json` prints of it. `route` asks for the route too."""
        missing = self.missing
        servers = [
            asdict(server)
            | {
                "span": [server.span.start, server.span.end],
                "state": server.state.value,
                "wants": None if server.wants is None else [server.wants.start, server.wants.end],
                "round_trips": dict(server.round_trips),
                "capacity": None if server.capacity is None else _capacity_as_json(server.capacity),
                "answer": self._answer_as_json(server.peer),
            }
            for server in sorted(self.view.servers, key=lambda server: (server.span, server.name, server.peer))
        ]
        return asdict(self.model) | {
            "complete": not missing,
            "missing": missing,
            "mixture": mixture(self.view.servers),
            "missing_spans": format_blocks(missing).split(", ") if missing else [],
            "servers": servers,
            **({"route": None if self.route is None else _route_as_json(self.route)} if route else {}),
        }

    def _answer_as_json(self, peer: str) -> dict[str, Any] | bool | None:
        """What a server said: `False` if it does not answer, `None` if it was not asked."""
        if peer not in self.answers:
            return None
        answer = self.answers[peer]
        return False if answer is None else {"round_trip": answer.seconds, "relayed": answer.is_relayed}


def _capacity_as_json(capacity: Capacity) -> dict[str, Any]:
    return asdict(capacity) | {"on_disk": [[span.start, span.end] for span in capacity.on_disk]}


def _route_as_json(route: Route) -> dict[str, Any]:
    hops = [
        {"peer": hop.server.peer, "name": hop.server.name, "span": [hop.span.start, hop.span.end]} | asdict(cost)
        for hop, cost in zip(route.hops, route.costs, strict=True)
    ]
    return {"hops": hops, "back": route.back, "seconds": route.seconds}


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A folder, a Hugging Face id, or a name from this list; an invite code shows all."
        ),
    ] = None,
    initial_peers: options.InitialPeers = None,
    swarm_key: network_options.SwarmKeyFile = None,
    route: Annotated[
        bool, typer.Option("--route", help="Show the route that a client on this machine would choose, and its cost.")
    ] = False,
    contribution: Annotated[
        bool,
        typer.Option(
            "--contribution",
            help="Show what this machine has computed for others, and others for it; no swarm is asked.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the servers of a model, and the blocks that are missing.

    Without MODEL, all models of the swarm are shown. Each server is asked whether it answers. The exit status is 1 if a
    model that is shown lacks blocks, and 0 if a token can go through all of them.
    """
    start_logging(verbose=verbose, default="warning" if contribution else "error")
    if contribution:
        _show_contribution(as_json=as_json)
        return
    client = options.client_options(initial_peers, swarm_key, models=() if model is None else (model,))
    if model is not None and is_path(model):  # others may be names of models in the swarm
        options.check_places(model)
    code = None if model is None else code_in(model)
    with waiting("Asking the swarm"):
        found = asyncio.run(look(client, model, route=route) if code is None else _look_by(code, client, route=route))
    if as_json:
        print(json.dumps({"models": [status.as_json(route=route) for status in found]}, indent=2, ensure_ascii=False))
    else:
        _show(found, route=route)
    if any(status.missing for status in found):
        raise typer.Exit(1)


def _show(found: Sequence[ModelStatus], *, route: bool) -> None:
    if not found:
        stdout.print("This swarm serves no model.")
    for number, status in enumerate(found):
        if number:
            stdout.print()
        for part in render(status.model, status.view, status.answers, width=stdout.width, now=time.time()):
            stdout.print(part)
        if route:
            stdout.print()
            for part in render_route(status.route, status.answers):
                stdout.print(part)


def _show_contribution(*, as_json: bool) -> None:
    from shoal.ledgers.ledger_place import LedgerPlace
    from shoal.ledgers.machine_totals import machine_totals
    from shoal.policy.contribution.credit import period_of

    totals = machine_totals(LedgerPlace.of(cache_folder()).folder, now=period_of(time.time()))
    if as_json:
        print(json.dumps({"unit": "million parameter-tokens", **asdict(totals)}, indent=2))
        return
    for part in render_contribution(totals, width=stdout.width):
        stdout.print(part)


async def look(client: ClientOptions, wanted: str | None = None, *, route: bool = False) -> list[ModelStatus]:
    """Ask the swarm for one model, or for all. Raises `UserError` for a model that is known neither to it nor here."""
    from shoal.net import join
    from shoal.net.ping import ask_all

    async with join(client.network) as node:
        models: Sequence[ModelInfo] = await node.directory.models()
        if wanted is not None:
            models = [_named(wanted, models)]
        found = []
        for model in models:
            view = SwarmView(model.num_blocks, await node.directory.servers(model))
            answers = await ask_all(node.transport, _asked(view), max_concurrent=AT_ONCE, seconds=ASK_SECONDS)
            status = ModelStatus(model, view, answers=answers)
            found.append(replace(status, route=find_route(status)) if route else status)
        return found


def _asked(view: SwarmView) -> Sequence[ServerInfo]:
    """The servers to ask whether they answer, in any order: in a large swarm, some of them."""
    online = view.online().only(lambda server: server.protocol == PROTOCOL_VERSION).servers
    return random.sample(online, min(len(online), MOST_ASKED))


async def _look_by(code: InviteCode, client: ClientOptions, *, route: bool) -> list[ModelStatus]:
    """Ask the swarm of an invite code for all models."""
    from shoal.joining.arrival import peers_of

    return await look(client.by_code(code, await peers_of(code)), route=route)


def find_route(status: ModelStatus) -> Route | None:
    """The route of a token from this machine, by the answers of the servers. None if there is none.

    Where servers have different weights, only those with the most common weights are used.
    """
    from shoal.policy.routing.route import Measured, Needs, choose_route

    view = status.usable
    weights = Counter(server.fingerprint for server in view.servers).most_common(1)
    view = view.only(lambda server: server.fingerprint == weights[0][0])
    if view.missing():
        return None
    round_trips = {peer: answer.seconds for peer, answer in status.answers.items() if answer is not None}
    return choose_route(view, Span(0, view.num_blocks), needs=Needs(), known=Measured(round_trips))


def _named(wanted: str, models: Iterable[ModelInfo]) -> ModelInfo:
    """The model with this key or name, or in this folder."""
    models = list(models)
    is_folder = Path(wanted).expanduser().is_dir()
    for model in models:
        if wanted in (model.key, model.name) and not is_folder:
            return model
    from shoal.model.weights.checkpoint import Checkpoint
    from shoal.peers import ModelInfo

    hush_transformers()
    try:
        checkpoint = Checkpoint.open(wanted, allow_uncertified=True)
    except UserError as error:
        if is_folder or not models:
            raise
        names = ", ".join(sorted({model.name for model in models}))
        raise UserError(f"this swarm serves no model named {wanted}", hint=f"it serves {names}") from error
    own = ModelInfo(checkpoint.key, checkpoint.name, checkpoint.family.model_type, checkpoint.num_blocks)
    return next((model for model in models if model.key == own.key), own)
