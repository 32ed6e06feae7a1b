"""Clusters with the profiles of their machines, read from JSON files that users name. docs/scale.md has the format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shoal.errors import UserError
from shoal.protocol import MAX_BLOCKS
from shoal.simulator.world.hardware import LOAD_SECONDS, Hardware, profiled
from shoal.simulator.world.json_files import read_json
from shoal.spans import Span

Positive = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]
LinkPair = tuple[Positive, Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)]]


class ModelSizes(BaseModel):
    """A model of a cluster file: its blocks, and the bytes that a token's hidden state has on a link."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    activation_bytes: Positive


class Profile(BaseModel):
    """Tokens per second of a kind of machine, through spans of 1, 2, … blocks."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    max_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    tokens_per_s: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=MAX_BLOCKS)]

    @model_validator(mode="after")
    def _has_all_lengths(self) -> Profile:
        if len(self.tokens_per_s) != self.max_blocks:
            raise ValueError("`tokens_per_s` has one speed for each length of a span")
        return self


class ClusterSpec(BaseModel):
    """One cluster: the kind of each machine, profiles by model and kind, and published placements by model and name.

    A link is a pair of bytes per second and seconds. `uniform_link` is that of all pairs; otherwise `client_links` has
    the client's link to each machine, and `links[a][b - a - 1]` that of the machines a < b.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    nodes: Annotated[tuple[str, ...], Field(min_length=1, max_length=100_000)]
    profiles: dict[str, dict[str, Profile]]
    layouts: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {}
    uniform_link: LinkPair | None = None
    client_links: tuple[LinkPair, ...] = ()
    links: tuple[tuple[LinkPair, ...], ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterSpec:
        for model, profiles in self.profiles.items():
            if missing := set(self.nodes) - set(profiles):
                raise ValueError(f"model {model} has no profile of {', '.join(sorted(missing))}")
        if any(len(spans) != len(self.nodes) for rules in self.layouts.values() for spans in rules.values()):
            raise ValueError("a layout has one span for each machine")
        if self.uniform_link is None and len(self.client_links) != len(self.nodes):
            raise ValueError("either `uniform_link`, or `client_links` with one for each machine")
        return self


class ClusterFile(BaseModel):
    """The clusters of a file, and the models that they serve."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    models: dict[str, ModelSizes]
    clusters: Annotated[dict[str, ClusterSpec], Field(min_length=1)]

    @model_validator(mode="after")
    def _models_are_known(self) -> ClusterFile:
        named = {model for cluster in self.clusters.values() for model in cluster.profiles}
        if unknown := named - set(self.models):
            raise ValueError(f"no sizes of {', '.join(sorted(unknown))}")
        return self


@dataclass(frozen=True)
class Cluster:
    """A cluster that serves one model: `layouts` are published placements, the span of each machine by name."""

    name: str
    num_blocks: int
    machines: tuple[Hardware, ...]
    layouts: dict[str, tuple[Span, ...]]


def read_clusters(path: Path) -> list[Cluster]:
    """All clusters of a file, once for each model. Raises `UserError` if it cannot be read, or has another format."""
    file = read_json(path, ClusterFile)
    return [
        _cluster(file, name, model) for name, spec in sorted(file.clusters.items()) for model in sorted(spec.profiles)
    ]


def _cluster(file: ClusterFile, name: str, model: str) -> Cluster:
    spec, sizes = file.clusters[name], file.models[model]
    machines = tuple(
        profiled(
            kind,
            spec.profiles[model][kind].tokens_per_s[: sizes.blocks],
            network_speed=_bytes_per_second(spec, index) / sizes.activation_bytes,
            load_seconds=LOAD_SECONDS,
        )
        for index, kind in enumerate(spec.nodes)
    )
    layouts = {
        rule: tuple(_span(each, sizes.blocks, name) for each in spans)
        for rule, spans in spec.layouts.get(model, {}).items()
    }
    return Cluster(f"{name}/{model}", sizes.blocks, machines, layouts)


def _span(pair: tuple[int, int], num_blocks: int, cluster: str) -> Span:
    start, end = pair
    if not 0 <= start < end <= num_blocks:
        raise UserError(f"cluster {cluster}: {start}:{end} is no span of {num_blocks} blocks")
    return Span(start, end)


def _bytes_per_second(spec: ClusterSpec, index: int) -> float:
    """The machine's fastest link: what it could carry if it had neighbors there."""
    if spec.uniform_link is not None:
        return spec.uniform_link[0]
    others = [row[index - first - 1][0] for first, row in enumerate(spec.links) if 0 < index - first <= len(row)]
    own = [link[0] for link in spec.links[index]] if index < len(spec.links) else []
    return max([spec.client_links[index][0], *others, *own])
