"""The seams of TRL and transformers that this distribution stands on; `tests/test_seams.py` fingerprints them."""

READ: dict[str, str] = {
    "trl.trainer.sft_trainer:SFTTrainer._prepare_dataset": (
        "tokenises demonstrations: EOS once at the end, labels from where prompt and completion part ways"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer.__init__": (
        "ends completions at the tokenizer's EOS and at those of the model's generation settings"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer._calculate_rewards": (
        "passes prompts, completions, completion_ids, trainer_state, log_extra, log_metric and the columns by keyword"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss": "dapo, bnpo, cispo, vespo divide by tokens, others by rows",
    "trl.trainer.utils:add_fused_lm_head": (
        "without `fused_lm_head` the forward is the model's own, whose logits no temperature divides"
    ),
    "transformers.trainer:Trainer._clip_grad_norm": "accelerate clips the norm of all gradients, as torch does",
}
