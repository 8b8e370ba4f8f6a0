"""Gradients as one vector: algebra over lists of tensors that is right on one device, under DDP and under FSDP2.

Scalars (dot, norm) are accumulated in fp32 (fp64 for fp64 gradients) on each rank's local shards and summed over the
ranks that hold different shards, in one all-reduce a mesh dimension. Updates are elementwise and need no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the local shard of a DTensor (sharing its memory), any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_sharded(local: Tensor, like: Tensor) -> Tensor:
    """The reverse of `local_tensor`: this rank's part as a DTensor where `like` is one, sharing memory (new in 1.5)."""
    if not isinstance(like, DTensor):
        return local
    mesh, placements, shape = like.device_mesh, like.placements, like.shape
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=like.stride())


def whole_tensor(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all ranks, which is collective; any other tensor itself (new in 1.5)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attributes under which torch.compile, FSDP1 and activation checkpointing keep the module that they wrap."""


def unwrapped_name(name: str) -> str:
    """The name that a module, parameter or buffer has in the model without wrappers around any of its modules."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, in the model's order, tied weights once; the same names whatever the model is wrapped in."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DistributedDataParallel | nn.DataParallel):
        model = model.module
    return {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `named_parameters` that require a gradient."""
    return {name: parameter for name, parameter in named_parameters(model).items() if parameter.requires_grad}


def copy_saved(target: Tensor, saved: Tensor) -> None:
    """Take over the values of a checkpoint, in place; a whole tensor of a run that was not sharded is cut here.

    Args:
        target: of this run, a DTensor where it is sharded.
        saved: as `load_state_dict` got it, of the same shape.
    """
    if isinstance(target, DTensor) and not isinstance(saved, DTensor):
        saved = distribute_tensor(saved, target.device_mesh, target.placements, src_data_rank=None)
    with torch.no_grad():
        target.copy_(saved)


def sum_over_shards(partial: Tensor, parameters: Sequence[Tensor], agree: Callable[[], object] | None = None) -> Tensor:
    """Sum per-parameter partial scalars over the ranks that hold other shards of the same parameter.

    Args:
        partial: (P, ...) float, scalars of each parameter from this rank's shard.
        parameters: the P parameters; plain tensors are replicated and keep their scalars.
        agree: called before the collectives, if there are any.

    Returns:
        (P, ...) float, equal on all ranks of a mesh.
    """
    by_layout: dict[tuple[object, tuple[int, ...]], list[int]] = {}
    for i, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor):
            shard_dims = tuple(d for d, placement in enumerate(parameter.placements) if placement.is_shard())
            if shard_dims:
                by_layout.setdefault((parameter.device_mesh, shard_dims), []).append(i)
    if not by_layout:
        return partial
    if agree is not None:
        agree()
    partial = partial.clone()
    for (mesh, shard_dims), indices in by_layout.items():
        part = partial[indices]
        for dim in shard_dims:
            dist.all_reduce(part, group=mesh.get_group(dim))  # type: ignore[attr-defined]
        partial[indices] = part
    return partial


class GradientView:
    """The gradients of the trainable parameters, seen as one vector.

    A *live* view reads and writes `p.grad` (what `gradients_ready` receives); a *snapshot* owns its tensors (stream
    gradients, `clone`). Both list the same parameters in the same order. A parameter without a gradient counts as zero.

    Args:
        names: names of the P parameters.
        parameters: the parameters themselves.
        tensors: P gradients or None each; omit for a live view.
        agree: called before a collective, so that a rank whose hook has failed is not waited for.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        tensors: Sequence[Tensor | None] | None = None,
        agree: Callable[[], object] | None = None,
    ) -> None:
        self.names = tuple(names)
        self.parameters = tuple(parameters)
        self._tensors = None if tensors is None else list(tensors)
        self._agree = agree

    def __repr__(self) -> str:
        kind = "live" if self._tensors is None else "snapshot"
        return f"GradientView({kind}, {len(self.names)} parameters)"

    @property
    def tensors(self) -> list[Tensor | None]:
        """P local gradients, in the parameters' dtype, sharing memory; None where there is no gradient."""
        source = [p.grad for p in self.parameters] if self._tensors is None else self._tensors
        return [None if g is None else local_tensor(g.detach()) for g in source]

    # -- scalars -------------------------------------------------------------------------------------------------

    def dots(self, other: GradientView) -> Tensor:
        """(P,) float: the inner product with `other` per parameter, over all shards."""
        return self._over_shards(self._dots(other))

    def dot(self, other: GradientView) -> Tensor:
        """() float: the inner product with `other`, over all parameters and shards."""
        return self.dots(other).sum()

    def squared_norm(self) -> Tensor:
        """() float: the squared Euclidean norm over all parameters and shards."""
        return self._over_shards(self._squared_norms()).sum()

    def norm(self) -> Tensor:
        """() float: the Euclidean norm over all parameters and shards."""
        return self.squared_norm().sqrt()

    def grams(self, other: GradientView) -> Tensor:
        """(P, 2, 2) float: per parameter [[<a, a>, <a, b>], [<a, b>, <b, b>]] with `other` as b, in one sum over shards
        (new in 1.5)."""
        dots = self._dots(other)
        products = [self._squared_norms().to(dots.dtype), dots, other._squared_norms().to(dots.dtype)]
        return self._over_shards(torch.stack(products, 1))[:, [0, 1, 1, 2]].view(-1, 2, 2)

    def cosine(self, other: GradientView) -> Tensor:
        """() float: the cosine of the angle to `other`; 0 where one of the two is zero."""
        gram = self.grams(other).sum(0)
        # Of the roots: the product of small squares would be 0.
        return gram[0, 1] / (gram[0, 0].sqrt() * gram[1, 1].sqrt()).clamp(min=torch.finfo(torch.float32).tiny)

    # -- updates in place ----------------------------------------------------------------------------------------

    def mul_(self, factor: float | Tensor) -> GradientView:
        """Multiply by a scalar, in place."""
        present = [g for g in self.tensors if g is not None]
        if present:
            torch._foreach_mul_(present, factor if isinstance(factor, Tensor) else float(factor))
        return self

    def axpy_(self, factor: float | Tensor, other: GradientView) -> GradientView:
        """Add `factor` times `other`, in place; parameters without a gradient here get one."""
        mine = self.tensors
        present = []
        for i, (a, b) in enumerate(zip(mine, other.tensors, strict=True)):
            if b is None:
                continue
            if a is None:
                a = self._create(i)
            present.append((a, b.to(a.dtype)))
        if present:
            targets, sources = map(list, zip(*present, strict=True))
            if isinstance(factor, Tensor):
                scaled = torch._foreach_mul(sources, factor)
                torch._foreach_add_(targets, scaled)
            else:
                torch._foreach_add_(targets, sources, alpha=float(factor))
        return self

    def copy_(self, other: GradientView) -> GradientView:
        """Take over the values of `other`, in place; parameters without a gradient there become zero here."""
        present = [g for g in self.tensors if g is not None]
        if present:
            torch._foreach_zero_(present)
        return self.axpy_(1.0, other)

    def clone(self) -> GradientView:
        """A snapshot with its own memory."""
        copies = [None if g is None else g.clone() for g in self.tensors]
        return GradientView(self.names, self.parameters, copies, self._agree)

    # -- internals -----------------------------------------------------------------------------------------------

    def _create(self, i: int) -> Tensor:
        """A zero gradient for parameter i."""
        zeros = torch.zeros_like(self.parameters[i], memory_format=torch.preserve_format).detach()
        if self._tensors is None:
            self.parameters[i].grad = zeros
        else:
            self._tensors[i] = local_tensor(zeros)
        return local_tensor(zeros)

    def _dots(self, other: GradientView) -> Tensor:
        """(P,) this rank's part of `dots`."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        return self._stacked([None if a is None or b is None else _dot(a, b) for a, b in pairs])

    def _squared_norms(self) -> Tensor:
        """(P,) this rank's part of the squared norm of each gradient."""
        present = [(i, g) for i, g in enumerate(self.tensors) if g is not None]
        scalars: list[Tensor | None] = [None] * len(self.parameters)
        # One foreach call per (device, dtype); norms are taken in fp32 whatever the gradients' dtype.
        for (i, _), norm in zip(present, _foreach_norm([g for _, g in present]), strict=True):
            scalars[i] = norm * norm
        return self._stacked(scalars)

    def _stacked(self, scalars: Iterable[Tensor | None]) -> Tensor:
        device = local_tensor(self.parameters[0].detach()).device
        present = [None if s is None else s.to(device) for s in scalars]
        dtype = max((s.dtype for s in present if s is not None), default=torch.float32, key=lambda d: d.itemsize)
        zero = torch.zeros((), dtype=dtype, device=device)
        return torch.stack([zero if s is None else s.to(dtype) for s in present])

    def _over_shards(self, partial: Tensor) -> Tensor:
        return sum_over_shards(partial, self.parameters, self._agree)


