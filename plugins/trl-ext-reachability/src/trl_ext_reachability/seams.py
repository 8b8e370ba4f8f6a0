"""The seams of TRL and transformers that this distribution stands on; `tests/test_seams.py` fingerprints them."""

READ: dict[str, str] = {
    "trl.trainer.grpo_trainer:GRPOTrainer._generate_and_score_completions": (
        "advantages are rewards minus the group's mean, over its standard deviation plus 1e-4"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer._calculate_rewards": (
        "passes prompts, completions, completion_ids and the columns by keyword; None becomes NaN"
    ),
    "accelerate.utils:gather": "concatenates the tensors of all ranks in the order of the ranks",
}
