"""The seams of TRL and transformers that this distribution stands on; `tests/test_seams.py` fingerprints them."""

READ: dict[str, str] = {
    "trl.trainer.utils:add_fused_lm_head": (
        "calls `base_model`, then reads weight and bias of `get_output_embeddings()` without calling that module"
    ),
    "trl.kernels.chunked_logprob:ChunkedLogProbFunction": (
        "log-probability and entropy of each token; the head's weight gradient is one sum over all tokens"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss": (
        "bnpo, dapo, cispo and vespo divide by tokens; grpo and sapo by the tokens of each row, then by rows"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer._generate_and_score_completions": (
        "advantages are rewards minus the group's mean, over its standard deviation plus 1e-4"
    ),
}
