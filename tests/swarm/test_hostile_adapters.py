"""Adapters and kept passes that a stranger makes up: one clear answer, nobody else notices, and nothing of it stays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from shoal.adapters import Layer
from shoal.model.peft.factors import factors_name
from shoal.policy.batching.engine_limits import Limits
from shoal.protocol import AdapterStored, Failure, NormsResult, NotCached, Opened, PassResult, StepResult
from shoal.server.training.adapter_store import LAYER_BYTES

from .harness import Swarm, swarm_of
from .intruder import ANSWERED, Intruder, Raw, declaring, raw
from .test_hostile_clients import HIDDEN_SIZE, INVALID, ON_SPAN, Peace, forward, hidden, opening, step

MOST_BYTES = 1 << 20
LORA: dict[str, Any] = {"kind": "lora", "module": "self_attn.q_proj", "rank": 2, "scaling": 1.0}
PROMPT: dict[str, Any] = {"kind": "prompt", "num_tokens": 3}
IA3: dict[str, Any] = {"kind": "ia3", "module": "mlp.down_proj", "feedforward": True}
SIZE = 2 * 2 * HIDDEN_SIZE
"""The factors of `LORA`."""
UNKNOWN = "0123456789abcdef" * 2
PASS, OTHER_PASS = "a" * 32, "b" * 32


def lesson(*layers: dict[str, Any], factors: torch.Tensor | None = None, block: Any = 0, **fields: Any) -> Raw:
    factors = torch.ones(SIZE) if factors is None else factors
    return raw("adapter", {"factors": factors}, block=block, layers=list(layers or [LORA]), **fields)


def changed(**fields: Any) -> Raw:
    return lesson({**LORA, **fields})


def graded(kept: str | None = PASS, **fields: Any) -> Raw:
    """A question for the gradient of a pass that was kept."""
    return raw("backward", {"grad": hidden()}, **{**ON_SPAN, "kept": kept, **fields})


def norms(*modules: str, end: int = 1) -> Raw:
    return raw("norms", **{**ON_SPAN, "end": end}, modules=list(modules))


def spoilt(number: float) -> torch.Tensor:
    factors = torch.ones(SIZE)
    factors[7] = number
    return factors


REFUSED: dict[str, tuple[list[Raw], str]] = {
    # layers that nobody has
    "no layers": ([raw("adapter", {"factors": torch.ones(SIZE)}, block=0, layers=[])], INVALID),
    "thousands of layers": ([lesson(*[PROMPT] * 257)], INVALID),
    "a layer of another kind": ([changed(kind="lokr")], INVALID),
    "a layer with another field": ([changed(base_layer="q_proj")], INVALID),
    "a rank of zero": ([changed(rank=0)], INVALID),
    "a negative rank": ([changed(rank=-2)], INVALID),
    "a rank beyond all ranks": ([changed(rank=4097)], INVALID),
    "a rank that is a float": ([changed(rank=2.0)], INVALID),
    "a scaling that is NaN": ([changed(scaling=float("nan"))], INVALID),
    "a dropout of everything": ([changed(dropout=1.0)], INVALID),
    "a negative dropout": ([changed(dropout=-0.1)], INVALID),
    "a prompt of no tokens": ([lesson({**PROMPT, "num_tokens": 0})], INVALID),
    "a module without a name": ([changed(module="")], INVALID),
    "a module without end": ([changed(module="a." * 100 + "b")], INVALID),
    "a module with other characters": ([changed(module="self_attn/../q_proj")], INVALID),
    "a module that upsets terminals": ([changed(module="\x1b]0;pwned\x07")], INVALID),
    "a module that there is not": ([changed(module="self_attn.qkv")], "blocks of this model have no self_attn.qkv"),
    "a method": ([changed(module="forward")], "blocks of this model have no forward"),
    "an attribute": ([changed(module="__class__")], "blocks of this model have no __class__"),
    "a module that is no linear layer": ([changed(module="input_layernorm")], "input_layernorm is not a linear layer"),
    "a module of modules": ([changed(module="mlp")], "mlp is not a linear layer"),
    "two layers at one module": ([lesson(LORA, LORA, factors=torch.ones(2 * SIZE))], "q_proj has two adapters"),
    "two prompts": ([lesson(PROMPT, PROMPT, factors=torch.ones(6 * HIDDEN_SIZE))], "two prompts"),
    # factors that do not belong to them
    "no factors": ([raw("adapter", block=0, layers=[LORA])], r"must be floating-point numbers of shape \[N\]"),
    "factors in two dimensions": ([lesson(factors=torch.ones(2, SIZE // 2))], r"floating-point numbers of shape \[N\]"),
    "integers": ([lesson(factors=torch.ones(SIZE).long())], r"must be floating-point numbers of shape \[N\]"),
    "too few factors": ([lesson(factors=torch.ones(SIZE - 1))], f"{SIZE - 1} factors for layers that have {SIZE}"),
    "too many factors": ([lesson(factors=torch.ones(SIZE + 1))], f"{SIZE + 1} factors for layers that have"),
    "a rank that its factors have not": ([changed(rank=4096)], f"{SIZE} factors for layers that have"),
    "NaN": ([lesson(factors=spoilt(float("nan")))], "the factors of an adapter must be finite"),
    "infinity": ([lesson(factors=spoilt(float("-inf")))], "the factors of an adapter must be finite"),
    "hidden states beside them": (
        [raw("adapter", {"factors": torch.ones(SIZE), "hidden": hidden()}, block=0, layers=[LORA])],
        INVALID,
    ),
    "factors that lose precision on their way": (
        [declaring(lesson(), {"name": "factors", "dtype": "float32", "shape": [SIZE], "encoding": "bfloat16"})],
        INVALID,
    ),
    "a bias with DoRA, which PEFT does not have": (
        [lesson({**LORA, "bias": True, "dora": True}, factors=torch.ones(SIZE + 2 * HIDDEN_SIZE))],
        "lora_bias=True is not supported for DoRA",
    ),
    "an adapter that replaces something else": ([lesson(replaces="everything")], INVALID),
    "an adapter in the middle of a session": ([opening(), lesson()], "'adapter' makes no sense here"),
    # computing with them
    "adapters of another number of blocks": ([forward(adapters=[UNKNOWN])], INVALID),
    "adapters of more blocks than there are": ([forward(adapters=[None] * 5000)], INVALID),
    "an adapter that is a word": ([forward(adapters=["q_proj", None])], INVALID),
    "a seed below zero": ([forward(seed=-1)], INVALID),
    "a seed beyond all counting": ([forward(seed=1 << 53)], INVALID),
    "a seed that is a float": ([forward(seed=0.5)], INVALID),
    "a pass that is kept under a word": ([forward(keep="mine")], INVALID),
    "a pass that is kept in a session": ([opening(), step(keep=PASS)], INVALID),
    "an answer of a server's": ([raw("adapter_stored")], "'adapter_stored' makes no sense here"),
    "that the server should send something again": ([raw("not_cached", kept=True)], "'not_cached' makes no sense here"),
    "a gradient of another span than was kept": (
        [forward(keep=PASS), ANSWERED, graded(start=1)],
        "blocks 1:2 of a pass through 0:2",
    ),
    "a gradient of another shape than was kept": (
        [forward({"hidden": hidden(2)}, keep=PASS), ANSWERED, graded()],
        "needs a gradient of its output's shape",
    ),
    "gradients but for blocks elsewhere": ([forward(keep=PASS), ANSWERED, graded(frozen=[2])], INVALID),
    "no gradient": (
        [forward(keep=PASS), ANSWERED, raw("backward", **ON_SPAN, kept=PASS)],
        "needs a gradient of its output's",
    ),
    # norms
    "norms of a layer for ever": ([norms(*["mlp.up_proj"] * 256)], INVALID),
    "norms of several blocks": ([norms("mlp.up_proj", end=2)], INVALID),
    "norms of a layer that there is not": ([norms("mlp.up_proj", "mlp.qkv")], "blocks of this model have no mlp.qkv"),
}

MISROUTED: dict[str, tuple[list[Raw], str]] = {
    "more than the server has room for": (
        [lesson({**PROMPT, "num_tokens": 9000}, factors=torch.ones(9000 * HIDDEN_SIZE))],
        f"an adapter of {9000 * HIDDEN_SIZE * 4 + LAYER_BYTES} bytes; this server has room for {MOST_BYTES}",
    ),
}

MOVED: dict[str, tuple[list[Raw], str]] = {
    "a block of another server": ([lesson(block=2)], "this server holds blocks 0:2, not block 2"),
}

ATTACKS = [
    pytest.param(frames, code, reason, id=name)
    for code, attacks in (("rejected", REFUSED), ("misrouted", MISROUTED), ("moved", MOVED))
    for name, (frames, reason) in attacks.items()
]


@pytest.fixture(scope="module")
def town(folder: Path) -> Iterator[tuple[Swarm, Any, Intruder]]:
    """A swarm, an honest client's model, and a stranger."""
    with swarm_of(folder, "0:2", "2:4", limits=Limits(adapter_bytes=MOST_BYTES)) as swarm:
        yield swarm, swarm.model(), Intruder(swarm, "s0")


