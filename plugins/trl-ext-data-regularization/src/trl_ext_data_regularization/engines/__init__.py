"""Engines: how the scores s_i = <g_i, t> and, with some, K_ij = <g_i, g_j> are had. One file each."""

from collections.abc import Sequence

import torch

from trl_ext_data_regularization.engines.derivative import derivative_scores
from trl_ext_data_regularization.engines.direct import Direct
from trl_ext_data_regularization.engines.engine import Engine, Scores
from trl_ext_data_regularization.engines.ghost import Ghost
from trl_ext_data_regularization.engines.sketch import Projections, Sketch
from trl_ext_data_regularization.engines.target import Target
from trl_ext_data_regularization.layers import Layer

__all__ = [
    "Direct",
    "Engine",
    "Ghost",
    "Projections",
    "Scores",
    "Sketch",
    "Target",
    "derivative_scores",
    "make_engine",
]


def make_engine(
    name: str,
    layers: Sequence[Layer],
    target: Target,
    samples: int,
    device: torch.device,
    projections: Projections,
) -> Engine | None:
    """An engine that listens to a backward pass, for one window; None for "derivative", which makes forward passes.

    Args:
        name: "ghost", "direct", "sketch" or "derivative".
        layers: all layers of the model.
        target: the target's gradient per parameter.
        samples: number of samples of the window.
        device: where scores are.
        projections: of the sketches, the same for the whole run.
    """
    match name:
        case "ghost":
            return Ghost(layers, target, samples, device)
        case "direct":
            return Direct(layers, target, samples, device)
        case "sketch":
            return Sketch(layers, target, samples, device, projections)
    return None
