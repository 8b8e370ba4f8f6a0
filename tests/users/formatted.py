"""Data in columns of another form, which a function turns into text."""

import sys

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer


def formatting_func(example):
    return f"### Question: {example['question']}\n ### Answer: {example['answer']}"


trainer = SFTTrainer(
    "model",
    args=SFTConfig(
        output_dir=sys.argv[1],
        packing=True,
        max_length=64,
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"},
        use_cpu=True,
        bf16=False,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files="questions.jsonl", split="train"),
    formatting_func=formatting_func,
)
trainer.train()
trainer.save_model(sys.argv[1])
