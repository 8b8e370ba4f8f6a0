"""References that are a forward of a model: the start model, the PEFT base, or another model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from trl_ext_probing.capability.sample_keys import vocabulary_digest

from trl_ext.gradients import copy_saved, local_tensor
from trl_ext.own_passes import drop_gathered_weights, inference_only
from trl_ext_objectives.reference import Reference

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trl_ext.records import RunDescription, SetupContext, TokenRecord


class LiveReference(Reference):
    """A reference that is a forward of a model: of the one in training with other weights, or of its own."""

    model: nn.Module | None = None

    def check(self, run: RunDescription) -> None:
        if run.sharding == "deepspeed":
            raise ValueError(
                "a reference that is a forward of a model has not been tried under DeepSpeed; use "
                "reference='cache:PATH', or train with DDP or FSDP2"
            )

    def setup(self, context: SetupContext) -> None:
        self.model = context.model

    @abstractmethod
    def active(self) -> AbstractContextManager[Any]:
        """A context in which `model` has the reference's weights."""

    def log_probs(self, tokens: TokenRecord) -> Tensor:
        model = self.ready()
        inputs = {k: v for k, v in tokens.inputs.items() if k != "output_router_logits"}
        with self.active(), inference_only(model):
            return model(**{**inputs, "fused_lm_head": True}).log_probs

    def ready(self) -> nn.Module:
        """The model; raises RuntimeError before `setup`."""
        if self.model is None:
            raise RuntimeError("the reference is taken when training starts; call train() before evaluate()")
        return self.model


class StartModel(LiveReference):
    """The trainable parameters as they were when the training began; each rank keeps its shards under FSDP2."""

    def __init__(self) -> None:
        self._parameters: Sequence[nn.Parameter] = ()
        self._names: Sequence[str] = ()
        self._frozen: list[Tensor] = []

    def check(self, run: RunDescription) -> None:
        super().check(run)
        if run.sharding == "fsdp1":
            raise ValueError(
                "reference='start' keeps a copy of each parameter, and FSDP1 flattens them; use FSDP2, or "
                "reference='cache:PATH'"
            )

    def setup(self, context: SetupContext) -> None:
        super().setup(context)
        self._names, self._parameters = context.weights.names, context.weights.parameters
        self.refresh()

    def refresh(self) -> None:
        """Take the parameters as they are now."""
        current = [p.detach() for p in self._parameters]
        if self._frozen:
            torch._foreach_copy_(list(map(local_tensor, self._frozen)), list(map(local_tensor, current)))
        else:
            self._frozen = [p.clone() for p in current]

    @contextmanager
    def active(self) -> Iterator[None]:
        if any(isinstance(frozen, DTensor) for frozen in self._frozen):
            with self._shards_active():
                yield
            return
        # Swapping `.data` leaves the tensors that the pending backward has saved, and their versions, as they are.
        trained = [p.data for p in self._parameters]
        try:
            for parameter, frozen in zip(self._parameters, self._frozen, strict=True):
                parameter.data = frozen
            yield
        finally:
            for parameter, data in zip(self._parameters, trained, strict=True):
                parameter.data = data

    @contextmanager
    def _shards_active(self) -> Iterator[None]:
        """FSDP2 gathers from the shards' own memory, anew for the backward pass too; so they change in place."""
        shards = [local_tensor(p.detach()) for p in self._parameters]
        trained = [shard.clone() for shard in shards]
        try:
            torch._foreach_copy_(shards, list(map(local_tensor, self._frozen)))
            drop_gathered_weights(self.ready())
            yield
        finally:
            torch._foreach_copy_(shards, trained)
            drop_gathered_weights(self.ready())

    def state_dict(self) -> dict[str, Any]:
        return {f"reference.{name}": frozen for name, frozen in zip(self._names, self._frozen, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, frozen in zip(self._names, self._frozen, strict=True):
            copy_saved(frozen, state[f"reference.{name}"])


class AdaptersOff(LiveReference):
    """The PEFT base model."""

    def check(self, run: RunDescription) -> None:
        super().check(run)
        if not run.peft:
            raise ValueError("reference='base' turns PEFT adapters off, and this run has none; use reference='start'")

    def active(self) -> AbstractContextManager[Any]:
        return self.ready().disable_adapter()  # type: ignore[operator]


class OtherModel(LiveReference):
    """A model of its own, loaded from a path or hub id, with the same vocabulary."""

    def __init__(self, path: str) -> None:
        self._path = path

    def setup(self, context: SetupContext) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl.trainer.utils import add_fused_lm_head

        trained = context.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        model = AutoModelForCausalLM.from_pretrained(self._path, dtype=next(context.model.parameters()).dtype)
        own = model.get_output_embeddings().weight.shape[0]
        same = vocabulary_digest(AutoTokenizer.from_pretrained(self._path)) == vocabulary_digest(context.tokenizer)
        if own != trained or not same:
            raise ValueError(
                f"reference='model:{self._path}' has a vocabulary of {own} tokens, {'the same' if same else 'not the'} "
                f"mapping of the trained model's {trained}; its log-probabilities would be of other tokens"
            )
        add_fused_lm_head(model)
        self.model = model.to(context.device).eval().requires_grad_(False)

    def active(self) -> AbstractContextManager[Any]:
        return nullcontext()
