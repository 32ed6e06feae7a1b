"""The layout of `shoal COMMAND --help`: the options of a large command stand in groups, as plain text."""

from __future__ import annotations

from typing import Any

import typer.core

GROUPS = {
    "Machines": {"memory", "round_trip", "bandwidth", "tflops"},
    "Swarm": {"new_swarm", "initial_peers"},
    "Model": {
        *("blocks", "num_blocks", "placement", "move"),
        *("adapter", "serve_head", "revision", "allow_uncertified"),
    },
    "Text": {"max_new_tokens", "temperature", "top_p", "top_k", "seed", "num_beams", "system", "max_length"},
    "Computation": {"device", "threads", "when", "dtype", "quantization", "remote_head", "head_quantization"},
    "Cache and training": {
        *("cache_tokens", "cache_dtype", "prefill_share"),
        *("training", "training_share", "training_memory", "adapter_memory"),
    },
    "Route and failures": {
        "chooser",
        "pin",
        "patience",
        "standby",
        "draft",
        "audits",
        "own_server",
        "history",
        "history_memory",
        "wire",
    },
    "Network": {"name", "host", "port", "identity", "announce", "relay", "serve_relay", "upnp", "lan", "drain_timeout"},
}
"""The parameters of commands in each group. Parameters that are in none of them follow under `OTHER`."""
OTHER = "Options"
MIN_GROUPED = 12
"""A command with fewer options lists them without groups: it would have nearly as many headings as options."""
MAX_NAMES = 30
"""Characters of an option's names. The description of a longer one begins on the next line."""


class GroupedCommand(typer.core.TyperCommand):
    """A command whose help lists its options by `GROUPS`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records = [(each, record) for each in self.get_params(ctx) if (record := each.get_help_record(ctx)) is not None]
        options = [(str(each.name), record) for each, record in records if each.param_type_name == "option"]
        arguments = [record for each, record in records if each.param_type_name == "argument"]
        sections = {"Arguments": arguments, **_grouped(options if len(options) >= MIN_GROUPED else [])}
        grouped = {record for section in sections.values() for record in section}
        sections[OTHER] = [record for _, record in options if record not in grouped]
        widest = min(MAX_NAMES, max(len(names) for section in sections.values() for names, _ in section))
        for title, section in sections.items():
            if section:
                with formatter.section(title):
                    formatter.write_dl([(names.ljust(widest), text) for names, text in section])


def _grouped(options: list[tuple[str, tuple[str, str]]]) -> dict[str, list[tuple[str, str]]]:
    return {title: [record for name, record in options if name in names] for title, names in GROUPS.items()}
