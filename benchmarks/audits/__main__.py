"""How far apart honest servers' outputs are, which liars audits find, and what remains hidden from them.

    python -m benchmarks.audits [--model FOLDER] [--windows 100000] [--texts 8] [--length 288] [--seed 0] [--json]

All is computed in this process, in every form and way in which servers compute (`audited_servers.py`): in float32 and
bfloat16, in int8 and NF4; whole, in chunks, token by token; alone and beside others; with one and two threads. The
model is cut into three hops. An audit compares a window of one answer, of random length and position, with another
answer, as a client does. Audits share texts and outputs, so they are not independent; the number of texts is given.

The second table has the part of the audits that find each liar (`audited_lies.py`), for windows of 8, 32 and 128
tokens. The third has the part of the tokens for which a liar with the last hop can make another token the likeliest
unnoticed, with the smallest change in closed form (`aimed_lies.py`), beside random noise of the same size, and beside
what honest servers in other forms do. The texts are stories of the bundled model itself, or this documentation.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.audits.aimed_lies import Aimed
from benchmarks.audits.audited_lies import WINDOWS, Detection
from benchmarks.audits.audited_servers import Answer, Hop, Pipeline
from benchmarks.common.machine import describe_machine
from shoal.bundled import STORIES
from shoal.client.decoding.auditing.claim import FIRST_POSITION, WINDOW_TOKENS
from shoal.client.swarm.comparing.distances import distances
from shoal.host.processes import interruptible
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net.wire.encodings import as_received
from shoal.policy.audits.likeness import MIN_TOKENS, Allowed, allowed_among, are_alike, typical
from shoal.spans import Span
from shoal.tensors import Encoding

NUM_HOPS = 3
GROUP = 4
"""The texts that are computed together."""
JOURNEYS: tuple[tuple[Encoding, bool], ...] = (
    ("raw", True),
    ("bfloat16", True),
    ("int8", True),
    ("bfloat16", False),
    ("int8", False),
)
"""How hidden states are rounded, and whether for all servers, as they travel, or only in the client's history."""
_LEAST = 1e-9
BATCH_PART = 0.2
"""The part of the audits that compare several texts at once, as those of a batch."""


@dataclass
class Honest:
    """What audits of honest servers found, of one pair of kinds and one way in which hidden states travel."""

    pair: str
    journey: str
    allowed: Allowed
    num_audits: int = 0
    num_false: int = 0
    largest_typical: float = 0.0
    largest: float = 0.0

    def add(self, found: list[float]) -> None:
        """One more audit."""
        self.num_audits += 1
        self.num_false += not are_alike(found, self.allowed)
        self.largest_typical = max(self.largest_typical, typical(found))
        self.largest = max(self.largest, *found)

    @property
    def margin(self) -> float:
        """How many times as much as was found is allowed."""
        of_typical = self.allowed.typical / max(self.largest_typical, _LEAST)
        return min(of_typical, self.allowed.largest / max(self.largest, _LEAST))


