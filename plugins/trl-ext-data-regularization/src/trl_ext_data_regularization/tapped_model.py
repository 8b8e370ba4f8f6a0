"""The model of one training: its layers with their taps, and which micro-batch each forward pass belongs to.

A forward hook cannot see where a batch comes from, but the order of the training forwards is known: the window's
micro-batches, and after them, where a plugin asks for one "after" the window, that of its stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.gradients import local_tensor
from trl_ext.records import SetupContext
from trl_ext_data_regularization.checks import one_pass
from trl_ext_data_regularization.layers import Batch, Layer, Use, find_layers
from trl_ext_data_regularization.plan import Plan
from trl_ext_data_regularization.taps import Taps, Visitor

Inputs = Mapping[str, Any]
"""What a forward pass was called with."""


class TappedModel:
    """Taps the layers, where the engine listens to backward passes, until `remove`.

    Args:
        plan: what is chosen, and how.
        context: the model as it will be trained.

    Raises:
        ValueError: this model or window cannot be trained so.
    """

    def __init__(self, plan: Plan, context: SetupContext) -> None:
        self.layers: list[Layer] = []
        uses: list[Use] = []
        if plan.scored_by != "derivative":
            self.layers, uses = find_layers(context.model, context.names)
        elif any(p.dtype not in (torch.float32, torch.float64) for p in context.model.parameters()):
            raise ValueError(
                "engine=derivative needs weights in fp32, those below an adapter too; load the model in fp32, or use "
                "engine=ghost"
            )
        self.one_pass = one_pass(plan, self.layers, context)
        self._waiting: list[Batch] = []
        self._afterwards: Callable[[Inputs], None] | None = None
        # Registered before the taps' own hooks, which ask whether the pass that begins is to be tapped.
        self._handle = context.model.register_forward_pre_hook(self._begin_forward, with_kwargs=True)
        self.taps = Taps(context.model, uses)
        self.own = OwnGradients(context.weights.parameters) if plan.from_stream else None

    def expect(
        self,
        batches: Sequence[Batch],
        visitor: Visitor | None = None,
        afterwards: Callable[[Inputs], None] | None = None,
    ) -> None:
        """Say what the next training forwards are.

        Args:
            batches: the window's micro-batches, in order.
            visitor: what their backward passes ask; None to leave them alone.
            afterwards: called with the inputs of the forward after the window's last.
        """
        self._waiting, self._afterwards, self.taps.visitor = list(batches), afterwards, visitor

    def rest(self) -> None:
        """Tap nothing until `expect`."""
        self.expect(())
        self.taps.batch = None

    def remove(self) -> None:
        """Leave the model as it was: a second `train()` taps it anew."""
        self.taps.remove()
        self._handle.remove()
        if self.own is not None:
            self.own.remove()

    def _begin_forward(self, model: nn.Module, args: Any, kwargs: Inputs) -> None:
        """Tell the taps which micro-batch the forward that begins belongs to, if it is one that was expected."""
        if self.taps.scoring or not (model.training and torch.is_grad_enabled()):
            return
        self.taps.batch = None
        if self._waiting:
            batch = self._waiting.pop(0)
            if batch.index.shape != kwargs["labels"].shape:
                raise RuntimeError(
                    f"expected a micro-batch of shape {tuple(batch.index.shape)}, and the model got "
                    f"{tuple(kwargs['labels'].shape)}: another plugin runs the model in training mode inside the "
                    "window; leave out that plugin or this one"
                )
            self.taps.batch = batch
        elif self._afterwards is not None:
            afterwards, self._afterwards = self._afterwards, None
            afterwards(kwargs)


class OwnGradients:
    """The gradients of the trainer's own passes, which are the target where the general data are a stream.

    The core sets `p.grad` aside while it runs the stream, which is when these are needed. References are enough: DDP
    reduces into the same tensors, and FSDP2 calls the hooks once it has reduced.

    Args:
        parameters: the P trainable parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._tensors: list[Tensor | None] = [None] * len(parameters)
        self._listening = True
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._keep(i)) for i, parameter in enumerate(parameters)
        ]

    def begin(self) -> None:
        """Forget those of the last window, and listen to the next one."""
        self._tensors, self._listening = [None] * len(self._tensors), True

    def take(self) -> list[Tensor | None]:
        """The P gradients, shards under FSDP2, None where a parameter has none; later ones are not the trainer's."""
        self._listening = False
        return self._tensors

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, i: int) -> Callable[[Tensor], None]:
        def after(parameter: Tensor) -> None:
            if self._listening and parameter.grad is not None:
                self._tensors[i] = local_tensor(parameter.grad)

        return after
