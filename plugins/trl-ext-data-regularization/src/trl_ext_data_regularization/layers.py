"""The layers of a model: what chooses its own samples, and which parameters belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from trl_ext.errors import ConfigurationError
from trl_ext.gradients import named_parameters, unwrapped_name
from trl_ext.own_passes import causal_lm

Kind = Literal["linear", "embedding", "scale", "head"]

ANY_LAYER = (
    "freeze it, or train an adapter; data-regularization can also choose for all layers at once, whatever they are: "
    "general=train,scope=global,engine=derivative with rule=topk or rule=filter"
)
"""What to do about a layer that cannot be tapped."""


@dataclass(frozen=True, eq=False)
class Use:
    """One module that uses a layer's weight. A tied embedding is one layer with two uses: embedding and head."""

    name: str
    module: Any
    kind: Kind
    layer: int
    """Position of the layer in the list."""
    bias: Use | None = None
    """The shift of a LayerNorm, which chooses for itself."""


@dataclass(frozen=True)
class Layer:
    """One weight, for a Linear with its bias: what chooses its own samples.

    Under LoRA, A and B are layers of their own; so are the scale and the shift of a norm.
    """

    name: str
    weight: int
    """Position of the weight in the gradient views."""
    bias: int | None
    uses: int
    """Number of modules that use the weight."""

    @property
    def parameters(self) -> tuple[int, ...]:
        """Positions of the parameters in the gradient views."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def type(self) -> str:
        """What layers alike in different blocks have in common: "q_proj", "q_proj.lora_A", "embed_tokens"."""
        return type_of(self.name)


@dataclass(frozen=True)
class Batch:
    """The micro-batch in flight."""

    index: Tensor
    """(B, T) long: the sample of each input position, counted from 0."""
    samples: int
    offset: int
    """Samples of the window before this micro-batch."""
    by_row: bool
    """Whether row i is sample i."""

    @property
    def window(self) -> slice:
        """Its samples among those of the window."""
        return slice(self.offset, self.offset + self.samples)


def type_of(module: str) -> str:
    """What modules alike in different blocks have in common, from a module's name: "q_proj", "q_proj.lora_A"."""
    parts = [part for part in module.split(".") if part != "default"]
    return ".".join(parts[-2:]) if parts[-1].startswith("lora_") or parts[-1] == "bias" else parts[-1]


def find_layers(model: nn.Module, names: Sequence[str]) -> tuple[list[Layer], list[Use]]:
    """Cover every trainable parameter by a layer.

    Args:
        model: the unwrapped model.
        names: names of the trainable parameters, in the order of the gradient views.

    Raises:
        ConfigurationError: a trainable parameter that no layer covers would silently keep the full batch's gradient.
    """
    known = named_parameters(model)
    position = {id(known[name]): i for i, name in enumerate(names)}
    head = _head(model)
    layers: list[Layer] = []
    uses: list[Use] = []
    by_weight: dict[int, int] = {}
    untapped: set[int] = set()
    for place, module in model.named_modules():
        name = unwrapped_name(place)
        kind = "head" if module is head else _kind(module)
        weight = getattr(module, "weight", None)
        if kind is None:
            # A tied weight may be covered elsewhere, and its use here would still keep the full batch's gradient.
            untapped.update(position[id(p)] for p in module.parameters(recurse=False) if id(p) in position)
        if kind is None or id(weight) not in position:
            continue
        w, b = position[id(weight)], position.get(id(getattr(module, "bias", None)))
        shift = None
        if kind == "scale" and b is not None:
            layers.append(Layer(f"{name}.bias", b, None, 1))
            shift, b = Use(f"{name}.bias", module, "scale", len(layers) - 1), None
        if w not in by_weight:
            by_weight[w] = len(layers)
            layers.append(Layer(name, w, b, 0))
        i = by_weight[w]
        layers[i] = replace(layers[i], bias=layers[i].bias if b is None else b, uses=layers[i].uses + 1)
        uses.append(Use(name, module, kind, i, shift))
    covered = {i for layer in layers for i in layer.parameters} - untapped
    if missing := [name for i, name in enumerate(names) if i not in covered]:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ConfigurationError(
            f"{len(missing)} trainable parameter(s) belong to no Linear, Embedding or norm of torch's own kind and "
            f"would keep the full batch's gradient: {shown}. For each of them: {ANY_LAYER}"
        )
    return layers, uses


def _head(model: nn.Module) -> nn.Module | None:
    """The module whose weight TRL's fused head reads without calling it."""
    base = causal_lm(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def _kind(module: nn.Module) -> Kind | None:
    """What a tap can stand in for: torch's own modules, since a subclass may do more, and norms that end in RMSNorm."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return "linear"
    if forward is nn.Embedding.forward:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return "embedding" if plain else None
    weight = getattr(module, "weight", None)
    torchs = forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    named = type(module).__name__.endswith("RMSNorm") and getattr(module, "bias", None) is None
    return "scale" if (torchs or named) and isinstance(weight, Tensor) and weight.dim() == 1 else None
