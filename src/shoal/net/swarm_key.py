"""The key of a closed swarm: without it, a peer is not listed, reads no list, and opens no stream.

Both ends of a connection prove that they have the key, each with a keyed hash of both peer ids. libp2p has checked the
ids, so a proof is of use to its sender only, and with its receiver only. The key itself never travels, except in an
invite code.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from shoal.errors import UserError

KEY_BYTES = 16
PROOF_BYTES = 32
SWARM_KEY = "SHOAL_SWARM_KEY"
"""The environment variable with the file of the key, where none is named."""
_PREFIX = "shoal-swarm-key-1 "
_MOST_BYTES = 200  # of a file


@dataclass(frozen=True)
class SwarmKey:
    """`KEY_BYTES` secret bytes, which all members of a swarm have. They appear in no log."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a swarm key of {len(self.secret)} bytes")

    @classmethod
    def generate(cls) -> SwarmKey:
        """A new key."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @property
    def text(self) -> str:
        """The key as a line of its file."""
        return _PREFIX + base64.b32encode(self.secret).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> SwarmKey:
        """The reverse of `text`. Raises `ValueError` for anything else."""
        prefix, encoded = text[: len(_PREFIX)], text[len(_PREFIX) :].strip()
        if prefix != _PREFIX:
            raise ValueError("not a swarm key")
        try:
            return cls(base64.b32decode(encoded + "=" * (-len(encoded) % 8)))
        except binascii.Error:
            raise ValueError("not a swarm key") from None

    def proof(self, purpose: str, sender: str, receiver: str) -> bytes:
        """What shows the peer `receiver`, for one purpose, that the peer `sender` has the key."""
        return hmac.digest(self.secret, "\0".join((purpose, sender, receiver)).encode(), hashlib.sha256)

    def accepts(self, proof: bytes, purpose: str, sender: str, receiver: str) -> bool:
        """Whether `sender` made this proof with the same key."""
        return hmac.compare_digest(proof, self.proof(purpose, sender, receiver))


def key_in(named: str | Path | None, *, create: bool = False) -> SwarmKey | None:
    """The key in the file that a user names, or else in that of `$SHOAL_SWARM_KEY`; None if neither is given.

    `create`: make a missing file, with a new key, which only its owner may read. Raises `UserError` for a file that is
    missing, cannot be read, or holds no key.
    """
    path = file_of_key(named)
    if path is None:
        return None
    try:
        if create and not path.exists():
            return _created(path)
        with path.open("rb") as file:
            return SwarmKey.parse(file.read(_MOST_BYTES).decode())
    except FileNotFoundError:
        hint = "copy it from a machine of the swarm; `shoal up --swarm-key FILE` makes one for a new swarm"
        raise UserError(f"the swarm key {path} does not exist", hint=hint) from None
    except ValueError:
        raise UserError(f"{path} is not a swarm key", hint=f"its line begins with {_PREFIX.strip()!r}") from None
    except OSError as failure:
        raise UserError(f"the swarm key {path} cannot be used: {failure.strerror}") from None


def file_of_key(named: str | Path | None) -> Path | None:
    """The file that a user names, or else that of `$SHOAL_SWARM_KEY`; None if neither is given."""
    given = os.environ.get(SWARM_KEY) if named is None else named
    return Path(given).expanduser() if given else None


def _created(path: Path) -> SwarmKey:
    path.parent.mkdir(parents=True, exist_ok=True)
    key = SwarmKey.generate()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key.text + "\n")
    return key
