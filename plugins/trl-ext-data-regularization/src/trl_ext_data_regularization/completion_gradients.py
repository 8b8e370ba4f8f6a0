"""The gradient of each completion's own policy loss, in each layer, without a trace in the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trl_ext.own_passes import preserved_random_state
from trl_ext.records import SetupContext
from trl_ext_data_regularization.engines import Direct, Projections, Sketch, Target
from trl_ext_data_regularization.layers import Batch, find_layers
from trl_ext_data_regularization.taps import Taps
from trl_ext_data_regularization.token_coefficients import PolicyBatch
from trl_ext_data_regularization.visitors import ScorePass


class CompletionGradients:
    """Taps a model for passes of its own, until `remove`.

    Args:
        context: the model.
        engine: "direct" forms every gradient, "sketch" a random projection of it.
        projections: of the sketches.
        temperature: what the logits are divided by in the policy loss.
        rows: completions a forward.
    """

    def __init__(
        self,
        context: SetupContext,
        engine: Literal["sketch", "direct"],
        projections: Projections,
        temperature: float,
        rows: int,
    ) -> None:
        self._context = context
        self._engine = engine
        self._projections = projections
        self._rows = rows
        self._layers, uses = find_layers(context.model, context.names)
        self._taps = Taps(context.model, uses, temperature)

    def remove(self) -> None:
        """Leave the model as it was."""
        self._taps.remove()

    def of(self, batches: Sequence[PolicyBatch]) -> list[Tensor]:
        """Per layer (N, D) float, N the rows of all batches: the gradient of -sum_t c_t log pi_t, or its sketch."""
        total, device = sum(map(len, batches)), self._context.device
        nothing = Target([None] * len(self._context.names))  # the target is one of the vectors here
        engine = (
            Direct(self._layers, nothing, total, device)
            if self._engine == "direct"
            else Sketch(self._layers, nothing, total, device, self._projections)
        )
        offset = 0
        for batch in batches:
            for start in range(0, len(batch), self._rows):
                rows = slice(start, min(start + self._rows, len(batch)))
                self._pass(engine, batch, rows, offset + start)
            offset += len(batch)
        return [engine.vectors(layer) for layer in range(len(self._layers))]

    def _pass(self, engine: Direct | Sketch, batch: PolicyBatch, rows: slice, offset: int) -> None:
        """Forward and backward of some rows, unwrapped: no counter, metric, gradient or random state moves."""
        context, inputs = self._context, batch.inputs(rows)
        index = torch.arange(rows.stop - rows.start, device=context.device).unsqueeze(1).expand_as(inputs["input_ids"])
        scoring = self._taps.active(ScorePass(engine), Batch(index, len(index), offset, True))
        with preserved_random_state(context.device), torch.enable_grad(), scoring:
            output = context.model(**inputs, use_cache=False, fused_lm_head=True)
            log_probs = output.log_probs[:, -batch.mask.shape[1] :]
            (-(log_probs * batch.coefficients[rows])).sum().backward()
