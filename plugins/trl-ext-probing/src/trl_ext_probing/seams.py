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
    "trl.trainer.sft_trainer:SFTTrainer._prepare_dataset": (
        "tokenises demonstrations: EOS once at the end, labels from where prompt and completion part ways"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer.__init__": (
        "ends completions at the tokenizer's EOS and at those of the model's generation settings"
    ),
    "trl.trainer.grpo_trainer:GRPOTrainer._calculate_rewards": (
        "passes prompts, completions, completion_ids, trainer_state, log_extra, log_metric and the columns by keyword"
    ),
    "transformers.cache_utils:DynamicLayer": "keeps keys and values (B, heads, T, D) of all tokens, once initialized",
    "transformers.utils:cached_file": "path of a file of a hub id, under snapshots/COMMIT; OSError where there is none",
    "transformers.utils.peft_utils:find_adapter_config_file": "path of a hub id's adapter_config.json, or None",
}
