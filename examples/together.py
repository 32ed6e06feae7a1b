"""Two participants train one adapter, and neither sees the other's data.

Each participant has stories with another kind of question (`participant.py`). It trains LoRA factors on them for a few
steps, and continues from the mean of both adapters. A coordinator computes the mean (`federated.py`); with
--decentralized, the participants compute it together (`decentralized.py`). With --private, the adapters reveal little
about any single story (`private.py`). Servers see hidden states, and no text.

    python examples/together.py --initial-peers ADDRESS --folder results [--decentralized] [--private]
"""

from contextlib import nullcontext

import private
from common import options
from decentralized import hash_table
from federated import coordinate, participants, receive
from participant import NUM_STORIES, QUESTIONS, participate
from plot import plot


def main() -> None:
    parser = options(__doc__, steps=40, lr=1e-2)
    parser.add_argument("--local-steps", type=int, default=4, help="steps between two means")
    parser.add_argument("--decentralized", action="store_true")
    private.add_options(parser)
    chosen = parser.parse_args()
    rounds = 0 if chosen.decentralized else chosen.steps // chosen.local_steps
    with (
        participants(len(QUESTIONS), participate, chosen) as connections,
        hash_table(connections) if chosen.decentralized else nullcontext(),
    ):
        coordinate(connections, rounds=rounds)
        results = receive(connections)
    for number, (before, after, _) in enumerate(results):
        print(f"participant {number}: accuracy before: {before:.2f}, after: {after:.2f}")
    if chosen.private:
        spent = private.epsilon(chosen, num_examples=NUM_STORIES)
        print(f"epsilon: {spent:.2f}, delta: {chosen.delta:g}, for each of a participant's {NUM_STORIES} stories")
    else:
        losses = {f"participant {number}": losses for number, (*_, losses) in enumerate(results)}
        plot(losses, "Two participants, one adapter", chosen.folder / "together.png")


if __name__ == "__main__":
    main()
