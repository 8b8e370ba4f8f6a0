"""The seams of TRL and accelerate that this distribution stands on; `tests/test_seams.py` fingerprints them."""

READ: dict[str, str] = {
    "trl.trainer.grpo_trainer:GRPOTrainer._generate_and_score_completions": (
        "advantages are rewards minus the group's mean, over its standard deviation plus 1e-4"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss": (
        "grpo, bnpo, dr_grpo, dapo and luspo clip the ratio by epsilon, epsilon_high and delta; the others do not"
    ),
    "accelerate.utils:gather": "concatenates the tensors of all ranks in the order of the ranks",
    "accelerate.utils:pad_across_processes": "pads a dimension to its largest size over the ranks",
    "accelerate.utils:reduce": "sums tensors over all ranks",
}
