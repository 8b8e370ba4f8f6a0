"""The seams of TRL and transformers that this distribution stands on; `tests/test_seams.py` fingerprints them."""

READ: dict[str, str] = {
    "trl.kernels.chunked_divergence:ChunkedDivergenceFunction": (
        "divergence of each token over the vocabulary, in tiles; a coefficient of 0 gives KL(reference || student)"
    ),
    "trl.trainer.utils:add_fused_lm_head": (
        "replaces `forward` on the instance; with `fused_lm_head=True` outputs have log_probs (B, T - 1) of the labels"
    ),
    "trl.trainer.sft_trainer:SFTTrainer._prepare_dataset": (
        "writes input_ids and labels into each row of a streamed data set and keeps the row's other columns"
    ),
}
