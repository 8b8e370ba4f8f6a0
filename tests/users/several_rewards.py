"""GRPO with two reward functions of different weight, one of which reads a column."""

import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer


def digits(completions, **kwargs):
    return [sum(character.isdigit() for character in text) / 5 for text in completions]


def near_in_length(completions, answer, **kwargs):
    return [-abs(len(text) - len(target)) / 5 for text, target in zip(completions, answer, strict=True)]


trainer = GRPOTrainer(
    model="model",
    reward_funcs=[digits, near_in_length],
    args=GRPOConfig(
        output_dir=sys.argv[1],
        reward_weights=[1.0, 0.5],
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=5,
        learning_rate=1e-2,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        model_init_kwargs={"dtype": "float32"},
    ),
    train_dataset=load_dataset("json", data_files="data.jsonl", split="train"),
)
trainer.train()
trainer.save_model()
