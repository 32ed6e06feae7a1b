"""Attributes of a model's config that PETALS' users read, and set after the model was opened."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from shoal.client.options.client_options import ClientOptions, parse_peers
from shoal.client.options.keywords import PETALS, Fate, Refused
from shoal.client.swarm.swarm import Swarm
from shoal.errors import UserError

_REOPEN = "open the model again: from_pretrained(..., {}=...)"

_FATES: Mapping[str, Fate] = {
    "initial_peers": Refused(_REOPEN.format("initial_peers"), unless=()),
    "active_adapter": Refused(_REOPEN.format("active_adapter") + ", or let PEFT load it", unless=()),
    "tuning_mode": Refused(_REOPEN.format("tuning_mode"), unless=()),
    "pre_seq_len": Refused(_REOPEN.format("pre_seq_len"), unless=()),
    **PETALS,
}


class ConfigAttributes:
    """Applies changes of `allowed_servers` and `blocked_servers` on one model's config, and refuses others.

    A config does not report its changes, so `follow` compares the attributes whenever the blocks are used.
    `with_whole_ids` looks up the peer ids of servers that are named in another way.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        swarm: Swarm,
        opened_with: Mapping[str, Any],
        *,
        with_whole_ids: Callable[[ClientOptions], ClientOptions],
    ) -> None:
        self._config = config
        self._swarm = swarm
        self._with_whole_ids = with_whole_ids
        allowed, blocked = swarm.config.allowed_servers, swarm.config.blocked_servers
        config.allowed_servers = None if allowed is None else sorted(allowed)
        config.blocked_servers = sorted(blocked)
        self._permitted = allowed, blocked
        for name, value in opened_with.items():
            setattr(config, name, copy.copy(value))
        self._opened_with = opened_with

    def follow(self) -> None:
        """Apply the servers that the config allows now.

        Raises `UserError` for an attribute that cannot be changed, and for a name that is not that of one server.
        """
        given = vars(self._config)
        for name in _FATES.keys() & given.keys():
            fate, value = _FATES[name], given[name]
            if isinstance(fate, Refused) and not fate.allows(value) and value != self._opened_with.get(name):
                raise UserError(f"model.config.{name} cannot be changed while the model is open", hint=fate.hint)
        allowed, blocked = given.get("allowed_servers"), given.get("blocked_servers")
        permitted = None if allowed is None else parse_peers(allowed), parse_peers(blocked or ())
        if permitted != self._permitted:
            allowed_servers, blocked_servers = permitted
            permitted_options = replace(
                self._swarm.config, allowed_servers=allowed_servers, blocked_servers=blocked_servers
            )
            found = self._with_whole_ids(permitted_options)
            self._swarm.permit(found.allowed_servers, found.blocked_servers)
            self._permitted = permitted

    def __deepcopy__(self, memo: dict[int, Any]) -> ConfigAttributes:
        """The attributes of a copied model: of its own config, and of the same `Swarm`, so a change applies to both."""
        other = copy.copy(self)
        other._config = copy.deepcopy(self._config, memo)
        return other
