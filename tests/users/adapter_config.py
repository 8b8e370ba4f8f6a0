"""SFT of an adapter that the trainer puts on the model, which it loads by name; with evaluation."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

data = load_dataset("json", data_files="data.jsonl", split="train").train_test_split(8, seed=0)
args = SFTConfig(
    sys.argv[1],
    max_steps=2,
    learning_rate=1e-2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    eval_strategy="steps",
    eval_steps=1,
    use_cpu=True,
    bf16=False,
    report_to="none",
    model_init_kwargs={"dtype": "float32"},
)
trainer = SFTTrainer(
    "model",
    args,
    train_dataset=data["train"],
    eval_dataset=data["test"],
    peft_config=LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]),
)
trainer.train()
trainer.save_model(sys.argv[1])
