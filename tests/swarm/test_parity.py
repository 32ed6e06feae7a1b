"""Every certified family, cut in three and put together again, against plain Transformers; writes docs/models.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import logging

from shoal.model.families import CERTIFIED, CERTIFIED_WITH_VISION, PACKED, certified_encodings, text_config
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
    """No bars for checkpoints of a few tensors."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def passed() -> Iterator[dict[str, tuple[str, str, bool]]]:
    """What was seen of each family that passed; once it is all of them, the document is written."""
    rows: dict[str, tuple[str, str, bool]] = {}
    yield rows
    if rows.keys() == CERTIFIED:
        DOCUMENT.write_text(document(rows))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_family_that_is_cut_gives_what_it_gives_whole(
    family: str, changes: dict[str, object], passed: dict[str, tuple[str, str, bool]]
) -> None:
    pair = Pair(family, **changes)
    assert pair.family.model_type == family
    for check in CHECKS.values():
        check(pair)
    for encoding in certified_encodings(family):
        check_encoding(pair, encoding)
    rewinds = check_rewind(pair)
    passed.setdefault(family, (type(pair.whole).__name__, kinds_of_blocks(pair), rewinds))


def test_every_special_size_is_of_a_certified_family() -> None:
    assert {*SPECIAL, *VARIANTS} <= CERTIFIED


def kinds_of_blocks(pair: Pair) -> str:
    config = text_config(pair.config)
    kinds = list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ["attention"])
    dense_or_sparse = list(getattr(config, "mlp_layer_types", None) or ())
    return ", ".join(
        kind.removesuffix("_attention").replace("_", " ") for kind in dict.fromkeys(kinds + dense_or_sparse)
    )


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def also_tested(family: str) -> str:
    return ", ".join(VARIANTS.get(family, ()))


def document(rows: dict[str, tuple[str, str, bool]]) -> str:
    table = "\n".join(
        f"| `{family}` | {name} | {kinds} | {yes(rewinds)} | {yes(family in PACKED)} | {encodings_of(family)} | "
        f"{also_tested(family)} |"
        for family, (name, kinds, rewinds) in sorted(rows.items())
    )
    with_vision = ", ".join(f"`{model_type}`" for model_type in sorted(CERTIFIED_WITH_VISION))
    tolerances = " and ".join(f"{4 * ROUNDING[encoding]:.1%} in {encoding}" for encoding in LOSSY)
    return INTRODUCTION.format(num_families=len(rows), table=table, with_vision=with_vision, tolerances=tolerances)


def encodings_of(family: str) -> str:
    return ", ".join(encoding for encoding in LOSSY if encoding in certified_encodings(family)) or "raw only"


INTRODUCTION = """\
# Models

<!-- Written by tests/swarm/test_parity.py; run it to bring this page up to date. -->

shoal has no code for any one model: a server runs a span of the family's own Transformers layers, a client the rest.
{num_families} families are certified to compute the same that way as the whole model does on one machine. A family that
is not in this table is refused, unless you insist (`--allow-uncertified`).

For each family the test suite makes a tiny random model of five blocks, of every kind the family has, saves its
checkpoint, and loads from it plain Transformers on one side, a head and three bodies on the other. These must be equal
up to the rounding of float32:

- the logits of a forward pass;
- the logits of a prompt and then of single tokens, with caches, two sessions taking turns;
- the logits of a prompt that comes in two parts;
- greedy generation from prompts of different lengths, padded on the left: the tokens, and the logits of every step;
- beam search: the tokens and the scores;
- the gradients of the input embeddings.

Of checkpoints that hold a vision tower too, the language model is served: {with_vision} (its logits without images, and
greedy generation, are equal to those of the model that sees).

*Rewinds* says whether a server's cache can drop its last tokens. Recurrent state cannot, nor can a sliding window that
has slid; a session of such a model is rebuilt from its inputs instead, when assisted generation takes tokens back.

*Packed* says whether a server computes the tokens of several sessions in one pass over the weights; the others are
computed one session after another. Of both kinds, eight sessions that share a server and come, go, branch and go back
at random are compared with the same sessions computed alone. A model whose rotary embeddings depend on the longest
sequence of a call (`dynamic`, `longrope`) is not packed, whatever its family.

*On the wire* says in which encodings (`--wire`) hidden states and gradients may travel beside raw. The same models are
run with every tensor rounded on each of four journeys. What that does to the median token's logits, relative to plain
Transformers, must stay below {tolerances}, and below twice that for its gradient
(`tests/swarm/parity.py` says why). Where a router's two best experts are nearly equal, single tokens may change more,
as they do by any rounding. An encoding that is not named here is refused for that family.

| family | class | kinds of blocks tested | rewinds | packed | on the wire | also tested |
|---|---|---|---|---|---|---|
{table}

Not certified: models whose layers share state with each other, so that a span is not a function of its input alone
(`gemma3n`, `gemma4`, `glm_moe_dsa`, `zamba`, `zamba2`, `inkling2`); whose hidden states are several streams
(`deepseek_v4`, `hy_v4`, `qwen4_exp`); that keep their state in modules or in caches of their own (`recurrent_gemma`,
`minimax`, `rwkv`, `xlstm`); whose logits in Transformers 5.23 depend on how the tokens were split into calls, so that a
session could not be rebuilt (`bamba`, and `moshi` beyond its window); and encoder-decoders.
"""