# -- two gradients that conflict -------------------------------------------------------------------------------------


def conflict_weight(dot: Tensor, squared_norm: Tensor) -> Tensor:
    """The weight c = -min(0, <a, b> / |b|^2): a + c b is the vector nearest to a that does not oppose b.

    Adding c b takes away the component of a that points against b (A-GEM, arXiv:1812.00420, equation 11). Where the two
    do not conflict, or b is zero, c is 0. NaN stays NaN.

    Args:
        dot: (...) float, <a, b>.
        squared_norm: (...) float, |b|^2.

    Returns:
        (...) float, at least 0.
    """
    return -(dot / squared_norm.clamp(min=torch.finfo(squared_norm.dtype).tiny)).clamp(max=0)


def pcgrad_weights(gram: Tensor) -> Tensor:
    """Weights w for which w_0 a + w_1 b is the sum of both gradients, each without what points against the other.

    The sum is (a - min(0, <a, b> / |b|^2) b) + (b - min(0, <a, b> / |a|^2) a) (PCGrad, arXiv:2001.06782, algorithm 1,
    for two tasks), so that w_0 = 1 - min(0, <a, b> / |a|^2), and w_1 with |b|^2.

    Args:
        gram: (..., 2, 2) float, the inner products of a and b.

    Returns:
        (..., 2) float, at least 1.
    """
    return 1 + conflict_weight(gram[..., 0, 1].unsqueeze(-1), gram.diagonal(dim1=-2, dim2=-1))


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """() inner product; low-precision inputs are upcast, since their own dot product rounds its result."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.dot(a.reshape(-1).to(dtype), b.reshape(-1).to(dtype))


def _foreach_norm(tensors: list[Tensor]) -> list[Tensor]:
    """() norms in fp32 or more. Foreach wants one device and dtype a call, so mixed models take one call per group."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    out: list[Tensor] = [torch.empty(0)] * len(tensors)
    for (_, dtype), indices in groups.items():
        norms = torch._foreach_norm([tensors[i] for i in indices], 2, dtype=torch.promote_types(dtype, torch.float32))
        for i, norm in zip(indices, norms, strict=True):
            out[i] = norm
    return out
