"""The seams of TRL and transformers that this distribution stands on; `tests/test_seams.py` fingerprints them."""

READ: dict[str, str] = {
    "trl.kernels.chunked_divergence:_compute_dtype": "autocast's, or that of the hidden states",
    "trl.kernels.chunked_divergence:_project": "a tile of logits in fp32, from operands in fp32 or lower",
    "trl.kernels.chunked_divergence:_stats_kernel": "in Triton, called as `kernel[grid](...)`, what `_stats_tile` does",
    "trl.kernels.chunked_divergence:_stats_tile": "folds tiles of both models' logits into statistics of seven kinds",
    "trl.kernels.chunked_divergence:_backward_kernel": "in Triton what `_backward_tile` does",
    "trl.kernels.chunked_divergence:_backward_tile": (
        "replaces a tile by exp(logits - log_z) - exp(ref_logits - ref_log_z), with MODE 0"
    ),
    "trl.kernels.chunked_logprob:_addmm_fp32": "adds a product to an fp32 sum, without rounding the product first",
    "trl.kernels.chunked_logprob:_use_triton": "whether a device runs the kernels",
    "trl.kernels.chunked_logprob:_BLOCK_SIZE": "logits that a program of a kernel takes at a time",
    "trl.trainer.utils:add_fused_lm_head": (
        "replaces `forward` on the instance; with `fused_lm_head=True` outputs have log_probs (B, T - 1) of the labels"
    ),
}
