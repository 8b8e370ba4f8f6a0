"""The trainers: TRL's classes with the hook points open."""

from trl_ext.trainers.grpo import GRPOTrainer
from trl_ext.trainers.sft import SFTTrainer

__all__ = ["GRPOTrainer", "SFTTrainer"]