def check_nothing_left(swarm: Swarm) -> None:
    engine = swarm.servers["s0"].engine
    swarm.settle(lambda: not engine.adapters.num_bytes and not len(engine.passes.activations))
    assert engine.passes.activations.budget.used_bytes == 0


@pytest.mark.parametrize(("frames", "code", "reason"), ATTACKS)
def test_what_is_no_adapter_is_refused_and_touches_nobody(town, whole, frames, code, reason):
    swarm, model, intruder = town
    with Peace(swarm, model, whole):
        *before, failure = intruder.ask(*frames)
        assert isinstance(failure, Failure)
        assert failure.code == code
        assert re.search(reason, failure.reason)
        assert failure.reason.isprintable()
        assert len(failure.reason) < 400
        assert all(isinstance(answer, Opened | StepResult | PassResult | AdapterStored) for answer in before)
    check_nothing_left(swarm)


def named(block: int = 0) -> str:
    """What the adapter of `lesson()` is called."""
    return named_as(LORA, torch.ones(SIZE), block=block)


def named_as(layer: dict[str, Any], factors: torch.Tensor, *, block: int = 0) -> str:
    return factors_name(block, (TypeAdapter(Layer).validate_python(layer),), factors)


LACKING: dict[str, tuple[list[Raw], NotCached]] = {
    "a pass with an adapter that nobody has sent": (
        [forward(adapters=[UNKNOWN, None])],
        NotCached(adapters=(UNKNOWN,)),
    ),
    "a gradient with one": (
        [raw("backward", {"hidden": hidden(), "grad": hidden()}, **ON_SPAN, adapters=[None, UNKNOWN])],
        NotCached(adapters=(UNKNOWN,)),
    ),
    "a session with one": ([opening(adapters=[UNKNOWN, UNKNOWN])], NotCached(adapters=(UNKNOWN,))),
    "an adapter of the same numbers in another block": (
        [lesson(), forward(adapters=[None, named(1)])],
        NotCached(adapters=(named(1),)),
    ),
    "one that was replaced": (
        [
            lesson(),
            lesson(PROMPT, factors=torch.ones(3 * HIDDEN_SIZE), replaces=named()),
            forward(adapters=[named(), None]),
        ],
        NotCached(adapters=(named(),)),
    ),
    "a pass that was never kept": ([graded()], NotCached(kept=True)),
    "a pass that was kept and given": (
        [forward(keep=PASS), ANSWERED, graded(), ANSWERED, graded()],
        NotCached(kept=True),
    ),
    "a pass that was kept under another name": (
        [forward(keep=PASS), ANSWERED, graded(OTHER_PASS)],
        NotCached(kept=True),
    ),
}


