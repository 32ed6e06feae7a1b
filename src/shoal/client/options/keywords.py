"""Keywords that users bring along from Transformers and PETALS, and what becomes of each.

Some mean nothing here and are taken, some have another name, the others are refused with a hint what to do instead.
None is ignored that would have changed anything.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import UserError


@dataclass(frozen=True)
class Taken:
    """Changes nothing here, whatever its value."""


@dataclass(frozen=True)
class Renamed:
    """Is called `to` here, and means what `convert` makes of it; `None` is the default."""

    to: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Refused:
    """Cannot be had; the values `unless` ask for nothing and are taken."""

    hint: str
    unless: tuple[Any, ...] = (None, False)

    def allows(self, value: Any) -> bool:
        """Whether this value asks for nothing."""
        return any(value is each for each in self.unless)


Fate = Taken | Renamed | Refused

_SERVERS_QUANTIZE = 'servers choose (shoal serve --quantization nf4); for the output head: head_quantization="nf4"'
_ONE_DEVICE = 'what is not blocks is on one device: device="cuda"'
_PATIENCE = "a server that fails is replaced at once; after 30 s without any, MissingBlocks is raised"
_MEASURED = "the client measures its servers by itself"
_NETWORK = 'the network needs initial_peers="ADDRESS ..." only'
_INSIDE = "what is inside the blocks stays on the servers; slices of model.transformer.h give what is between them"
_EXACT_CHECKPOINT = "the swarm computes with the checkpoint as it is"


def _device_of(device_map: Any) -> Any:
    """The one device that a `device_map` names. Raises `UserError` for several."""
    if isinstance(device_map, Mapping):
        devices = list(dict.fromkeys(map(str, device_map.values())))
        if len(devices) != 1:
            raise UserError(f"device_map={device_map}: there are no layers here to be divided", hint=_ONE_DEVICE)
        (device_map,) = devices
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "auto"
    if device_map == "disk":
        raise UserError("device_map: nothing is left on the disk here", hint=_ONE_DEVICE)
    return f"cuda:{device_map}" if str(device_map).isdecimal() else device_map


def _token_of(token: Any) -> Any:
    return None if token is True else token  # the one that `hf auth login` has stored, as always


TRANSFORMERS: Mapping[str, Fate] = {
    "torch_dtype": Renamed("dtype"),
    "device_map": Renamed("device", _device_of),
    "use_auth_token": Renamed("token", _token_of),
    # There is no attention, and there are no experts, on this side.
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
    "trust_remote_code": Refused("code that comes with a model is never run; docs/models.md lists the families"),
    "config": Refused("the checkpoint's own config is read; name what you change in it, such as num_labels=3"),
    "state_dict": Refused(_EXACT_CHECKPOINT + "; model.load_state_dict(..., strict=False) changes this side of it"),
    "ignore_mismatched_sizes": Refused(_EXACT_CHECKPOINT),
    "key_mapping": Refused(_EXACT_CHECKPOINT),
    "variant": Refused(_EXACT_CHECKPOINT + ': only model.safetensors is read, in any dtype="float32"|"bfloat16"'),
    "subfolder": Refused("name the folder itself: from_pretrained(FOLDER)", unless=(None, "")),
    "gguf_file": Refused(
        "convert it: AutoModelForCausalLM.from_pretrained(MODEL, gguf_file=...).save_pretrained(FOLDER)"
    ),
    "quantization_config": Refused(_SERVERS_QUANTIZE),
    "load_in_4bit": Refused(_SERVERS_QUANTIZE),
    "load_in_8bit": Refused(_SERVERS_QUANTIZE),
    "tp_plan": Refused("blocks are on servers, so there is nothing here to be divided"),
    "tp_size": Refused("blocks are on servers, so there is nothing here to be divided"),
    "device_mesh": Refused("blocks are on servers, so there is nothing here to be divided"),
    "distributed_config": Refused("blocks are on servers, so there is nothing here to be divided"),
    "force_download": Refused("delete it from the hub's cache: hf cache rm"),
    "proxies": Refused("set HTTPS_PROXY"),
    "mirror": Refused("set HF_ENDPOINT"),
    "from_tf": Refused("only safetensors files are read"),
    "from_flax": Refused("only safetensors files are read"),
    "output_loading_info": Refused("a checkpoint that lacks anything is refused, so there is nothing to tell"),
    "adapter_kwargs": Refused("open it with active_adapter=, or with PEFT: PeftModel.from_pretrained(model, ADAPTER)"),
    "adapter_name": Refused("open it with active_adapter=, or with PEFT: PeftModel.from_pretrained(model, ADAPTER)"),
    "output_hidden_states": Refused(_INSIDE),
    "output_attentions": Refused(_INSIDE),
}

PETALS: Mapping[str, Fate] = {
    "show_route": Taken(),  # the log has it at the level INFO, and session.hops
    "use_server_to_server": Refused("servers always send straight to the next", unless=(None, True)),
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
    "dht_prefix": Refused("a swarm's models are told apart by their weights; nothing has to be named"),
    "daemon_startup_timeout": Refused(_NETWORK),
    "identity_path": Refused(_NETWORK),
    "use_auto_relay": Refused(_NETWORK),
    "use_relay": Refused(_NETWORK),
}

KEYWORDS: Mapping[str, Fate] = {**TRANSFORMERS, **PETALS}

DEFAULTS: Mapping[str, Any] = {"dtype": "auto", "device": "cpu", "token": None}
"""Of our own keywords under which others may be brought along."""


@dataclass(frozen=True)
class Keywords:
    """What a user asked for: our own keywords, and changes of the model's config."""

    own: Mapping[str, Any]
    config_changes: Mapping[str, Any] = field(default_factory=dict)


def resolve(brought: Mapping[str, Any], own: Mapping[str, Any]) -> Keywords:
    """What keywords that are not ours say, together with the values of our `own` that `DEFAULTS` lists.

    Those that the table does not have are changes of the config. Raises `UserError` for what cannot be had, and for
    two names of one thing with different values.
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
                    raise UserError(f"{name}={value!r}, and {to}={meant[to]!r}", hint=f"say {to}= only")
                meant[to] = converted
            case Refused() as refused:
                if not refused.allows(value):
                    raise UserError(f"from_pretrained takes no {name}={_short(value)} here", hint=refused.hint)
    return Keywords(meant, changes)


def similar(name: str, known: Iterable[str]) -> str | None:
    """A hint for a keyword that is not known."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"did you mean {found[0]}?" if found else None


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
