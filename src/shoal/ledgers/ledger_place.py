"""Where a machine keeps its ledgers. Nothing here imports anything slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LedgerPlace:
    """Where a machine keeps its ledgers, and the identity files of its servers.

    `identities` are those that the user names; `None` are those that `shoal serve` keeps beside the ledgers. With none,
    clients act for no server.
    """

    folder: Path
    identities: tuple[Path, ...] | None = None

    @classmethod
    def of(cls, cache: Path, identities: Sequence[Path] | None = None) -> LedgerPlace:
        """The place below shoal's cache folder."""
        return cls(cache / "contribution", None if identities is None else tuple(identities))
