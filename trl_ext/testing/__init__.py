"""Tiny tokenizer, tiny models and procedural tasks, made locally and seeded: for tests, the demo and plugin authors.

Nothing is downloaded. Importing this package is cheap: torch and transformers load when something of it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.testing.evaluation import exact_match
    from trl_ext.testing.models import save_model, tiny_llama, tiny_moe, tiny_qwen2, tiny_reward_model
    from trl_ext.testing.tasks import Addition, Copy, ModularChain, Reverse, Task
    from trl_ext.testing.tokenizers import tiny_tokenizer

__all__ = [
    "Addition",
    "Copy",
    "ModularChain",
    "Reverse",
    "Task",
    "exact_match",
    "save_model",
    "tiny_llama",
    "tiny_moe",
    "tiny_qwen2",
    "tiny_reward_model",
    "tiny_tokenizer",
]

_HOME = {
    "tiny_tokenizer": "tokenizers",
    "exact_match": "evaluation",
    **dict.fromkeys(("save_model", "tiny_llama", "tiny_moe", "tiny_qwen2", "tiny_reward_model"), "models"),
    **dict.fromkeys(("Addition", "Copy", "ModularChain", "Reverse", "Task"), "tasks"),
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
