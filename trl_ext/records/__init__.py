"""What hooks receive and return: small frozen records, with tensors on the training device.

Shapes: B rows of a micro-batch, T label positions (one less than the sequence length, since labels are shifted). Under
padding-free training B is 1 and T runs over all samples of the micro-batch; `sample_index` says which token is whose.
"""

from trl_ext.records.columns import Column
from trl_ext.records.rollouts import PolicyTokens, Rewards, Rollouts
from trl_ext.records.run import (
    TRAINERS,
    RunDescription,
    SetupContext,
    StreamRequest,
    Trackers,
    TrainerKind,
    trainer_name,
)
from trl_ext.records.step import AuxiliaryLoss, MicroStep, StreamGradient, WeightsView
from trl_ext.records.tokens import SampleWeights, TokenRecord, Window

__all__ = [
    "TRAINERS",
    "AuxiliaryLoss",
    "Column",
    "MicroStep",
    "PolicyTokens",
    "Rewards",
    "Rollouts",
    "RunDescription",
    "SampleWeights",
    "SetupContext",
    "StreamGradient",
    "StreamRequest",
    "TokenRecord",
    "Trackers",
    "TrainerKind",
    "WeightsView",
    "Window",
    "trainer_name",
]
