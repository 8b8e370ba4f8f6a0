"""A trainer with a loss of its own: label tokens weigh more towards the end of an answer."""

import sys

import torch
import torch.nn.functional as F
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


class RampedTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs)
        losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels, reduction="none")
        mask = labels != -100
        ramp = mask.cumsum(1) / mask.sum(1, keepdim=True)
        loss = (ramp * losses * mask).sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("model")
trainer = RampedTrainer(
    model=model,
    args=SFTConfig(
        output_dir=sys.argv[1],
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files="data.jsonl", split="train"),
    processing_class=tokenizer,
)
trainer.train()
trainer.model.save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
