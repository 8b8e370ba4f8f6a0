"""An optimiser and a schedule that the script builds itself."""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, get_constant_schedule_with_warmup
from trl import SFTConfig, SFTTrainer

model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
head = [p for name, p in model.named_parameters() if "lm_head" in name]
body = [p for name, p in model.named_parameters() if "lm_head" not in name]
optimizer = torch.optim.SGD([{"params": body, "lr": 0.1}, {"params": head, "lr": 0.01}], momentum=0.9)

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir=sys.argv[1], max_steps=2, logging_steps=1, use_cpu=True, bf16=False, report_to="none"),
    train_dataset=load_dataset("json", data_files="data.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained("model"),
    optimizers=(optimizer, get_constant_schedule_with_warmup(optimizer, num_warmup_steps=1)),
)
trainer.train()
trainer.save_model()
