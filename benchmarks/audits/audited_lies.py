"""The liars of `benchmarks.audits`: what they answer in place of what they claim, and how many audits find them."""

# B texts, T tokens of each, D hidden size

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.audits.audited_servers import BESIDE, BFLOAT16, FLOAT32, INT8, NF4, WHOLE, Hop, Kind, Passes, alone
from shoal.client.decoding.auditing.claim import FIRST_POSITION
from shoal.client.swarm.comparing.distances import distances
from shoal.policy.audits.likeness import allowed_between, are_alike
from shoal.spans import Span

WINDOWS = (8, 32, 128)
CLAIMS = ((BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32), (INT8, INT8))
"""What liars claim to be, and what the witness is."""
NUM_AUDITS = 40
"""The audits of each lie, claim and window, in each hop of each group of texts."""
REMEMBERED = 32
Tamper = Callable[[torch.Tensor, torch.Tensor, random.Random], torch.Tensor]
"""What is answered in place of the outputs of a window [T, D], with those of another text at the same positions."""


def _noise(hidden_TD: torch.Tensor, strength: float, rng: random.Random) -> torch.Tensor:
    """The same with noise, relative to the size of each hidden state."""
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    size_T1 = hidden_TD.float().square().mean(dim=-1, keepdim=True).sqrt()
    return hidden_TD + strength * size_T1 * torch.randn(hidden_TD.shape, generator=generator)


def _with(hidden_TD: torch.Tensor, at: int, values_TD: torch.Tensor) -> torch.Tensor:
    result_TD = hidden_TD.clone()
    result_TD[at : at + len(values_TD)] = values_TD
    return result_TD


def _two_swapped(own_TD: torch.Tensor, other_TD: torch.Tensor, rng: random.Random) -> torch.Tensor:
    at = rng.randrange(len(own_TD) - 1)
    return _with(own_TD, at, own_TD[at : at + 2].flip(0))


def _one_of_another(own_TD: torch.Tensor, other_TD: torch.Tensor, rng: random.Random) -> torch.Tensor:
    at = rng.randrange(len(own_TD))
    return _with(own_TD, at, other_TD[at : at + 1])


def _one_noisy(own_TD: torch.Tensor, other_TD: torch.Tensor, rng: random.Random) -> torch.Tensor:
    at = rng.randrange(len(own_TD))
    return _with(own_TD.float(), at, _noise(own_TD[at : at + 1].float(), 0.05, rng))


TAMPERED: dict[str, Tamper] = {
    "noise of 1 %": lambda own, other, rng: _noise(own, 0.01, rng),
    "noise of 5 %": lambda own, other, rng: _noise(own, 0.05, rng),
    "scaled by 0.95": lambda own, other, rng: own.float() * 0.95,
    "the output of the token before": lambda own, other, rng: own.roll(1, dims=0),
    "outputs of another text": lambda own, other, rng: other,
    "two neighboring tokens swapped": _two_swapped,
    "one token of another text": _one_of_another,
    "one token with noise of 5 %": _one_noisy,
}


def _computed_otherwise(hop: Hop, claimed: Kind) -> dict[str, torch.Tensor]:
    """The outputs [B, T, D] of servers that compute something else than all blocks in the claimed form."""
    inputs_BTD = hop.inputs_BTD["raw"]
    num_texts, num_tokens = inputs_BTD.shape[:2]
    server, whole = hop.servers[claimed], alone(num_texts, [num_tokens])
    start, end = hop.span.start, hop.span.end
    middle = (start + end) // 2
    before_BTD = server.compute(inputs_BTD, whole, span=Span(start, middle))
    found = {
        "the first block skipped": server.compute(inputs_BTD, whole, span=Span(start + 1, end)),
        "a middle block skipped": server.compute(before_BTD, whole, span=Span(middle + 1, end)),
        "the last block skipped": server.compute(inputs_BTD, whole, span=Span(start, end - 1)),
        f"only the last 1 to {REMEMBERED} tokens remembered": _forgetful(hop, claimed, whole),
        "NF4 weights": hop.answer(NF4, BESIDE),
    }
    return found | {"int8 weights": hop.answer(INT8, BESIDE)} if claimed is not INT8 else found


def _forgetful(hop: Hop, claimed: Kind, whole: Passes) -> torch.Tensor:
    """What a server answers that saves the memory of the past: it begins anew every few tokens."""
    inputs_BTD = hop.inputs_BTD["raw"]
    num_texts, num_tokens, _ = inputs_BTD.shape
    usable = num_tokens // REMEMBERED * REMEMBERED
    outputs_BTD = hop.servers[claimed].compute(inputs_BTD, whole)
    for start in range(0, usable, REMEMBERED):
        part = slice(start, start + REMEMBERED)
        outputs_BTD[:, part] = hop.servers[claimed].compute(inputs_BTD[:, part], alone(num_texts, [REMEMBERED]))
    return outputs_BTD


@dataclass
class Detection:
    """How many audits there were, and how many found the liar: by claim, witness, lie and window."""

    num_audits: dict[tuple[str, str, str, int], int] = field(default_factory=lambda: defaultdict(int))
    num_found: dict[tuple[str, str, str, int], int] = field(default_factory=lambda: defaultdict(int))

    def add(self, hop: Hop, rng: random.Random) -> None:
        """Audit all liars of a hop."""
        otherwise = {claimed: _computed_otherwise(hop, claimed) for claimed, _ in CLAIMS}
        for claimed, witness in CLAIMS:
            own_BTD = hop.answer(claimed, BESIDE)
            for size in WINDOWS:
                for name, outputs_BTD in otherwise[claimed].items():
                    self._audit(hop, claimed, witness, name, size, rng, lambda own, other, rng: own, outputs_BTD)
                for name, tamper in TAMPERED.items():
                    self._audit(hop, claimed, witness, name, size, rng, tamper, own_BTD)

    def _audit(
        self,
        hop: Hop,
        claimed: Kind,
        witness: Kind,
        lie: str,
        size: int,
        rng: random.Random,
        tamper: Tamper,
        outputs_BTD: torch.Tensor,
    ) -> None:
        key = claimed.name, witness.name, lie, size
        inputs_BTD, witnessed_BTD = hop.inputs_BTD["raw"], hop.answer(witness, WHOLE)
        num_texts, num_tokens, _ = inputs_BTD.shape
        allowed = allowed_between(claimed.form, witness.form)
        for _ in range(NUM_AUDITS):
            text, another = rng.sample(range(num_texts), 2)
            start = rng.randint(FIRST_POSITION, num_tokens - size)
            part = slice(start, start + size)
            answered_TD = tamper(outputs_BTD[text, part], outputs_BTD[another, part], rng)
            found = distances(answered_TD[None], witnessed_BTD[text, None, part], inputs_BTD[text, None, part])
            self.num_audits[key] += 1
            self.num_found[key] += not are_alike(found, allowed)

    def parts(self) -> dict[str, dict[str, dict[int, float]]]:
        """The part of the audits that found the liar: by claim and witness, lie, and window."""
        result: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for (claimed, witness, lie, size), count in self.num_audits.items():
            part = self.num_found[claimed, witness, lie, size] / count
            result[f"{claimed}, witness {witness}"][lie][size] = part
        return result
