"""Where a machine keeps its ledgers, and the identities of its peers. Nothing here imports anything slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SERVERS = "serve"
"""How the names of the files begin in which servers have their identities."""


def identity_folder(cache: Path) -> Path:
    """Where identities are kept that the user does not name."""
    return cache / "identities"


@dataclass(frozen=True)
class LedgerPlace:
    """Where a machine keeps its ledgers, and the identity files of its servers.

    `identities` are those that the user names; `None` are those that `shoal serve` keeps beside the ledgers. With none,
    clients act for no server.
    """

    folder: Path
    identities: tuple[Path, ...] | None = None

    @property
    def cache(self) -> Path:
        """The folder for all that shoal keeps."""
        return self.folder.parent

    @classmethod
    def of(cls, cache: Path, identities: Sequence[Path] | None = None) -> LedgerPlace:
        """The place below shoal's cache folder."""
        return cls(cache / "contribution", None if identities is None else tuple(identities))
