"""Train the bundled model: `python scripts/train_stories.py`.

The model and its tokenizer go to src/shoal/bundled/stories, and the loss curve to docs/stories.
"""

import csv
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from stories.training import Recipe, build_model, held_out_loss, save, train, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Once upon a time"
LOG_EVERY = 10
EVALUATE_EVERY = 50

stderr = Console(stderr=True)


def main(
    model_folder: Annotated[Path, typer.Option(help="Folder for the model.")] = ROOT / "src/shoal/bundled/stories",
    docs_folder: Annotated[Path, typer.Option(help="Folder for the loss curve.")] = ROOT / "docs/stories",
    steps: Annotated[int, typer.Option(min=1)] = Recipe.num_steps,
    seed: int = Recipe.seed,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Train the bundled model, and print its losses and samples of its text."""
    torch.set_num_threads(threads)
    recipe = Recipe(num_steps=steps, seed=seed)
    started = time.perf_counter()
    with stderr.status("Training the tokenizer"):
        tokenizer = train_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    docs_folder.mkdir(parents=True, exist_ok=True)
    curve = docs_folder / "loss.csv"

    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeRemainingColumn(), console=stderr) as progress, curve.open("w", newline="") as file:
        task = progress.add_task("train", total=steps, loss=float("nan"))
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("step", "tokens", "lr", "train_loss", "held_out_loss", "held_out_names"))
        recent: list[float] = []
        losses = train(model, tokenizer, recipe)
        for step, loss in enumerate(losses, start=1):
            recent.append(loss)
            progress.update(task, advance=1, loss=loss)
            if step % LOG_EVERY == 0 or step == steps:
                held_out: tuple[str, str] = ("", "")
                if step % EVALUATE_EVERY == 0:
                    measured = held_out_loss(model, tokenizer, 40)
                    held_out = (f"{measured.mean:.4f}", f"{measured.repeated_names:.4f}")
                    model.train()
                mean = sum(recent) / len(recent)
                recent.clear()
                tokens = step * recipe.tokens_per_step
                rows.writerow((step, tokens, f"{recipe.lr(step - 1):.6f}", f"{mean:.4f}", *held_out))
                file.flush()

    num_parameters = model.num_parameters()
    model = save(model, tokenizer, model_folder)
    plot(curve)
    print(f"parameters     {num_parameters:,}")
    print(f"tokens seen    {tokens:,}")
    print(f"training loss  {mean:.4f}  (mean of the last steps)")
    held = held_out_loss(model, tokenizer)
    print(f"held-out loss  {held.mean:.4f}  (weights rounded to bfloat16)")
    print(f"  names        {held.repeated_names:.4f}  (names that occurred before; all other tokens {held.others:.4f})")
    print(f"wall time      {(time.perf_counter() - started) / 60:.1f} minutes on {threads} threads")

    prompt = tokenizer(PROMPT, return_tensors="pt")
    for sample_seed in (None, 1, 2, 3):
        options = {"do_sample": False} if sample_seed is None else {"do_sample": True, "temperature": 0.8}
        torch.manual_seed(sample_seed or 0)
        ids = model.generate(**prompt, **options, max_new_tokens=300)
        name = "greedy" if sample_seed is None else f"sampled at temperature 0.8, seed {sample_seed}"
        print(f"\n{name}:\n{tokenizer.decode(ids[0], skip_special_tokens=True)}")


def plot(curve: Path) -> None:
    """Plot the loss curve, and save it beside its CSV file."""
    from matplotlib import pyplot as plt

    with curve.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([int(r["step"]) for r in rows], [float(r["train_loss"]) for r in rows], label="training", lw=1.2)
    held_out = [r for r in rows if r["held_out_loss"]]
    steps = [int(r["step"]) for r in held_out]
    axes.plot(steps, [float(r["held_out_loss"]) for r in held_out], "o", ms=4, label="held out")
    axes.plot(steps, [float(r["held_out_names"]) for r in held_out], "^", ms=4, label="held out, repeated names")
    axes.set(
        xlabel="step", ylabel="loss (nats per token)", yscale="log", title="Stories: 12 blocks, trained from scratch"
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(curve.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    typer.run(main)