class Calibration:
    """Audits of honest servers, at random."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._found: dict[tuple[str, str, Allowed], Honest] = {}

    def add(self, hop: Hop, num_audits: int) -> None:
        """Audit the servers of a hop."""
        for _ in range(num_audits):
            self._audit(hop, *self._rng.choice(JOURNEYS))

    def _audit(self, hop: Hop, encoding: Encoding, travels_so: bool) -> None:
        rng = self._rng
        claims = [each for each in hop.answers[encoding if travels_so else "raw"] if len(each.kinds) == 1]
        claim, witness = rng.choice(claims), rng.choice(hop.answers[encoding])
        if claim is witness:
            return
        window = self._window(claim, witness)
        claimed_BTD, witnessed_BTD = as_received(claim.outputs_BTD[window], encoding), witness.outputs_BTD[window]
        if travels_so:
            witnessed_BTD = as_received(witnessed_BTD, encoding)
        found = distances(claimed_BTD, witnessed_BTD, hop.inputs_BTD[encoding][window])
        allowed = allowed_among(claim.kinds[0].form, [kind.form for kind in witness.kinds], encoding=encoding)
        pair = " | ".join(sorted([claim.kinds[0].name, " then ".join(dict.fromkeys(k.name for k in witness.kinds))]))
        journey = encoding if travels_so or encoding == "raw" else f"{encoding} history"
        self._found.setdefault((pair, journey, allowed), Honest(pair, journey, allowed)).add(found)

    def _window(self, claim: Answer, witness: Answer) -> tuple[slice, slice]:
        """Some texts, and a window of them: often at the end, where tokens are computed one by one."""
        num_texts, num_tokens = min(claim.num_texts, witness.num_texts), claim.outputs_BTD.shape[1]
        size = self._rng.randint(MIN_TOKENS, min(WINDOW_TOKENS, num_tokens - FIRST_POSITION))
        last = num_tokens - size
        start = last if self._rng.random() < 0.5 else self._rng.randint(FIRST_POSITION, last)
        first = self._rng.randrange(num_texts)
        count = self._rng.randint(1, num_texts - first) if self._rng.random() < BATCH_PART else 1
        return slice(first, first + count), slice(start, start + size)

    def rows(self) -> list[Honest]:
        """The results, those with the least allowed first."""
        return sorted(self._found.values(), key=lambda each: (each.allowed.typical, each.pair, each.journey))


@torch.no_grad()
def texts_of(folder: Path, model: PreTrainedModel, num_texts: int, num_tokens: int) -> torch.Tensor:
    """Ids [B, T]: stories that the bundled model tells, or the documentation for another model."""
    if folder == STORIES:
        torch.manual_seed(0)
        begin = torch.full((num_texts, 1), model.config.bos_token_id)
        mask = torch.ones_like(begin)
        length = num_tokens - 1
        found = model.generate(begin, attention_mask=mask, do_sample=True, max_new_tokens=length, min_new_tokens=length)
        assert isinstance(found, torch.Tensor)
        return found
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    ids = AutoTokenizer.from_pretrained(folder)("\n".join(page.read_text() for page in pages)).input_ids
    step = (len(ids) - num_tokens) // num_texts
    return torch.tensor([ids[text * step : text * step + num_tokens] for text in range(num_texts)])


def study(folder: Path, *, num_windows: int, num_texts: int, num_tokens: int, seed: int) -> dict[str, Any]:
    """All figures of one model."""
    rng = random.Random(seed)
    checkpoint = Checkpoint.open(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    num_blocks = checkpoint.config.num_hidden_layers
    bounds = [num_blocks * index // NUM_HOPS for index in range(NUM_HOPS + 1)]
    spans = [Span(start, end) for start, end in itertools.pairwise(bounds)]
    print(f"{folder}: loading {num_blocks} blocks in all forms", file=sys.stderr)
    pipeline = Pipeline(checkpoint, spans, num_texts=GROUP, num_tokens=num_tokens)
    texts = texts_of(folder, model, num_texts, num_tokens)
    calibration, detection, aimed = Calibration(rng), Detection(), Aimed(model)
    groups = texts.split(GROUP)
    num_audits = -(-num_windows // (len(groups) * NUM_HOPS))
    with contextlib.suppress(KeyboardInterrupt):  # then there are figures of what was done until then
        for number, group in enumerate(groups):
            embedded_BTD = model.get_input_embeddings()(group).detach()
            if number % 2:
                embedded_BTD = embedded_BTD.bfloat16()  # as a client in bfloat16 sends it
            for hop in pipeline.hops(embedded_BTD, rng):
                first = GROUP * number
                print(f"auditing texts {first} to {first + len(group)}, blocks {hop.span}", file=sys.stderr)
                calibration.add(hop, num_audits)
                detection.add(hop, rng)
                if hop.is_last:
                    aimed.add(hop)
    return {
        "model": folder.name,
        "num_blocks": num_blocks,
        "num_texts": num_texts,
        "num_tokens": num_tokens,
        "honest": [{**asdict(each), "margin": each.margin} for each in calibration.rows()],
        "detection": detection.parts(),
        "aimed": aimed.parts(),
        "num_aimed": aimed.num_tokens,
        "num_unflipped": aimed.num_unflipped,
    }


def show(found: dict[str, Any]) -> None:
    """Print the three tables."""
    honest = found["honest"]
    total, false = (sum(each[key] for each in honest) for key in ("num_audits", "num_false"))
    print(f"{found['model']}: {found['num_texts']} texts of {found['num_tokens']} tokens, {NUM_HOPS} hops")
    print(f"\n{total:,} audits of honest servers, {false} called unlike\n")
    print(
        "| servers | hidden states | audits | largest typical | allowed | largest single | allowed | margin | unlike |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for each in honest:
        allowed = each["allowed"]
        compared = [f"{each['largest_typical']:.2g}", f"{allowed['typical']:g}"]
        compared += [f"{each['largest']:.2g}", f"{allowed['largest']:g}", f"{each['margin']:.1f}"]
        cells = [each["pair"].replace(" | ", ", "), each["journey"], f"{each['num_audits']:,}", *compared]
        print("| " + " | ".join(cells) + f" | {each['num_false']} |")
    pairs = list(found["detection"])
    print("\n| found, in windows of " + ", ".join(map(str, WINDOWS)) + " | " + " | ".join(pairs) + " |")
    print("|---|" + "---|" * len(pairs))
    for lie in {lie: None for pair in pairs for lie in found["detection"][pair]}:
        cells = [", ".join(f"{part:.1%}" for part in found["detection"][pair].get(lie, {}).values()) for pair in pairs]
        print(f"| {lie} | " + " | ".join(cells) + " |")
    print(f"\n{found['num_aimed']:,} tokens of the last hop; {found['num_unflipped']} aimed changes failed\n")
    print("| tokens that become others | aimed | noise of that size | honest |\n|---|---|---|---|")
    for name, parts in found["aimed"].items():
        cells = [f"{parts[key]:.1%}" if key in parts else "" for key in ("aimed", "noise", "honest")]
        print(f"| {name} | " + " | ".join(cells) + " |")


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STORIES, help="the bundled one by default")
    parser.add_argument("--windows", type=int, default=100_000, help="audits of honest servers")
    parser.add_argument("--texts", type=int, default=8, help=f"a multiple of {GROUP}")
    parser.add_argument("--length", type=int, default=288, help="tokens of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.texts % GROUP or arguments.length <= WINDOWS[-1] + FIRST_POSITION:
        parser.error(f"texts are computed in groups of {GROUP}, and have more than {WINDOWS[-1]} tokens")
    transformers.utils.logging.disable_progress_bar()
    found = study(
        arguments.model,
        num_windows=arguments.windows,
        num_texts=arguments.texts,
        num_tokens=arguments.length,
        seed=arguments.seed,
    )
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), **found}, indent=2))
        return
    print(f"{describe_machine()}\n")
    show(found)


if __name__ == "__main__":
    main()
