"""Every certified family in three spans, compared with plain Transformers. Writes docs/models.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import logging

from shoal.model.families import CERTIFIED, CERTIFIED_WITH_VISION, certified_encodings, text_config
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.tensors import LOSSY

from .parity import CHECKS, ROUNDING, Pair, check_encoding, check_rewind
from .tiny_models import SPECIAL, VARIANTS

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
CASES = [
    pytest.param(family, changes, id=f"{family} {variant}".strip())
    for family in sorted(CERTIFIED)
    for variant, changes in [("", {}), *VARIANTS.get(family, {}).items()]
]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars for checkpoints of a few tensors."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@dataclass(frozen=True)
class Finding:
    """A family that passed: its class, the kinds of blocks of the model, and what a server does with its sessions."""

    name: str
    kinds: str
    has_states: bool
    step_by_step: bool
    packable: bool

    @property
    def computed(self) -> str:
        return "packed" if self.packable else "in batches"

    @property
    def rewinds(self) -> str:
        if not self.has_states:
            return "yes"
        return "rebuilt" if self.step_by_step else "from snapshots"

    @property
    def prefixes(self) -> str:
        if not self.has_states:
            return "by the page"
        return "no" if self.step_by_step else "from snapshots"


@pytest.fixture(scope="module")
def passed() -> Iterator[dict[str, Finding]]:
    """The findings for each family that passed. When all families have passed, the document is written."""
    rows: dict[str, Finding] = {}
    yield rows
    if rows.keys() == CERTIFIED:
        DOCUMENT.write_text(document(rows))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_family_in_three_spans_gives_the_results_of_the_whole_model(
    family: str, changes: dict[str, object], passed: dict[str, Finding]
) -> None:
    pair = Pair(family, **changes)
    assert pair.family.model_type == family
    for check in CHECKS.values():
        check(pair)
    for encoding in certified_encodings(family):
        check_encoding(pair, encoding)
    check_rewind(pair)
    finding = Finding(
        type(pair.whole).__name__,
        kinds_of_blocks(pair),
        has_states=any(cache_shapes(body).states for body, _ in pair.blocks.hops),
        step_by_step=pair.family.step_by_step,
        packable=pair.family.packable,
    )
    passed.setdefault(family, finding)


def test_special_sizes_are_given_only_for_certified_families() -> None:
    assert {*SPECIAL, *VARIANTS} <= CERTIFIED


def kinds_of_blocks(pair: Pair) -> str:
    config = text_config(pair.config)
    kinds = list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ["attention"])
    dense_or_sparse = list(getattr(config, "mlp_layer_types", None) or ())
    return ", ".join(
        kind.removesuffix("_attention").replace("_", " ") for kind in dict.fromkeys(kinds + dense_or_sparse)
    )


def also_tested(family: str) -> str:
    return ", ".join(VARIANTS.get(family, ()))


def document(rows: dict[str, Finding]) -> str:
    table = "\n".join(
        f"| `{family}` | {row.name} | {row.kinds} | {row.computed} | {row.rewinds} | {row.prefixes} | "
        f"{encodings_of(family)} | {also_tested(family)} |"
        for family, row in sorted(rows.items())
    )
    with_vision = ", ".join(f"`{model_type}`" for model_type in sorted(CERTIFIED_WITH_VISION))
    tolerances = " and ".join(f"{4 * ROUNDING[encoding]:.1%} in {encoding}" for encoding in LOSSY)
    return INTRODUCTION.format(num_families=len(rows), table=table, with_vision=with_vision, tolerances=tolerances)


def encodings_of(family: str) -> str:
    return ", ".join(encoding for encoding in LOSSY if encoding in certified_encodings(family)) or "raw only"


INTRODUCTION = """\
# Models

<!-- Written by tests/swarm/test_parity.py; run it to update this page. -->

shoal has no code for individual models: a server runs a span of the family's own Transformers layers, and a client runs
the rest. {num_families} families are certified to give the same results in this way as the whole model on one
machine. Other families are refused unless you pass `--allow-uncertified`.

For each family the test suite makes a tiny random model of five blocks with all kinds of blocks of the family, and
saves its checkpoint. It loads the checkpoint twice: with plain Transformers, and as a head with three bodies. Both must
give the same results up to the rounding of float32:

- the logits of a forward pass;
- the logits of a prompt and then of single tokens, with caches, in two sessions with alternating steps;
- the logits of a prompt in two parts;
- greedy generation from prompts of different lengths, padded on the left: the tokens, and the logits of every step;
- beam search: the tokens and the scores;
- the gradients of the input embeddings.

From checkpoints with a vision tower, the language model is served: {with_vision} (its logits without images, and
greedy generation, are equal to those of the vision-language model).

A server computes the next tokens of all sessions in one pass over the weights. *Computed* says how. *Packed*: all
tokens, also those of prompts, are in one row, and only shoal's own attention tells them apart. *In batches*: the next
tokens are a batch of the family's own layers, as in plain Transformers with padding on the left, and prompts are
computed one after another. For both kinds, eight sessions on one server that open, close, branch and rewind at random
are compared with the same sessions computed alone. A model of any family whose rotary embeddings depend on the longest
sequence of a call (`dynamic`, `longrope`) is computed in batches, and only sequences on the same side of that length
share one.

*Goes back* says what happens when a session drops its last tokens, as assisted generation does. The keys and values of
attention are in pages, which are cut at any token. A recurrent or convolutional state has no past. So a server keeps
snapshots of it, every 128 tokens or more, as room allows; the client sends again what came after the last one. *Prefix
reuse* says where a new session can begin, if its first inputs were computed for another session: after any page of 16
tokens, or at a snapshot. Families that are *rebuilt* keep none: Transformers computes what follows a state one token at
a time, which takes longer than the whole prompt.

*On the wire* lists the encodings (`--wire`) in which hidden states and gradients may be sent, in addition to raw. The
same models run with every tensor rounded each of the four times that it is sent. The relative error of the median
token's logits must stay below {tolerances}, and that of its gradient below twice that
(`tests/swarm/parity.py` explains the tolerance). If a router's two best experts are nearly equal, single tokens may
change more, as with any rounding. An encoding that is not listed is refused for the family.

| family | class | kinds of blocks tested | computed | goes back | prefix reuse | on the wire | also tested |
|---|---|---|---|---|---|---|---|
{table}

Not certified are models whose layers share state with each other, so that a span depends on more than its input
(`gemma3n`, `gemma4`, `glm_moe_dsa`, `zamba`, `zamba2`, `inkling2`); whose hidden states are several streams
(`deepseek_v4`, `hy_v4`, `qwen4_exp`); that keep their state in modules or in caches of their own (`recurrent_gemma`,
`minimax`, `rwkv`, `xlstm`); whose logits in Transformers 5.23 depend on how the tokens were split into calls, so that a
session could not be rebuilt (`bamba`, and `moshi` beyond its window); and encoder-decoders.
"""
