"""The tokens of a session as all its servers are told of them: inputs, positions, padding, salt, and the epoch."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shoal.client.decoding.epoch import Epoch, EpochReason
from shoal.client.decoding.stage import Stage
from shoal.client.history.history import History
from shoal.client.history.history_store import HistoryStore
from shoal.errors import UserError
from shoal.net.wire.encodings import as_received
from shoal.prefix import PAGE_TOKENS, DrawnSalt, next_hash, root_hash
from shoal.spans import Span
from shoal.tensors import Encoding


@dataclass(frozen=True, eq=False)
class StepInputs:
    """The inputs [B, T, D] of a step, and the position ids [B, T] of its tokens, None if these are simply counted."""

    hidden_BTD: torch.Tensor
    positions_BT: torch.Tensor | None


@dataclass(frozen=True)
class SentAhead:
    """A step that was sent before the one before it was answered, and its first position."""

    start: int
    step: StepInputs

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + self.step.hidden_BTD.shape[1]


class SessionInputs:
    """The inputs of a session's first block, and the positions and the padding of its tokens.

    The `epoch` says which version of them a step belongs to. `store` keeps the inputs. Servers share their cached
    beginnings only among sessions of the same `salt`. The last ones may be of steps that were sent `ahead`.
    """

    def __init__(self, store: HistoryStore, *, salt: str) -> None:
        self.salt = salt
        self.are_new = False
        """Whether no server can have computed any of these tokens, in this session or in another one."""
        self._beginnings = store.beginnings
        self.hidden = History(store)
        self.ahead: tuple[SentAhead, ...] = ()
        self.epoch = Epoch()
        self._masks: History | None = None  # None while no sequence is padded
        self._positions: History | None = None  # None while the tokens are simply counted

    @property
    def num_tokens(self) -> int:
        """How many tokens of each sequence there are."""
        return self.hidden.num_tokens

    @property
    def like(self) -> torch.Tensor:
        """Inputs [B, 1, D] of the last token, as an example of shape and dtype."""
        return self.hidden.since(self.num_tokens - 1)

    @property
    def are_padded(self) -> bool:
        """Whether any sequence has padding."""
        return self._masks is not None

    def within_step(self, position: int, end: int) -> int:
        """The `end`, or where the step ends to which the token at a position belongs: no message has tokens of two."""
        return min([end, *(each.start for each in self.ahead if each.start > position)])

    @property
    def first_ahead(self) -> tuple[int, ...]:
        """The position from which on all tokens were sent ahead, if any were."""
        return tuple(each.start for each in self.ahead[:1])

    def take_back_ahead(self, stages: Sequence[Stage]) -> tuple[int, ...]:
        """Forget all tokens that were sent ahead, also on these stages: all that there are. Returns `first_ahead`."""
        first = self.first_ahead
        for start in first:
            self.crop(start)
            self.forget(start, stages)
        return first

    def append_ahead(self, steps: Sequence[StepInputs], *, wire: Encoding) -> None:
        """Let these steps, and no others, be ahead. They are not padded; the first of them may be so already."""
        for step in steps[len(self.ahead) :]:
            self.ahead = (*self.ahead, SentAhead(self.num_tokens, step))
            self.append(as_received(step.hidden_BTD, wire), step.positions_BT, None)

    def reach_ahead(self, position: int, hidden_BTD: torch.Tensor, later: Sequence[StepInputs]) -> bool:
        """Whether a step with these inputs is the first of those ahead, and some first ones of the `later` the others.

        Then it is ahead no more.
        """
        if not self.ahead or self.ahead[0].start != position or self.ahead[0].step.hidden_BTD is not hidden_BTD:
            return False
        others = self.ahead[1:]
        if len(others) > len(later) or any(each.step is not step for each, step in zip(others, later, strict=False)):
            return False
        self.ahead = others
        return True

    def append(self, hidden_BTD: torch.Tensor, positions_BT: torch.Tensor | None, mask_BS: torch.Tensor | None) -> None:
        """Add tokens. `mask_BS`, 0 where a token is padding, covers the new tokens or all tokens.

        Raises `UserError` for a mask that changes the padding of old tokens: servers have computed them.
        """
        mask_BT = None
        if mask_BS is not None:
            self._check_past(mask_BS[:, : -hidden_BTD.shape[1]])
            mask_BT = mask_BS[:, -hidden_BTD.shape[1] :]
            mask_BT = None if mask_BT.all() else mask_BT
        start = self.num_tokens
        self._positions = _logged(self._positions, positions_BT, start, torch.arange, hidden_BTD)
        self._masks = _logged(
            self._masks, mask_BT, start, lambda start, end: torch.ones(end - start, dtype=torch.uint8), hidden_BTD
        )
        self.hidden.append(hidden_BTD)
        if start < PAGE_TOKENS <= self.num_tokens and not self.are_padded:
            was_sent = self._beginnings.note(self._first_pages())
            self.are_new = not was_sent and isinstance(self.salt, DrawnSalt)

    def _first_pages(self) -> list[bytes]:
        """The name of the first page of each sequence, whatever blocks and adapters it is for."""
        positions_BT = self.positions(0, PAGE_TOKENS)
        root, counted_T = root_hash(Span(0, 1), self.salt), torch.arange(PAGE_TOKENS)
        return [
            next_hash(root, hidden_TD, counted_T if positions_BT is None else positions_BT[row])
            for row, hidden_TD in enumerate(self.hidden.between(0, PAGE_TOKENS))
        ]

    def _check_past(self, mask_BS: torch.Tensor) -> None:
        if not mask_BS.shape[1]:
            return
        known_BS = self.mask(0, self.num_tokens)
        if not (mask_BS.all() if known_BS is None else torch.equal(mask_BS, known_BS)):
            raise UserError(
                "the attention mask differs from the earlier one for tokens that the session has read",
                hint="pass the mask of all tokens, with the same padding as before",
            )

    def crop(self, num_tokens: int) -> None:
        """Forget all tokens after the first `num_tokens`."""
        for log in (self.hidden, self._masks, self._positions):
            if log is not None:
                log.crop(num_tokens)
        self.ahead = tuple(each for each in self.ahead if each.end <= num_tokens)

    def rearrange(self, rows: Sequence[int], stages: Sequence[Stage]) -> None:
        """From now on, sequence i continues the one that was `rows[i]`, also on these stages: all that there are."""
        logs = [self.hidden, *(stage.history for stage in stages)]  # a standby has that of the stage it may replace
        logs += [log for log in (self._masks, self._positions) if log is not None]
        for log in dict.fromkeys(logs):
            log.select_rows(rows)
        for stage in stages:
            stage.select_rows(rows)
        self.epoch.advance(EpochReason.REARRANGED)

    def forget(self, num_tokens: int, stages: Sequence[Stage]) -> None:
        """All tokens after the first `num_tokens` were forgotten: these stages, all that there are, forget them too."""
        for stage in stages:
            stage.crop(num_tokens)
        self.epoch.advance(EpochReason.CROPPED)

    def positions(self, start: int, end: int) -> torch.Tensor | None:
        """The positions [B, end - start] of some tokens; None if they are simply counted."""
        return None if self._positions is None else self._positions.between(start, end)

    def mask(self, start: int, end: int) -> torch.Tensor | None:
        """The padding mask [B, end - start] of some tokens, 0 where one is padding; None if no token ever was."""
        return None if self._masks is None else self._masks.between(start, end)


def _logged(
    log: History | None,
    piece_BT: torch.Tensor | None,
    position: int,
    default: Callable[[int, int], torch.Tensor],
    hidden_BTD: torch.Tensor,
) -> History | None:
    """The log with a piece for new tokens. There is none as long as every token has its `default`.

    `default(start, end)` gives the values of some tokens; `position` is that of the first new token.
    """
    if log is None and piece_BT is None:
        return None
    batch_size, num_tokens, _ = hidden_BTD.shape
    if log is None:
        log = History(HistoryStore())  # a few bytes a token, which stay exact and in memory
        if position:
            log.append(default(0, position).expand(batch_size, -1))
    if piece_BT is None:
        piece_BT = default(position, position + num_tokens).expand(batch_size, -1)
    log.append(piece_BT)
    log.settle(log.num_tokens)
    return log
