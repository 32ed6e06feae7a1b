"""Which server a text names: by its name, by the short id that `shoal status` shows, or by its whole peer id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from shoal.client.options.client_options import ClientOptions
from shoal.errors import UserError
from shoal.net.identity import public_key
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo, ServerState

SHORTEST_END = 4
"""The fewest characters from the end of a peer id that may name it. `shoal status` shows six."""
SHORTEST_START = 12
"""The fewest characters from its beginning; the first eight are the same in all peer ids."""
MOST_LISTED = 8
"""How many servers an error message lists, so that it stays readable."""


async def found_in_directory(options: ClientOptions, node: Node, model: ModelInfo) -> ClientOptions:
    """The options with whole peer ids for all servers that they name. The directory is read only if that is needed.

    Raises `UserError` for a text that names no server, or several, and `SwarmError` if the directory does not answer.
    """
    if all_are_whole(options):
        return options
    return with_whole_ids(options, await node.directory.servers(model))


def all_are_whole(options: ClientOptions) -> bool:
    """Whether the options name every server by its whole peer id."""
    pinned = (peer for _, peer in options.pinned)
    return all(public_key(text) for text in (*(options.allowed_servers or ()), *options.blocked_servers, *pinned))


def with_whole_ids(options: ClientOptions, servers: Sequence[ServerInfo]) -> ClientOptions:
    """The options with the whole peer ids of these servers in place of other names. Raises `UserError`."""
    allowed = options.allowed_servers
    return replace(
        options,
        allowed_servers=None if allowed is None else frozenset(find_peer(text, servers) for text in allowed),
        blocked_servers=frozenset(find_peer(text, servers) for text in options.blocked_servers),
        pinned=tuple((span, find_peer(text, servers)) for span, text in options.pinned),
    )


def find_peer(text: str, servers: Iterable[ServerInfo]) -> str:
    """The peer id of the one server that a text names. Raises `UserError` for none, and for several.

    A whole peer id names only that peer, even if a server's name reads the same, and the peer may join later.
    """
    present = [server for server in servers if server.state is not ServerState.LEAVING]
    if public_key(text) or any(server.peer == text for server in present):
        return text
    found = [server for server in present if _is_named(server, text)]
    if not found:
        raise UserError(
            f"no server is called {text!r}, and no peer id begins or ends with that",
            hint=f"this model's servers: {_listed(present)}"
            if present
            else "name a server that joins later by its whole peer id",
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
