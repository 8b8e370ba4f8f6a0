"""SFT of an adapter that the script puts on the model itself."""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

set_seed(0)
model = AutoModelForCausalLM.from_pretrained("model")
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=sys.argv[1],
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files="data.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained("model"),
)
trainer.train()
trainer.save_model()
