"""What PETALS' users read from a model's config and set there after the model was opened."""

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

_ANEW = "open the model anew: from_pretrained(..., {}=...)"

_FATES: Mapping[str, Fate] = {
    "initial_peers": Refused(_ANEW.format("initial_peers"), unless=()),
    "active_adapter": Refused(_ANEW.format("active_adapter") + ", or let PEFT load it", unless=()),
    "tuning_mode": Refused(_ANEW.format("tuning_mode"), unless=()),
    "pre_seq_len": Refused(_ANEW.format("pre_seq_len"), unless=()),
    **PETALS,
}


class ConfigAttributes:
    """Watches the attributes of one model's config: those of servers are followed, changes of others are refused.

    They are looked at whenever the blocks are used, because a config tells nothing of its changes.
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
        """Let the client use the servers that the config allows now.

        Raises `UserError` if anything else was changed, or for a name that no server has.
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
            wanted = replace(self._swarm.config, allowed_servers=allowed_servers, blocked_servers=blocked_servers)
            found = self._with_whole_ids(wanted)
            self._swarm.permit(found.allowed_servers, found.blocked_servers)
            self._permitted = permitted

    def __deepcopy__(self, memo: dict[int, Any]) -> ConfigAttributes:
        """A copied model has its own config and shares the connection, so a change concerns both."""
        other = copy.copy(self)
        other._config = copy.deepcopy(self._config, memo)
        return other
