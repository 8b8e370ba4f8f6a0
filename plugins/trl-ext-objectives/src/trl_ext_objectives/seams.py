"""The seams of TRL and transformers that this distribution stands on; `tests/test_seams.py` fingerprints them."""

READ: dict[str, str] = {
    "trl.kernels.chunked_divergence:ChunkedDivergenceFunction": (
        "divergence of each token over the vocabulary, in tiles; a coefficient of 0 gives KL(reference || student)"
    ),
    "trl.trainer.utils:add_fused_lm_head": (
        "replaces `forward` on the instance; with `fused_lm_head=True` outputs have log_probs (B, T - 1) of the labels"
    ),
}