@pytest.mark.parametrize(("frames", "answer"), LACKING.values(), ids=LACKING.keys())
def test_what_a_server_does_not_have_it_asks_for(town, whole, frames, answer):
    swarm, model, intruder = town
    with Peace(swarm, model, whole):
        assert intruder.ask(*frames)[-1] == answer
    check_nothing_left(swarm)


def test_an_adapter_of_another_block_is_refused(town, whole):
    swarm, model, intruder = town
    with Peace(swarm, model, whole):
        failure = intruder.ask(lesson(), forward(adapters=[None, named()]))[-1]
        assert isinstance(failure, Failure)
        assert (failure.code, failure.reason) == ("rejected", "the adapter for block 1 is one of block 0")
    check_nothing_left(swarm)


@pytest.mark.parametrize("layer", [LORA, PROMPT, IA3], ids=lambda layer: layer["kind"])
def test_numbers_beyond_all_others_stay_with_who_sent_them(town, whole, layer: dict[str, Any]):
    swarm, model, intruder = town
    size = {"lora": SIZE, "prompt": 3 * HIDDEN_SIZE, "ia3": 48}[layer["kind"]]
    huge = lesson(layer, factors=torch.full((size,), 3e38))
    names = [named_as(layer, torch.full((size,), 3e38)), None]
    with Peace(swarm, model, whole):
        assert isinstance(intruder.ask(huge, forward(adapters=names))[-1], PassResult)
        assert isinstance(intruder.ask(huge, opening(adapters=names), step())[-1], StepResult)
    check_nothing_left(swarm)


