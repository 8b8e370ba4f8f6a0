"""trl_ext: a plugin layer for Hugging Face TRL. Importing it is cheap; the trainers load with their first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.config import GRPOConfig, SFTConfig
    from trl_ext.hookspecs import API_VERSION, hookimpl
    from trl_ext.trainers import GRPOTrainer, SFTTrainer

__version__ = "0.1.0"
__all__ = ["API_VERSION", "GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer", "hookimpl"]

_LAZY = {
    "API_VERSION": "trl_ext.hookspecs",
    "hookimpl": "trl_ext.hookspecs",
    "SFTConfig": "trl_ext.config",
    "GRPOConfig": "trl_ext.config",
    "SFTTrainer": "trl_ext.trainers",
    "GRPOTrainer": "trl_ext.trainers",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
