"""The seams of TRL and transformers that this distribution stands on; `tests/test_seams.py` fingerprints them."""

OVERRIDDEN: dict[str, str] = {
    "trl.trainer.sft_trainer:SFTTrainer.__init__": "takes args, model and data sets under these names",
    "trl.trainer.sft_trainer:SFTTrainer.training_step": "called once a micro-step, with the batch as it was collated",
    "transformers.trainer:Trainer.save_model": "TRL's script calls it with the output folder after training",
}

READ: dict[str, str] = {
    "trl.scripts.sft:main": "takes its trainer from `trl.SFTTrainer` when it is called, trains and saves",
    "trl.trainer.utils:add_fused_lm_head": (
        "replaces `forward` on the instance; with `fused_lm_head=True` outputs have log_probs (B, T - 1) of the labels"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer.__init__": (
        "ends completions at the tokenizer's EOS and at those of the model's generation settings"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer._generate_and_score_completions": (
        "advantages are rewards minus the group's mean, over its standard deviation plus 1e-4"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer._calculate_rewards": (
        "passes prompts, completions, completion_ids and the columns by keyword; None becomes NaN"
    ),
    "accelerate.utils:gather_object": "concatenates the lists of all ranks, in the order of the ranks",
    "accelerate.utils:gather": "concatenates the tensors of all ranks in the order of the ranks",
}
