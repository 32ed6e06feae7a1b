"""An invitation: what a swarm serves, complete enough for a machine that knows nothing else of it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields

from shoal.errors import SwarmError

DIGEST_BYTES = 8
"""The digest in an invite code. To find another invitation with the same one takes 2^64 attempts."""
_VERSION = 1
_MOST = 256  # characters of a field
FORMS = {
    "model": re.compile(r".+"),
    "dtype": re.compile(r"float32|bfloat16|float16"),
    "quantization": re.compile(r"none|int8|nf4"),
    "manifest": re.compile(r"([0-9a-f]{64})?", re.ASCII),
    "hub": re.compile(r"(([\w-][\w.-]*/)?[\w-][\w.-]*)?", re.ASCII),
    "revision": re.compile(r"([0-9a-f]{40})?", re.ASCII),
}
"""What a field must be like. A member may have made an invitation up, and others act on it."""


@dataclass(frozen=True)
class Invitation:
    """A model by its name to show, its `key` in the directory, and the `fingerprint` of its exact weights.

    `manifest` is the name of the list of its files' pieces; "" if members cannot give them. `hub` and `revision` are
    the model's id and commit on the hub; "" if it is not from there. `dtype` and `quantization` are those of the swarm.
    """

    model: str
    key: str
    fingerprint: str
    dtype: str
    quantization: str
    manifest: str = ""
    hub: str = ""
    revision: str = ""

    @property
    def text(self) -> str:
        """The invitation as it travels: JSON, equal for equal invitations."""
        return json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """What an invite code names it by, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).digest()[:DIGEST_BYTES].hex()

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """The reverse of `text`. Raises `SwarmError` for anything else."""
        try:
            content = json.loads(text)
            if content.pop("version") != _VERSION:
                raise SwarmError("this invitation is of another version of shoal", hint="use the same version")
            is_sound = content.keys() == {each.name for each in fields(cls)} and all(
                isinstance(value, str) and len(value) <= _MOST and value.isprintable() for value in content.values()
            )
            is_sound = is_sound and all(form.fullmatch(content[name]) for name, form in FORMS.items())
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            is_sound = False
        if is_sound and (invitation := cls(**content)).text == text:
            return invitation
        raise SwarmError("a member sent an invitation that is none")
