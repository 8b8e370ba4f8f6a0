"""trl_ext: a plugin layer for Hugging Face TRL. Importing it is cheap; the trainers load with their first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.config import (
        DistillationConfig,
        DPOConfig,
        GRPOConfig,
        KTOConfig,
        RewardConfig,
        RLOOConfig,
        SFTConfig,
    )
    from trl_ext.hookspecs import API_VERSION, hookimpl
    from trl_ext.trainers import (
        DistillationTrainer,
        DPOTrainer,
        GRPOTrainer,
        KTOTrainer,
        RewardTrainer,
        RLOOTrainer,
        SFTTrainer,
    )

__version__ = "0.1.0"
__all__ = [
    "API_VERSION",
    "DPOConfig",
    "DPOTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "hookimpl",
]


def _home(name: str) -> str:
    """The module that a public name loads with."""
    if name.endswith("Config"):
        return "trl_ext.config"
    return "trl_ext.trainers" if name.endswith("Trainer") else "trl_ext.hookspecs"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(_home(name)), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
