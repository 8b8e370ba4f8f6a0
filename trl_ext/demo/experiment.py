"""The trainings behind the demo: plain use of `trl_ext.SFTTrainer` on a local model."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_ext import SFTConfig, SFTTrainer
from trl_ext.demo.settings import Settings
from trl_ext.testing import ModularChain, exact_match, save_model, tiny_llama, tiny_tokenizer


class Experiment:
    """One base model, then fine-tunings from it; each leaves its model, facts and log in a folder of its own."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.task = ModularChain(steps=settings.chain_steps)
        self.tokenizer = tiny_tokenizer()
        self.held_out = self.task.dataset(settings.held_out, split="held_out")
        self.base = str(folder / "base")

    def train_base(self) -> float:
        """Train the base model on right demonstrations; give its held-out exact match in [0, 1]."""
        s = self.settings
        model = tiny_llama(hidden=s.hidden)
        self._train(
            "base",
            model,
            self.task.dataset(s.base_rows),
            max_steps=s.base_steps,
            per_device_train_batch_size=s.base_batch_size,
            learning_rate=s.base_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=s.base_steps // 10,
        )
        save_model(model, self.tokenizer, self.base)
        return exact_match(model, self.tokenizer, self.held_out)

    def fine_tune(self, name: str, plugins: list[str], seed: int) -> tuple[float, dict[int, float]]:
        """Fine-tune the base model; give held-out exact match of the model that was saved, and held-out NLL by step.

        Both are of the weights that the run deploys, which are the average's with `ema`. The seed decides the
        demonstrations, which of them are wrong, and their order; runs of one seed share all three.
        """
        s = self.settings
        run = f"{name.replace(' + ', '-')}-seed{seed}"
        trainer = self._train(
            run,
            AutoModelForCausalLM.from_pretrained(self.base),
            self.task.dataset(s.demonstrations, noise=s.noise, seed=1 + seed),
            plugins=plugins,
            num_train_epochs=s.epochs,
            per_device_train_batch_size=s.batch_size,
            learning_rate=s.learning_rate,
            lr_scheduler_type="constant",
            seed=seed,
            eval_dataset=self.held_out,
            eval_strategy="steps",
            eval_steps=s.eval_steps,
            per_device_eval_batch_size=s.held_out,
        )
        # The saved model, since that is what a user gets: with `ema` it has the averaged weights.
        saved = AutoModelForCausalLM.from_pretrained(self.folder / run)
        # Without plugins the loss is the NLL, and a run logs nothing that plain TRL does not.
        log = trainer.state.log_history
        nll = {row["step"]: row.get("eval_nll", row["eval_loss"]) for row in log if "eval_loss" in row}
        return exact_match(saved, self.tokenizer, self.held_out), nll

    def _train(
        self, run: str, model: PreTrainedModel, dataset: Dataset, eval_dataset: Dataset | None = None, **config: Any
    ) -> SFTTrainer:
        folder = self.folder / run
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        args = SFTConfig(
            str(folder),
            bf16=False,
            use_cpu=True,  # the same numbers with and without an accelerator
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            **config,
        )
        with (folder / "train.log").open("w") as log, contextlib.redirect_stdout(log):
            trainer = SFTTrainer(
                model,
                args=args,
                train_dataset=dataset,
                eval_dataset=eval_dataset,
                processing_class=self.tokenizer,
            )
            trainer.train()
            trainer.save_model()
        return trainer
