"""The pieces of a causal language model that TRL's fused head is made of: backbone, and a plain linear LM head.

What a formula needs of the whole vocabulary, and the fused head does not give, is computed from the backbone's hidden
states and the head's weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trl_ext.own_passes import causal_lm

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from trl_ext.records import RunDescription

_RESCALED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def refuse_split_head(run: RunDescription, reader: str, instead: str) -> None:
    """Refuse a run whose LM head cannot be read.

    Args:
        run: the run.
        reader: who reads it, for the message.
        instead: what the user should do.

    Raises:
        ValueError: the weights are sharded.
    """
    if run.sharding not in ("none", "ddp"):
        raise ValueError(f"{reader} projects with the LM head itself, whose weight {run.sharding} splits up; {instead}")


def refuse_rescaled_logits(model: nn.Module, reader: str, instead: str = "take another model") -> None:
    """Raise ValueError where the logits are more than a matrix product of the hidden states."""
    config = causal_lm(model).config.get_text_config()
    rescaled = [name for name in _RESCALED if getattr(config, name, None) not in (None, 1, 1.0)]
    if rescaled:
        raise ValueError(f"{reader} does not support models with {rescaled[0]} ({config.model_type}); {instead}")


class BackboneTap:
    """Keeps the hidden states of the latest forward of a causal language model's backbone.

    Args:
        model: the model, with or without PEFT's wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self._lm = causal_lm(model)
        self._hidden: Tensor | None = None
        self._autocast: torch.dtype | None = None
        self.handle: RemovableHandle = self.backbone.register_forward_hook(self._keep)

    @property
    def backbone(self) -> nn.Module:
        """The model without its LM head."""
        return self._lm.base_model

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, H) and bias (V,) of the LM head, as TRL's fused head takes them."""
        head = self._lm.get_output_embeddings()
        return head.weight, head.bias

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hidden = output.last_hidden_state
        device = self._hidden.device.type
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def take(self) -> Tensor:
        """(B, T, H) of the positions that predict a label, as the fused head projects them; they are kept once."""
        if self._hidden is None:
            raise RuntimeError("the backbone has not run since its hidden states were last taken")
        hidden, self._hidden = self._hidden, None
        return hidden[:, :-1]

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of the latest forward: autocast lies in the wrapper around the model, not in the backbone."""
        device = next(self.backbone.parameters()).device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            yield
