"""Auxiliary losses: plugins give numerators, the core owns the denominators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trl_ext.records import AuxiliaryLoss, MicroStep

if TYPE_CHECKING:
    from trl_ext.trainers.mixin import TrainerMixin


def add_auxiliary_losses(
    trainer: TrainerMixin,
    loss: Tensor,
    micro_step: MicroStep,
    *,
    per_token: Tensor | float,
    per_sequence: Tensor | float,
    per_batch: float,
) -> Tensor:
    """Add every plugin's named terms to a micro-step's loss, and note their values for the log.

    The denominators are those seen from one rank: after averaging over ranks and adding over the window, a term is the
    mean over the window's label tokens or samples on all ranks, or the mean of the micro-batches' values.

    Raises:
        PluginError: a plugin returns anything but a mapping of names to scalar `AuxiliaryLoss`.
    """
    denominators = {"token": per_token, "sequence": per_sequence, "batch": per_batch}
    for plugin, call in trainer.ext_plugins.calls("auxiliary_losses"):

        def checked(call: Any = call, **arguments: Any) -> Mapping[str, AuxiliaryLoss]:
            terms = call(**arguments)
            for name, term in terms.items():
                if not isinstance(term, AuxiliaryLoss) or term.value.ndim or term.per not in denominators:
                    raise TypeError(f"term '{name}' is {term!r}; expected AuxiliaryLoss(scalar, per)")
            return terms

        terms = trainer.ext_guard.run("auxiliary_losses", plugin, checked, {}, micro_step=micro_step)
        for name, term in terms.items():
            value = term.value / denominators[term.per]
            loss = loss + value
            trainer._ext_tally.add_term(f"{plugin}/{name}", value)
    return loss
