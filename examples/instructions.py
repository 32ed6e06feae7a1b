"""LoRA: a model that tells stories learns to answer questions.

TRL's SFTTrainer trains factors for every linear layer of the blocks in the swarm. The factors, their optimizer and the
data stay on this machine. The swarm then generates answers with the adapter; only exact answers count.

    python examples/instructions.py --initial-peers ADDRESS --folder results
"""

import torch
from common import exact_answers, load, options
from data import tasks
from datasets import Dataset
from peft import LoraConfig
from plot import plot
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = options(__doc__, steps=40, lr=3e-3)
    parser.add_argument("--rank", type=int, default=8)
    chosen = parser.parse_args()
    torch.manual_seed(chosen.seed)
    tokenizer, model = load(chosen)
    held_out = tasks(64, seed=chosen.seed + 1)
    print(f"accuracy before: {exact_answers(model, tokenizer, held_out):.2f}")
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(chosen.folder / "checkpoints"),
            max_steps=chosen.steps,
            per_device_train_batch_size=chosen.batch_size,
            learning_rate=chosen.lr,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=chosen.seed,
        ),
        train_dataset=Dataset.from_list(tasks(chosen.steps * chosen.batch_size, seed=chosen.seed)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=chosen.rank, lora_alpha=2 * chosen.rank, target_modules="all-linear"),
    )
    trainer.train()
    print(f"accuracy after: {exact_answers(trainer.model, tokenizer, held_out):.2f}")
    trainer.save_model(str(chosen.folder / "adapter"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    plot({"LoRA": losses}, "Questions and answers", chosen.folder / "instructions.png")


if __name__ == "__main__":
    main()
