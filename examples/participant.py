"""A participant of `together.py`. It trains on its own stories; from the others it gets only their adapters."""

from argparse import Namespace
from multiprocessing.connection import Connection

import private
import torch
from common import answer_loss, exact_answers, load
from data import tasks
from decentralized import by_hivemind
from federated import by_coordinator
from peft import LoraConfig, get_peft_model
from plot import plot

QUESTIONS = ("Who?", "With?")
"""The question in the stories of each participant."""
NUM_STORIES = 2000


def participate(number: int, parent: Connection, chosen: Namespace) -> None:
    """Train, and send the accuracy before and after, and the losses of the steps unless they are private."""
    torch.manual_seed(chosen.seed)  # all participants begin with the same factors
    tokenizer, model = load(chosen)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj"]))
    model.requires_grad_(
        False
    )  # A is fixed, so that the mean of the Bs gives the mean of the products (arXiv 2403.12313)
    factors = [factor.requires_grad_() for name, factor in model.named_parameters() if "lora_B" in name]
    optimizer = torch.optim.Adam(factors, lr=chosen.lr)

    def loss_of(batch: list[dict[str, str]]) -> torch.Tensor:
        return answer_loss(model, tokenizer, batch)

    stories = tasks(NUM_STORIES, seed=chosen.seed + number, questions=[QUESTIONS[number]])
    held_out = tasks(64, seed=chosen.seed + len(QUESTIONS), questions=QUESTIONS)
    losses, before = [], exact_answers(model, tokenizer, held_out)
    if chosen.private and chosen.noise_seed is None:
        torch.seed()  # the noise must be unpredictable
    else:
        torch.manual_seed((chosen.seed if chosen.noise_seed is None else chosen.noise_seed) + number)
    averaging = by_hivemind if chosen.decentralized else by_coordinator
    with averaging(factors, parent) as average:
        for step in range(1, chosen.steps + 1):
            draws = torch.rand(NUM_STORIES) < chosen.batch_size / NUM_STORIES
            batch = [story for story, is_drawn in zip(stories, draws, strict=True) if is_drawn]
            if chosen.private:
                losses.append(private.backward(loss_of, batch, factors, chosen))
            else:
                loss = loss_of(batch)
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            print(f"participant {number}, step {step}: loss {losses[-1]:.3f}", flush=True)
            if step % chosen.local_steps == 0:
                average()
    if chosen.private:  # exact losses reveal single stories, so the plot stays with this participant
        plot({"loss": losses}, f"Participant {number}", chosen.folder / f"participant-{number}.png")
    parent.send((before, exact_answers(model, tokenizer, held_out), None if chosen.private else losses))
