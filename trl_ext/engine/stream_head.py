"""TRL's fused LM head with the outputs that plugins want, and for streams in GRPO without the sampling temperature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from trl.trainer.utils import add_fused_lm_head


class StreamHead:
    """Gives contexts in which a GRPO model's head yields SFT log-probabilities.

    GRPO's head divides logits by the sampling temperature; SFT data wants them as they are. The heads are exchanged
    beneath the mixed precision that accelerate has put around the model's forward, so it is put around this one too.

    Args:
        base: the model that carries the head, without PEFT's wrapper.
        outputs: names of the head's outputs beside "log_probs" and "entropy".
        autocast: gives the context of accelerate's mixed precision.
        cast_to_fp32: whether the run computes the head in fp32.
    """

    def __init__(
        self,
        base: Callable[[], nn.Module],
        outputs: tuple[str, ...],
        autocast: Callable[[], AbstractContextManager[Any]],
        cast_to_fp32: bool,
    ) -> None:
        self.base = base
        self.outputs = tuple(dict.fromkeys(("log_probs", "entropy", *outputs)))
        self.autocast = autocast
        self.cast_to_fp32 = cast_to_fp32
        self._forward: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context; the head is built at its first use."""
        base = self.base()
        policy_forward = base.forward
        if self._forward is None:
            add_fused_lm_head(base, cast_lm_head_to_fp32=self.cast_to_fp32, outputs=self.outputs)
            self._forward = base.forward
        base.forward = self._forward
        try:
            with self.autocast():
                yield
        finally:
            base.forward = policy_forward
