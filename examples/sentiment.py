"""Soft prompts: did the day end well or badly?

The model in the swarm does not change. Training changes a few vectors before each text and a linear layer after it,
both on this machine. `data.py` generates the texts.

    python examples/sentiment.py --initial-peers ADDRESS --folder results
"""

import torch
from common import options
from data import reviews
from plot import plot
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BatchEncoding

from shoal import AutoDistributedModelForSequenceClassification


def main() -> None:
    chosen = options(__doc__, steps=80, lr=1e-2).parse_args()
    torch.manual_seed(chosen.seed)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoDistributedModelForSequenceClassification.from_pretrained(
        chosen.model,
        initial_peers=chosen.initial_peers,
        dtype="float32",
        num_labels=2,
        tuning_mode="ptune",
        pre_seq_len=8,
    )

    def batch(size: int, *, seed: int) -> tuple[BatchEncoding, torch.Tensor]:
        texts, labels = zip(*reviews(size, seed=seed), strict=True)
        return tokenizer(list(texts), padding=True, return_tensors="pt"), torch.tensor(labels)

    @torch.no_grad()
    def accuracy() -> float:
        inputs, labels = batch(128, seed=chosen.seed)
        return (model(**inputs).logits.argmax(dim=-1) == labels).float().mean().item()

    print(f"accuracy before: {accuracy():.2f}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=chosen.lr)
    losses: list[float] = []
    for step in range(1, chosen.steps + 1):
        inputs, labels = batch(chosen.batch_size, seed=chosen.seed + step)
        loss = cross_entropy(model(**inputs).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
    print(f"accuracy after: {accuracy():.2f}")
    plot({"soft prompt": losses}, "How a day ended", chosen.folder / "sentiment.png")


if __name__ == "__main__":
    main()
