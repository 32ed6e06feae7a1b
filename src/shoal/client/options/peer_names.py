"""Which servers a user means: by a name, by the short id that `shoal status` shows, or by a whole peer id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from shoal.client.options.client_options import ClientOptions
from shoal.errors import UserError
from shoal.net.identity import public_key
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo, ServerState

SHORTEST_END = 4
"""So many characters at the end of a peer id say which one it is, if they fit only one server."""
SHORTEST_START = 12
"""So many at its beginning, of which the first eight are the same in all ids."""
MOST_LISTED = 8


async def found_in_directory(config: ClientOptions, node: Node, model: ModelInfo) -> ClientOptions:
    """The config with whole ids for all servers that it names. The directory is read once, and only if it is needed.

    Raises `UserError` for what names no server, or several, and `SwarmError` if the directory does not answer.
    """
    if all_are_whole(config):
        return config
    return with_whole_ids(config, await node.directory.servers(model))


def all_are_whole(config: ClientOptions) -> bool:
    """Whether every server that the config names is named by its whole id."""
    pinned = (peer for _, peer in config.pinned)
    return all(public_key(text) for text in (*(config.allowed_servers or ()), *config.blocked_servers, *pinned))


def with_whole_ids(config: ClientOptions, servers: Sequence[ServerInfo]) -> ClientOptions:
    """The config with whole ids in place of what names these servers. Raises `UserError`."""
    allowed = config.allowed_servers
    return replace(
        config,
        allowed_servers=None if allowed is None else frozenset(find_peer(text, servers) for text in allowed),
        blocked_servers=frozenset(find_peer(text, servers) for text in config.blocked_servers),
        pinned=tuple((span, find_peer(text, servers)) for span, text in config.pinned),
    )


def find_peer(text: str, servers: Iterable[ServerInfo]) -> str:
    """The id of the one server that a text names. Raises `UserError`.

    A whole id is always that peer's, whatever others call themselves, and may be one that comes later.
    """
    present = [server for server in servers if server.state is not ServerState.LEAVING]
    if public_key(text) or any(server.peer == text for server in present):
        return text
    found = [server for server in present if _is_named(server, text)]
    if not found:
        raise UserError(
            f"no server is called {text!r}, and no peer id begins or ends like that",
            hint=f"those that serve this model: {_listed(present)}" if present else "a whole peer id may come later",
        )
    if len(found) > 1:
        raise UserError(
            f"{text!r} may be one of {len(found)} servers: {_listed(found)}",
            hint="write the end of its peer id as shoal status shows it, or all of it (shoal status --json)",
        )
    return found[0].peer


def _is_named(server: ServerInfo, text: str) -> bool:
    if text and text == server.name:
        return True
    ends = len(text) >= SHORTEST_END and server.peer.endswith(text)
    return ends or (len(text) >= SHORTEST_START and server.peer.startswith(text))


def _listed(servers: Sequence[ServerInfo]) -> str:
    names = [f"{server.name} {server.peer[-6:]} (blocks {server.span})".strip() for server in servers[:MOST_LISTED]]
    return ", ".join(names) + (f" and {len(servers) - MOST_LISTED} more" if len(servers) > MOST_LISTED else "")
