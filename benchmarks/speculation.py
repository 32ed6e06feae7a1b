"""What guessing ahead gains: one client and four servers, on one machine and 100 ms apart at 100 Mbit/s.

    python -m benchmarks.speculation [--quick] [--model MODEL] [--rounds 3] [--tokens 160]
                                     [--draft MODEL] [--dtype float32 bfloat16] [--only-drafts] [--json]

Each server is a process behind a proxy that shapes its link (docs/testing.md), with a quarter of the model, by default
the bundled one. In each round each text is generated without guesses and with them, one after the other, on the same
servers; ratios are those of a round, and the table has their medians. The texts, all greedy:

- *verbatim*: a text is repeated. A model with a chat template is asked to; the bundled one has told the same story
  twice, and is given the start of a third time. Guesses repeat the text itself (`draft="auto"`).
- *rewritten*: a model with a chat template is asked to correct the spelling; the bundled one tells its story with
  another hero, which is mostly another story. `draft="auto"`.
- *new*: a text of which nothing was told, `draft="auto"`.
- *new, its draft*: the same, guessed by the bundled model's own draft (docs/stories.md), or by `--draft MODEL`.
- *draft P %*: the same new story. A drafter that knows the text guesses it, and lies at random, so that P of 100
  guesses are right if all before them were. It takes no time: a real one of that acceptance gains less.
- *copied*: the same, always right, as where a model repeats a text faithfully; and once more with one round on its way
  at a time.
- *adversary*: it lies each time, and says that it is certain.
- *new, its draft, 8 clients*: eight clients of one model at once. Their texts share the passes of the draft, or each
  has passes of its own (*apart*). `--only-drafts` tells these only.

"Bound" is how many tokens a step gave: what is gained if a step with guesses takes as long as one without. With
float32, the texts have to be the same with guesses and without, or the script fails; in bfloat16, passes of different
lengths round differently, and it counts the tokens until the first difference.

`--quick` only checks that the script runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common.machine import describe_machine
from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES, STORIES_DRAFT
from shoal.client.generation.drafting.drafter import Source
from shoal.client.generation.drafting.model_drafter import ModelDrafter
from shoal.host.processes import interruptible
from shoal.testing import Link, shaped_swarm

NUM_STAGES = 4
NETWORKS = {"loopback": Link(), "100 ms": Link(delay_seconds=0.05, bytes_per_second=100e6 / 8)}
TEXT = (
    "The harbour of Ostrava Bay was built in 1874 by a company of fishermen. It has three piers, a lighthouse and a "
    "small market. Every morning at six, the boats of Marta Lindqvist leave for the open sea, and every evening they "
    "return with herring and cod. The lighthouse was painted red in 1921, and again in 1958. In winter the bay freezes "
    "for about forty days, and the boats stay on land. Marta's grandson, Emil, repairs the nets in a shed behind the "
    "market, and sells smoked fish to travellers on Saturdays. The oldest house on the quay belongs to a widow who "
    "remembers the great storm of 1936, when eleven boats were lost in one night and the bells of the chapel rang "
    "until the morning. Since then no boat puts to sea while the red flag hangs from the lighthouse."
)
MISSPELT = {"fishermen": "fishermn", "morning": "mornin", "painted": "paintd", "winter": "wintr", "oldest": "oldst"}
ASKED = "Tell me why people build lighthouses, and how they were lit in former times."
START = "Once upon a time, there was a little girl named Lily."
OTHER = "Once upon a time, there was a little girl named Mia."
KNOWN_START = 24
"""How many tokens of its story the bundled model is given, the third time."""
ACCEPTANCES = (0.65, 0.85)
NUM_CLIENTS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class KnownText:
    """Guesses a text that it knows. Each guess is right with this probability."""

    def __init__(self, text: Sequence[int], acceptance: float, *, says: float, seed: int) -> None:
        chance = random.Random(seed)
        self._guesses = [token if chance.random() < acceptance else token ^ 1 for token in text]
        self._position, self._says = 0, says

    def append(self, tokens: Sequence[int]) -> None:
        self._position += len(tokens)

    def source(self) -> Source | None:
        return Source("known", self._says)

    def guesses(self, count: int) -> list[int]:
        return self.further((), count)

    def further(self, assumed: Sequence[int], count: int) -> list[int]:
        first = self._position + len(assumed)
        return self._guesses[first : first + count]


class OneAtATime:
    """The same, but it does not look further than the guesses that are not judged."""

    def __init__(self, text: Sequence[int], acceptance: float, *, says: float, seed: int) -> None:
        known = KnownText(text, acceptance, says=says, seed=seed)
        self.append, self.source, self.guesses = known.append, known.source, known.guesses


class Apart(ModelDrafter):
    """A draft's drafter that guesses for its text alone, whatever others guess at the same time."""

    @property
    def company(self) -> None:
        """None: there is nothing that it shares."""


