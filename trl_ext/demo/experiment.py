"""The trainings behind the demo: plain use of `trl_ext.SFTTrainer` on a local model, each in a process of its own.

Whoever starts those processes imports this module too, so what takes seconds to import is imported in the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trl_ext.demo.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from trl_ext import SFTTrainer


def train_base(settings: Mapping[str, Any], folder: str) -> float:
    """Train the base model on right demonstrations and save it; give its held-out exact match in [0, 1]."""
    from trl_ext.testing import ModularChain, exact_match, save_model, tiny_llama, tiny_tokenizer

    s = Settings(**settings)
    task, model = ModularChain(steps=s.chain_steps), tiny_llama(hidden=s.hidden)
    _train(
        folder,
        model,
        task.dataset(s.base_rows),
        max_steps=s.base_steps,
        per_device_train_batch_size=s.base_batch_size,
        learning_rate=s.base_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=s.base_steps // 10,
    )
    save_model(model, tiny_tokenizer(), folder)
    return exact_match(model, tiny_tokenizer(), task.dataset(s.held_out, split="held_out"))


def fine_tune(settings: Mapping[str, Any], base: str, folder: str, plugins: list[str], seed: int) -> dict[str, Any]:
    """Fine-tune the base model; give held-out exact match of the model that was saved, and held-out NLL by step.

    Both are of the weights that the run deploys, which are the average's with `ema`. The seed decides the
    demonstrations, which of them are wrong, and their order; runs of one seed share all three.
    """
    from transformers import AutoModelForCausalLM

    from trl_ext.testing import ModularChain, exact_match, tiny_tokenizer

    s = Settings(**settings)
    task = ModularChain(steps=s.chain_steps)
    held_out = task.dataset(s.held_out, split="held_out")
    trainer = _train(
        folder,
        AutoModelForCausalLM.from_pretrained(base),
        task.dataset(s.demonstrations, noise=s.noise, seed=1 + seed),
        plugins=plugins,
        num_train_epochs=s.epochs,
        per_device_train_batch_size=s.batch_size,
        learning_rate=s.learning_rate,
        lr_scheduler_type="constant",
        seed=seed,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=s.eval_steps,
        per_device_eval_batch_size=s.held_out,
    )
    # The saved model, since that is what a user gets: with `ema` it has the averaged weights.
    saved = AutoModelForCausalLM.from_pretrained(folder)
    # Without plugins the loss is the NLL, and a run logs nothing that plain TRL does not.
    log = trainer.state.log_history
    nll = {row["step"]: row.get("eval_nll", row["eval_loss"]) for row in log if "eval_loss" in row}
    return {"exact_match": exact_match(saved, tiny_tokenizer(), held_out), "held_out_nll": nll}


def _train(
    folder: str, model: PreTrainedModel, dataset: Dataset, eval_dataset: Dataset | None = None, **config: Any
) -> SFTTrainer:
    from trl_ext import SFTConfig, SFTTrainer
    from trl_ext.testing import tiny_tokenizer

    args = SFTConfig(
        folder,
        bf16=False,
        use_cpu=True,  # the same numbers with and without an accelerator
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        **config,
    )
    trainer = SFTTrainer(
        model, args=args, train_dataset=dataset, eval_dataset=eval_dataset, processing_class=tiny_tokenizer()
    )
    trainer.train()
    trainer.save_model()
    return trainer
