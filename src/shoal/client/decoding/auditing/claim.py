"""What a server has answered in a session, as something that can be audited."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

from dataclasses import dataclass

from shoal.client.decoding.auditing.logits_tail import LogitsTail
from shoal.client.history.history import History
from shoal.peers import ServerInfo
from shoal.policy.audits.likeness import FIRST_POSITION
from shoal.spans import Span

WINDOW_TOKENS = 256
"""The most tokens whose outputs are compared in one audit: they travel once more to the client."""


@dataclass
class Claim:
    """The outputs of a server for the blocks of `span`: what it was given, what it answered, and how far both go.

    Outputs before `clean` are audited, or came from another server. `inputs` and `outputs` are the session's own
    histories, which it crops and rearranges. The server may have computed inputs that other servers pushed to it.
    """

    server: ServerInfo
    span: Span
    inputs: History
    outputs: History | LogitsTail
    clean: int
    end: int
    pushed_by: tuple[str, ...] = ()
    """The servers that have pushed inputs of the tokens which are not clean."""

    @property
    def num_left(self) -> int:
        """How many tokens could be compared that are not clean."""
        return self.end - self.window(self.end)[0]

    @property
    def peer(self) -> str:
        """The peer id of the server."""
        return self.server.peer

    def window(self, end: int) -> tuple[int, int]:
        """The positions to compare in an audit of `end` tokens: those that are not clean, or the last of these."""
        first = self.outputs.start if isinstance(self.outputs, LogitsTail) else FIRST_POSITION
        return min(end, max(self.clean, end - WINDOW_TOKENS, first)), end

    def cropped(self, num_tokens: int) -> None:
        """The session has forgotten all tokens after the first `num_tokens`."""
        self.end = min(self.end, num_tokens)
        self.clean = min(self.clean, num_tokens)