@dataclass(frozen=True)
class Told:
    """A generated text, and how fast its tokens came after the first."""

    tokens: list[int]
    seconds: float
    num_guessed: int = 0
    num_right: int = 0

    @property
    def rate(self) -> float:
        return (len(self.tokens) - 1) / self.seconds

    @property
    def tokens_per_step(self) -> float:
        return len(self.tokens) / (len(self.tokens) - self.num_right)


@dataclass(frozen=True)
class Figure:
    """One text on one network, with guesses and without."""

    network: str
    dtype: str
    text: str
    plain: float
    guessing: float
    ratio: float
    bound: float
    acceptance: float
    same_tokens: int


def tell(model: Any, prompt: torch.Tensor, num_tokens: int, draft: Any) -> Told:
    times: list[float] = []
    tokens: list[int] = []
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "draft": draft}
    with model.stream(prompt, attention_mask=torch.ones_like(prompt), **options) as stream:
        for token in stream:
            times.append(time.perf_counter())
            tokens.append(token.id)
        return Told(tokens, times[-1] - times[0], stream.num_guessed, stream.num_right)


def tell_many(model: Any, prompt: torch.Tensor, num_tokens: int, drafts: Sequence[Any]) -> list[Told]:
    """The same for several clients at once, each with its draft."""
    with ThreadPoolExecutor(len(drafts)) as pool:
        return list(pool.map(lambda draft: tell(model, prompt, num_tokens, draft), drafts))


def same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are equal."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class Bench:
    """The texts of one dtype, told in turns."""

    def __init__(self, model: Any, tokenizer: Any, dtype: str, num_tokens: int, draft: Path | None) -> None:
        self._model, self._dtype, self._num_tokens, self._draft = model, dtype, num_tokens, draft
        if tokenizer.chat_template is None:
            self._new = tokenizer(START, return_tensors="pt").input_ids
            other = tokenizer(OTHER, return_tensors="pt").input_ids
            told = torch.cat((self._new, torch.tensor([tell(model, self._new, num_tokens, "off").tokens])), dim=1)
            self._verbatim = torch.cat((told, told, told[:, : self._new.shape[1] + KNOWN_START]), dim=1)
            self._rewritten = torch.cat((told, other), dim=1)
            return

        def asked(text: str) -> torch.Tensor:
            chat = [{"role": "user", "content": text}]
            ids: torch.Tensor = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            return ids

        misspelt = TEXT
        for right, wrong in MISSPELT.items():
            misspelt = misspelt.replace(right, wrong)
        self._new = asked(ASKED)
        self._verbatim = asked(f"Repeat the following text word for word:\n\n{TEXT}")
        self._rewritten = asked(f"Correct the spelling of the following text:\n\n{misspelt}")

    def figures(self, network: str, seed: int) -> list[Figure]:
        plain = tell(self._model, self._new, self._num_tokens, "off")
        known = [*self._new[0].tolist(), *plain.tokens]
        found = [
            self._figure(network, "verbatim", self._verbatim, "auto"),
            self._figure(network, "rewritten", self._rewritten, "auto"),
            self._figure(network, "new", self._new, "auto", plain=plain),
        ]
        if self._draft is not None:
            found.append(self._figure(network, "new, its draft", self._new, self._draft, plain=plain))
        for acceptance in ACCEPTANCES:
            draft = KnownText(known, acceptance, says=acceptance, seed=seed)
            found.append(self._figure(network, f"draft {acceptance:.0%}", self._new, draft, plain=plain))
        for text, kind in {"copied": KnownText, "copied, one round at a time": OneAtATime}.items():
            found.append(self._figure(network, text, self._new, kind(known, 1.0, says=0.85, seed=seed), plain=plain))
        adversary = KnownText(known, 0.0, says=0.95, seed=seed)
        found.append(self._figure(network, "adversary", self._new, adversary, plain=plain))
        found.append(self._of_many(network))
        return found + self.of_many_drafts(network)

    def _figure(
        self, network: str, text: str, prompt: torch.Tensor, draft: Any, *, plain: Told | None = None
    ) -> Figure:
        plain = plain or tell(self._model, prompt, self._num_tokens, "off")
        guessing = tell(self._model, prompt, self._num_tokens, draft)
        return self._compared(network, text, [plain], [guessing])

    def _of_many(self, network: str) -> Figure:
        plain = tell_many(self._model, self._verbatim, self._num_tokens, NUM_CLIENTS * ["off"])
        guessing = tell_many(self._model, self._verbatim, self._num_tokens, NUM_CLIENTS * ["auto"])
        return self._compared(network, f"verbatim, {NUM_CLIENTS} clients", plain, guessing)

    def of_many_drafts(self, network: str) -> list[Figure]:
        """Eight clients with a draft, whose passes they share or not."""
        if self._draft is None:
            return []
        shared = self._model.draft_models.draft(self._draft)
        plain = tell_many(self._model, self._new, self._num_tokens, NUM_CLIENTS * ["off"])
        text, found = f"new, its draft, {NUM_CLIENTS} clients", []
        for name, kind in ((text, ModelDrafter), (f"{text}, apart", Apart)):
            drafts = [kind(shared) for _ in range(NUM_CLIENTS)]
            found.append(
                self._compared(network, name, plain, tell_many(self._model, self._new, self._num_tokens, drafts))
            )
        return found

    def _compared(self, network: str, text: str, plain: Sequence[Told], guessing: Sequence[Told]) -> Figure:
        pairs = list(zip(plain, guessing, strict=True))
        figure = Figure(
            network,
            self._dtype,
            text,
            sum(each.rate for each in plain),
            sum(each.rate for each in guessing),
            sum(each.rate for each in guessing) / sum(each.rate for each in plain),
            statistics.mean(each.tokens_per_step for each in guessing),
            sum(each.num_right for each in guessing) / max(1, sum(each.num_guessed for each in guessing)),
            min(same(one.tokens, other.tokens) for one, other in pairs),
        )
        print(
            f"{network}, {self._dtype}, {text}: {figure.plain:.3g} -> {figure.guessing:.3g} tokens/s, "
            f"slowest {min(each.rate for each in guessing):.3g}, same for {figure.same_tokens} tokens",
            file=sys.stderr,
        )
        if self._dtype == "float32" and figure.same_tokens < self._num_tokens:
            raise SystemExit(f"{text} on {network}: another text from token {figure.same_tokens} on")
        return figure


