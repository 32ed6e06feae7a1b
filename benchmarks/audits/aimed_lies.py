"""Outputs of the last hop that are changed as little as possible, so that another token becomes the likeliest.

With a final norm that scales by the root of the mean square, the sign of the difference of two logits is that of a
linear function of the hidden state h:

    logit(rival) - logit(top) = a.h / size(h),        a = weight * (row of the rival - row of the top)

So the smallest change is known in closed form for a quadratic measure of distance. An audit's distance is the larger of
two such measures. Each mixture of both gives a change; the best of these is taken.
"""

# N tokens, D hidden size, V vocabulary, R rivals

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from benchmarks.audits.audited_servers import BESIDE, BFLOAT16, FLOAT32, INT8, NF4, WHOLE, Hop
from shoal.client.decoding.auditing.claim import FIRST_POSITION
from shoal.client.swarm.comparing.distances import distances
from shoal.policy.audits.likeness import BOTH_INT8, EXACT, ONE_INT8, ONE_NF4, ROUNDED

NUM_RIVALS = 8
MIXTURES = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 1.0)
BEYOND = 1.001
"""How much further the change goes than to where both tokens are as likely."""
ALLOWED = {"exact": EXACT, "rounded": ROUNDED, "both int8": BOTH_INT8, "one int8": ONE_INT8, "one NF4": ONE_NF4}


@dataclass
class Aimed:
    """How many of `num_tokens` tokens are flipped: by aimed changes and by noise of a size, and by honest servers."""

    head: PreTrainedModel
    num_tokens: int = 0
    num_unflipped: int = 0
    """Aimed changes that do not do what they should: the model's final norm is of another kind if there are many."""
    aimed: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    noisy: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    honest: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @torch.no_grad()
    def add(self, hop: Hop) -> None:
        """Attack all tokens of the last hop, text by text."""
        inputs_BTD = hop.inputs_BTD["raw"].float()[:, FIRST_POSITION:]
        outputs_BTD = hop.answer(FLOAT32, WHOLE)[:, FIRST_POSITION:]
        logits_BTV = self._logits(outputs_BTD)
        for kind in (BFLOAT16, INT8, NF4):
            other_BT = self._logits(hop.answer(kind, BESIDE)[:, FIRST_POSITION:].float()).argmax(dim=-1)
            self.honest[kind.name] += int((other_BT != logits_BTV.argmax(dim=-1)).sum())
        for inputs_ND, hidden_ND, logits_NV in zip(inputs_BTD, outputs_BTD, logits_BTV, strict=True):
            self._attack(inputs_ND, hidden_ND, logits_NV)

    def _attack(self, inputs_ND: torch.Tensor, hidden_ND: torch.Tensor, logits_NV: torch.Tensor) -> None:
        aimed_ND = hidden_ND + self._smallest_changes(hidden_ND, hidden_ND - inputs_ND, logits_NV)
        top_N = logits_NV.argmax(dim=-1)
        flipped_N = self._logits(aimed_ND).argmax(dim=-1) != top_N
        found_N = torch.tensor(distances(aimed_ND[None], hidden_ND[None], inputs_ND[None]))
        self.num_tokens += len(hidden_ND)
        self.num_unflipped += int((~flipped_N).sum())
        noise_ND = (hidden_ND - inputs_ND).square().mean(dim=0).sqrt() * torch.randn(hidden_ND.shape)
        size_N = torch.tensor(distances((hidden_ND + noise_ND)[None], hidden_ND[None], inputs_ND[None]))
        for name, allowed in ALLOWED.items():
            for which, limit in (("typical", allowed.typical), ("largest", allowed.largest)):
                self.aimed[name, which] += int((flipped_N & (found_N <= limit)).sum())
                noisy_ND = hidden_ND + noise_ND * (limit / size_N).float()[:, None]
                self.noisy[name, which] += int((self._logits(noisy_ND).argmax(dim=-1) != top_N).sum())

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head.lm_head(self.head.model.norm(hidden))
        return logits

    def _smallest_changes(
        self, hidden_ND: torch.Tensor, change_ND: torch.Tensor, logits_NV: torch.Tensor
    ) -> torch.Tensor:
        """For each token, the smallest change that makes one of its rivals likelier."""
        rows_VD = self.head.lm_head.weight * self.head.model.norm.weight
        whole_N1 = 1 / change_ND.square().sum(dim=-1, keepdim=True)
        channel_D = 1 / (change_ND.square().mean(dim=0) * change_ND.shape[1])
        ranks_NR = logits_NV.topk(NUM_RIVALS + 1).indices
        best_N = torch.full((len(hidden_ND),), float("inf"))
        best_ND = torch.zeros_like(hidden_ND)
        for rival in range(1, NUM_RIVALS + 1):
            toward_ND = rows_VD[ranks_NR[:, rival]] - rows_VD[ranks_NR[:, 0]]
            missing_N1 = -(toward_ND * hidden_ND).sum(dim=-1, keepdim=True)
            for part in MIXTURES:
                direction_ND = toward_ND / (part * whole_N1 + (1 - part) * channel_D)
                step_ND = BEYOND * missing_N1 * direction_ND / (toward_ND * direction_ND).sum(dim=-1, keepdim=True)
                squared_ND = step_ND.square()
                distance_N = torch.maximum(
                    (squared_ND * whole_N1).sum(dim=-1).sqrt(), (squared_ND * channel_D).sum(dim=-1).sqrt()
                )
                better_N = distance_N < best_N
                best_N = torch.where(better_N, distance_N, best_N)
                best_ND = torch.where(better_N[:, None], step_ND, best_ND)
        return best_ND

    def parts(self) -> dict[str, dict[str, float]]:
        """The part of the tokens that is flipped: by what is allowed and by which limit, and by honest servers."""
        num_tokens = max(1, self.num_tokens)
        result = {
            f"{name}, {which}": {"aimed": count / num_tokens, "noise": self.noisy[name, which] / num_tokens}
            for (name, which), count in self.aimed.items()
        }
        return result | {f"honest {name}": {"honest": each / num_tokens} for name, each in self.honest.items()}
