"""What PETALS' users read from a model's config and set there after the model was opened."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from shoal.client.chain import Chain
from shoal.client.config import peers_of
from shoal.client.keywords import PETALS, Taken
from shoal.errors import UserError

_FIXED: Mapping[str, str] = {
    "initial_peers": "open the model anew: from_pretrained(..., initial_peers=...)",
    "active_adapter": "open the model anew: from_pretrained(..., active_adapter=...), or let PEFT load it",
    "tuning_mode": "open the model anew: from_pretrained(..., tuning_mode=...)",
    "pre_seq_len": "open the model anew: from_pretrained(..., pre_seq_len=...)",
    **{name: fate.hint for name, fate in PETALS.items() if not isinstance(fate, Taken) and hasattr(fate, "hint")},
}


class ConfigAttributes:
    """Watches the attributes of one model's config: those of servers are followed, changes of others are refused.

    They are looked at whenever the blocks are used, because a config tells nobody of its changes.
    """

    def __init__(
        self, config: PreTrainedConfig, chain: Chain, *, initial_peers: Sequence[str], active_adapter: str | None
    ) -> None:
        self._config = config
        self._chain = chain
        allowed, blocked = chain.config.allowed_servers, chain.config.blocked_servers
        config.initial_peers = list(initial_peers)
        config.active_adapter = active_adapter
        config.allowed_servers = None if allowed is None else sorted(allowed)
        config.blocked_servers = sorted(blocked)
        self._permitted = allowed, blocked
        self._fixed = self._now()

    def _now(self) -> dict[str, Any]:
        return {name: copy.copy(vars(self._config)[name]) for name in _FIXED if name in vars(self._config)}

    def follow(self) -> None:
        """Let the client use the servers that the config allows now.

        Raises `UserError` if anything else was changed.
        """
        given = vars(self._config)
        for name, hint in _FIXED.items():
            if name in given and given[name] != self._fixed.get(name):
                raise UserError(f"model.config.{name} cannot be changed while the model is open", hint=hint)
        allowed, blocked = given.get("allowed_servers"), given.get("blocked_servers")
        permitted = None if allowed is None else peers_of(allowed), peers_of(blocked or ())
        if permitted != self._permitted:
            self._permitted = permitted
            self._chain.permit(*permitted)

    def __deepcopy__(self, memo: dict[int, Any]) -> ConfigAttributes:
        """A copied model has its own config and shares the connection, so a change concerns both."""
        other = copy.copy(self)
        other._config = copy.deepcopy(self._config, memo)
        return other
