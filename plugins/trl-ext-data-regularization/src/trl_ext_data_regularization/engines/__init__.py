"""Engines: how scores are had. One file each."""

from trl_ext_data_regularization.engines.derivative import derivative_scores, forget_gathered
from trl_ext_data_regularization.engines.direct import Direct
from trl_ext_data_regularization.engines.engine import Engine, Scores
from trl_ext_data_regularization.engines.ghost import Ghost
from trl_ext_data_regularization.engines.sketch import Projections, Sketch

__all__ = ["Direct", "Engine", "Ghost", "Projections", "Scores", "Sketch", "derivative_scores", "forget_gathered"]
