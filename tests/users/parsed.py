"""TRL's parser with the script's own settings and a subclass of TRL's config; it goes on from the last checkpoint."""

import os
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser


@dataclass
class ScriptArguments:
    data_file: str = field(metadata={"help": "JSON lines to train on."})


@dataclass
class TrainingConfig(SFTConfig):
    max_steps: int = field(default=2, metadata={"help": "Optimiser steps."})
    tags: list[str] = field(default_factory=list, metadata={"help": "Words for the model card."})


script_args, training_args, model_args = TrlParser(
    (ScriptArguments, TrainingConfig, ModelConfig)
).parse_args_and_config()

last_checkpoint = None
if os.path.isdir(training_args.output_dir):
    last_checkpoint = get_last_checkpoint(training_args.output_dir)

trainer = SFTTrainer(
    model=model_args.model_name_or_path,
    args=training_args,
    train_dataset=load_dataset("json", data_files=script_args.data_file, split="train"),
)
trainer.train(resume_from_checkpoint=last_checkpoint)
trainer.save_model(training_args.output_dir)
trainer.save_state()
if trainer.accelerator.is_main_process:
    trainer.create_model_card(tags=training_args.tags)