def measure(
    model_path: Path,
    dtype: str,
    *,
    draft: Path | None,
    num_tokens: int,
    rounds: int,
    networks: Sequence[str],
    only_drafts: bool,
) -> list[Figure]:
    """All figures, round after round."""
    num_blocks = transformers.AutoConfig.from_pretrained(model_path).num_hidden_layers
    bounds = [num_blocks * stage // NUM_STAGES for stage in range(NUM_STAGES + 1)]
    spans = [f"{start}:{end}" for start, end in itertools.pairwise(bounds)]
    with shaped_swarm(model_path, spans, options=["--dtype", dtype, "--cache-tokens", "40000"]) as swarm:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            model_path, initial_peers=swarm.addresses, dtype=DTYPES[dtype]
        )
        try:
            bench = Bench(model, transformers.AutoTokenizer.from_pretrained(model_path), dtype, num_tokens, draft)
            found = []
            for index in range(rounds):
                for network in networks:
                    for server in swarm.servers:
                        server.link(NETWORKS[network])
                    found += bench.of_many_drafts(network) if only_drafts else bench.figures(network, index)
            return found
        finally:
            model.close()


def median(figures: Sequence[Figure]) -> Figure:
    """The medians of the same text in several rounds."""
    first = figures[0]
    middle = {
        name: statistics.median(getattr(each, name) for each in figures)
        for name in ("plain", "guessing", "ratio", "bound", "acceptance")
    }
    return Figure(
        first.network, first.dtype, first.text, **middle, same_tokens=min(each.same_tokens for each in figures)
    )


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path, default=STORIES)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--only-drafts", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    num_tokens = arguments.tokens or (12 if arguments.quick else 160)
    load_before = os.getloadavg()[0]
    figures: list[Figure] = []
    for dtype in arguments.dtype:
        draft = arguments.draft or (STORIES_DRAFT if arguments.model == STORIES else None)
        figures += measure(
            arguments.model,
            dtype,
            draft=draft,
            num_tokens=num_tokens,
            rounds=rounds,
            networks=arguments.networks,
            only_drafts=arguments.only_drafts,
        )
    keys = dict.fromkeys((each.network, each.dtype, each.text) for each in figures)
    rows = [median([each for each in figures if (each.network, each.dtype, each.text) == key]) for key in keys]
    if arguments.json:
        about = {"machine": describe_machine(), "date": str(date.today()), "load_before": load_before}
        print(json.dumps({**about, "rounds": rounds, "figures": [asdict(each) for each in rows]}, indent=2))
        return
    print(f"{describe_machine()}; load before {load_before:.1f}; {rounds} rounds of {num_tokens} tokens\n")
    print("| network | dtype | text | plain, tokens/s | guessing, tokens/s | ratio | bound | guesses right |")
    print("|---|---|---|---|---|---|---|---|")
    for each in rows:
        print(
            f"| {each.network} | {each.dtype} | {each.text} | {each.plain:.3g} | {each.guessing:.3g} | "
            f"**{each.ratio:.2f}** | {each.bound:.2f} | {each.acceptance:.0%} |"
        )


if __name__ == "__main__":
    main()
