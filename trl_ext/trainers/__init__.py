"""The trainers: TRL's classes with the hook points open."""

from trl_ext.trainers.distillation import DistillationTrainer
from trl_ext.trainers.dpo import DPOTrainer
from trl_ext.trainers.grpo import GRPOTrainer
from trl_ext.trainers.kto import KTOTrainer
from trl_ext.trainers.reward import RewardTrainer
from trl_ext.trainers.rloo import RLOOTrainer
from trl_ext.trainers.sft import SFTTrainer

__all__ = [
    "DPOTrainer",
    "DistillationTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "RLOOTrainer",
    "RewardTrainer",
    "SFTTrainer",
]
