"""What one page has been told: of a new snapshot it gets what has changed, and it knows machines by their names."""

from __future__ import annotations

from typing import Any

from shoal.events import Event, RouteChosen, ServerLost, StageReplaced, TextDoubtful, WaitEnded, WaitingForBlocks
from shoal.peers import short


class PageMemory:
    """The last snapshot that a page has, and the names of all machines that it was ever told of."""

    def __init__(self) -> None:
        self._shown: dict[str, Any] = {}
        self._servers: dict[str, dict[str, Any]] = {}
        self._names: dict[str, str] = {}

    def changes(self, snapshot: dict[str, Any]) -> dict[str, Any] | None:
        """What of a snapshot is new: of the servers, those that have changed and those that are gone.

        The first one is told whole. `None` if nothing has changed.
        """
        servers = {each["peer"]: each for each in snapshot["servers"]}
        changed = [each for peer, each in servers.items() if self._servers.get(peer) != each]
        gone = [peer for peer in self._servers if peer not in servers]
        shown = {key: value for key, value in snapshot.items() if key != "servers"}
        if not changed and not gone and shown == self._shown:
            return None
        self._servers, self._shown = servers, shown
        self._names.update({peer: each["name"] for peer, each in servers.items() if each["name"]})
        return {"type": "swarm", **shown, "servers": changed, "gone": gone}

    def told(self, event: Event) -> dict[str, Any] | None:
        """An event in words, with the peers that it is about; `None` for what only a log needs."""
        match event:
            case RouteChosen(span=span) if len(span) == self._shown["num_blocks"]:  # others are only considered
                return {"type": "event", "text": self._named(f"chosen: {event.line}")}
            case WaitingForBlocks() | WaitEnded():
                return {"type": "event", "text": self._named(event.line), "loud": True}
            case TextDoubtful():
                return {"type": "event", "text": f"in an answer, {self._named(event.line)}", "loud": True, "bad": True}
            case ServerLost(peer=peer, reason=reason):
                return {"type": "event", "text": self._named(reason), "loud": True, "lost": peer}
            case StageReplaced(peer=peer, replacements=replacements):
                by = [self._name(each) for each in replacements]
                text = f"{', '.join(by)} took over from {self._name(peer)}"
                return {"type": "event", "text": text, "loud": True, "replaced": peer, "by": by}
        return None

    def _name(self, peer: str) -> str:
        return self._names.get(peer, short(peer))

    def _named(self, text: str) -> str:
        for peer, name in self._names.items():
            text = text.replace(peer, name)
        return text
