"""The seams of TRL and transformers that this distribution stands on; `tests/test_seams.py` fingerprints them."""

READ: dict[str, str] = {
    "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss": "dapo, bnpo, cispo, vespo divide by tokens, others by rows",
    "trl.trainer.utils:add_fused_lm_head": (
        "without `fused_lm_head` the forward is the model's own, whose logits no temperature divides"
    ),
    "transformers.trainer:Trainer._clip_grad_norm": "accelerate clips the norm of all gradients, as torch does",
}
