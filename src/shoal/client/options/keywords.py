"""Keywords of Transformers and PETALS, and what `from_pretrained` does with each.

A keyword that changes nothing here is accepted, one that has another name here is renamed, and every other is refused
with a hint. No keyword is ignored that would have changed a result.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import UserError


@dataclass(frozen=True)
class Taken:
    """Accepted with any value, because it changes nothing here."""


@dataclass(frozen=True)
class Renamed:
    """Called `to` here, with the value that `convert` returns. `None` leaves the default."""

    to: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Refused:
    """Not supported. Only the values in `unless`, which ask for nothing, are accepted."""

    hint: str
    unless: tuple[Any, ...] = (None, False)

    def allows(self, value: Any) -> bool:
        """Whether the keyword is accepted with this value."""
        return any(value is each for each in self.unless)


Fate = Taken | Renamed | Refused

_SERVERS_QUANTIZE = 'servers choose (shoal serve --quantization nf4); for the output head: head_quantization="nf4"'
_ONE_DEVICE = 'everything except the blocks is on one device: device="cuda"'
_PATIENCE = "a server that fails is replaced at once; after patience=180 seconds without a server, MissingBlocks is raised"
_MEASURED = "the client decides itself when it measures servers"
_NETWORK = 'the network needs only initial_peers="ADDRESS ..."'
_INSIDE = "states inside the blocks stay on the servers; slices of model.transformer.h return those between them"
_EXACT_CHECKPOINT = "the swarm computes with the checkpoint as it is"


def _device_of(device_map: Any) -> Any:
    """The one device that a `device_map` names. Raises `UserError` for several, and for the disk."""
    if isinstance(device_map, Mapping):
        devices = list(dict.fromkeys(map(str, device_map.values())))
        if len(devices) != 1:
            raise UserError(
                f"device_map={device_map}: there are no layers here to divide among devices", hint=_ONE_DEVICE
            )
        (device_map,) = devices
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "auto"
    if device_map == "disk":
        raise UserError("device_map='disk': the client keeps nothing on the disk", hint=_ONE_DEVICE)
    return f"cuda:{device_map}" if str(device_map).isdecimal() else device_map


def _token_of(token: Any) -> Any:
    return None if token is True else token  # True is the token that `hf auth login` stored, and so is None


TRANSFORMERS: Mapping[str, Fate] = {
    "torch_dtype": Renamed("dtype"),
    "device_map": Renamed("device", _device_of),
    "use_auth_token": Renamed("token", _token_of),
    # The client computes no attention and no experts.
    "attn_implementation": Taken(),
    "experts_implementation": Taken(),
    "use_flash_attention_2": Taken(),
    "use_kernels": Taken(),
    "low_cpu_mem_usage": Taken(),
    "max_memory": Taken(),
    "offload_folder": Taken(),
    "offload_state_dict": Taken(),
    "offload_buffers": Taken(),
    "resume_download": Taken(),
    "weights_only": Taken(),
    "code_revision": Taken(),
    "use_safetensors": Refused("only safetensors files are read, because pickles run code", unless=(None, True)),
    "trust_remote_code": Refused(
        "code that comes with a model is never run; docs/models.md lists the supported families"
    ),
    "config": Refused("the checkpoint's own config is read; pass your changes by name, such as num_labels=3"),
    "state_dict": Refused(
        _EXACT_CHECKPOINT + "; model.load_state_dict(..., strict=False) changes the client's parameters"
    ),
    "ignore_mismatched_sizes": Refused(_EXACT_CHECKPOINT),
    "key_mapping": Refused(_EXACT_CHECKPOINT),
    "variant": Refused(_EXACT_CHECKPOINT + ': only model.safetensors is read, in any dtype="float32"|"bfloat16"'),
    "subfolder": Refused("name the folder itself: from_pretrained(FOLDER)", unless=(None, "")),
    "gguf_file": Refused(
        "convert the file: AutoModelForCausalLM.from_pretrained(MODEL, gguf_file=...).save_pretrained(FOLDER)"
    ),
    "quantization_config": Refused(_SERVERS_QUANTIZE),
    "load_in_4bit": Refused(_SERVERS_QUANTIZE),
    "load_in_8bit": Refused(_SERVERS_QUANTIZE),
    "tp_plan": Refused("blocks are on servers, so there is nothing here to divide"),
    "tp_size": Refused("blocks are on servers, so there is nothing here to divide"),
    "device_mesh": Refused("blocks are on servers, so there is nothing here to divide"),
    "distributed_config": Refused("blocks are on servers, so there is nothing here to divide"),
    "force_download": Refused("delete the model from the hub's cache: hf cache rm"),
    "proxies": Refused("set HTTPS_PROXY"),
    "mirror": Refused("set HF_ENDPOINT"),
    "from_tf": Refused("only safetensors files are read"),
    "from_flax": Refused("only safetensors files are read"),
    "output_loading_info": Refused("a checkpoint that lacks weights is refused, so there is no loading info"),
    "adapter_kwargs": Refused("open it with active_adapter=, or with PEFT: PeftModel.from_pretrained(model, ADAPTER)"),
    "adapter_name": Refused("open it with active_adapter=, or with PEFT: PeftModel.from_pretrained(model, ADAPTER)"),
    "output_hidden_states": Refused(_INSIDE),
    "output_attentions": Refused(_INSIDE),
}

PETALS: Mapping[str, Fate] = {
    "show_route": Taken(),  # the log has the route at the level INFO, and so has session.hops
    "use_server_to_server": Refused("servers always send their outputs to the next server", unless=(None, True)),
    "max_retries": Refused(_PATIENCE),
    "request_timeout": Refused(_PATIENCE),
    "session_timeout": Refused(_PATIENCE),
    "connect_timeout": Refused(_PATIENCE),
    "step_timeout": Refused(_PATIENCE),
    "min_backoff": Refused(_PATIENCE),
    "max_backoff": Refused(_PATIENCE),
    "ban_timeout": Refused(_PATIENCE),
    "update_period": Refused(_MEASURED),
    "max_pinged": Refused(_MEASURED),
    "ping_timeout": Refused(_MEASURED),
    "ping_n_servers": Refused(_MEASURED),
    "dht": Refused(_NETWORK),
    "dht_prefix": Refused("a swarm tells its models apart by their weights, so they need no prefix"),
    "daemon_startup_timeout": Refused(_NETWORK),
    "identity_path": Refused(_NETWORK),
    "use_auto_relay": Refused(_NETWORK),
    "use_relay": Refused(_NETWORK),
}

KEYWORDS: Mapping[str, Fate] = {**TRANSFORMERS, **PETALS}

DEFAULTS: Mapping[str, Any] = {"dtype": "auto", "device": "cpu", "token": None}
"""The keywords of ours that others are renamed to, with their defaults."""


@dataclass(frozen=True)
class Keywords:
    """The keywords of a call, resolved: values of the keywords in `DEFAULTS`, and changes of the model's config."""

    own: Mapping[str, Any]
    config_changes: Mapping[str, Any] = field(default_factory=dict)


def resolve(brought: Mapping[str, Any], own: Mapping[str, Any]) -> Keywords:
    """Combine the keywords of a call that are not ours with the values of our `own`, those in `DEFAULTS`.

    A keyword that is not in `KEYWORDS` is a change of the config. Raises `UserError` for a keyword that is refused, and
    for two names of one keyword with different values.
    """
    meant, changes = dict(own), dict[str, Any]()
    for name, value in brought.items():
        match KEYWORDS.get(name):
            case None:
                changes[name] = value
            case Taken():
                pass
            case Renamed(to, convert):
                if value is None:
                    continue
                converted = convert(value)
                if meant[to] not in (DEFAULTS[to], converted):
                    raise UserError(f"{name}={value!r}, and {to}={meant[to]!r}", hint=f"pass only {to}=")
                meant[to] = converted
            case Refused() as refused:
                if not refused.allows(value):
                    raise UserError(f"from_pretrained takes no {name}={_short(value)}", hint=refused.hint)
    return Keywords(meant, changes)


def similar(name: str, known: Iterable[str]) -> str | None:
    """A hint that names the known keyword most like this one, or `None`."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"did you mean {found[0]}?" if found else None


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