def test_a_kept_pass_is_its_clients_alone(town, whole):
    """Whoever guesses its name is told that it is not there, and its owner still gets it."""
    swarm, _, intruder = town
    thief, stream = Intruder(swarm, "s0", name="thief"), intruder.open()
    intruder.tell(stream, forward(keep=PASS))
    intruder.hear(stream)
    assert thief.ask(graded())[-1] == NotCached(kept=True)
    intruder.tell(stream, graded())
    ((answer, tensors),) = intruder.hear(stream)
    assert isinstance(answer, PassResult)
    assert tensors["grad"].isfinite().all()
    assert not intruder.finish(stream)
    check_nothing_left(swarm)


def test_a_pass_that_is_saved_twice_under_one_id_is_saved_once(town):
    swarm, _, intruder = town
    stream, activations = intruder.open(), swarm.servers["s0"].engine.passes.activations
    for _ in range(5):
        intruder.tell(stream, forward(keep=PASS))
        intruder.hear(stream)
    taken = activations.budget.used_bytes
    assert len(activations) == 1
    intruder.tell(stream, graded())
    ((answer, _),) = intruder.hear(stream)
    assert isinstance(answer, PassResult)
    assert taken > 0
    assert activations.budget.used_bytes == 0
    assert not intruder.finish(stream)
    check_nothing_left(swarm)


def test_hundreds_of_adapters_take_no_more_than_their_budget(town, whole):
    swarm, model, intruder = town
    engine = swarm.servers["s0"].engine
    with Peace(swarm, model, whole):
        stream = intruder.open()
        for number in range(40):
            lessons = [lesson(factors=torch.full((SIZE,), 10.0 * number + each)) for each in range(10)]
            intruder.tell(stream, *lessons)
            assert {type(answer) for answer, _ in intruder.hear(stream, 10)} == {AdapterStored}
            assert engine.adapters.num_bytes <= MOST_BYTES
            assert len(engine.adapters.names) <= MOST_BYTES // LAYER_BYTES
        assert engine.adapters.num_bytes > MOST_BYTES // 2
        assert not intruder.finish(stream)
    check_nothing_left(swarm)


def test_who_sends_most_loses_first(town):
    """A flood pushes out the flood, and not what somebody else has just one of."""
    swarm, _, intruder = town
    modest = Intruder(swarm, "s0", name="modest")
    own = modest.open()
    modest.tell(own, lesson())
    modest.hear(own)
    stream = intruder.open()
    for number in range(300):
        intruder.tell(stream, lesson(factors=torch.full((SIZE,), 2.0 + number)))
        intruder.hear(stream)
    modest.tell(own, forward(adapters=[named(), None]))
    ((answer, _),) = modest.hear(own)
    assert isinstance(answer, PassResult)
    assert not modest.finish(own)
    assert not intruder.finish(stream)
    check_nothing_left(swarm)


def test_norms_are_computed_where_training_is_and_a_layer_at_a_time(swarm: Callable[..., Swarm]):
    net = swarm()
    net.start("0:2", training=False)
    engine = net.start("0:2").engine
    (failure,) = Intruder(net, "s0").ask(norms("mlp.up_proj"))
    assert isinstance(failure, Failure)
    assert (failure.code, failure.reason) == ("misrouted", "this server offers no forward and backward passes")
    before = engine.num_passes
    (answer,) = Intruder(net, "s1", name="another").ask(norms("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"))
    assert isinstance(answer, NormsResult)
    assert engine.num_passes - before >= 3
