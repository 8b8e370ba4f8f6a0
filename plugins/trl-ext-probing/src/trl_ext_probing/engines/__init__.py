"""Engines: prompts in, completions out, behind one interface.

The same seed gives the same completions, whatever the batches, the order of the prompts, the ranks or interruptions
(but for rounding): the noise of a draw depends on (seed, prompt, sample, position) alone. A server decides for itself
whether it keeps to the seed.

| engine | completes with |
|---|---|
| `transformers` | a model in this process |
| `server` | OpenAI-compatible servers |
| `vllm` | vLLM in this process |
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext_probing.engines.draws import outstanding
from trl_ext_probing.engines.interface import Completion, Draw, Engine, Messages, Prompt

__all__ = ["ENGINES", "Completion", "Draw", "Engine", "Messages", "Prompt", "engine", "outstanding"]

ENGINES = {
    "transformers": "transformers_engine:TransformersEngine",
    "server": "server_engine:ServerEngine",
    "vllm": "vllm_engine:VllmEngine",
}


def engine(name: str, **options: Any) -> Engine:
    """Make the engine of this name, one of `ENGINES`, with the options of its class.

    Raises:
        ConfigurationError: There is no such engine or option, a package is missing, or an option cannot be used.
    """
    if name not in ENGINES:
        raise ConfigurationError(
            f"engine {name!r} is unknown. {did_you_mean(name, ENGINES)}There are {', '.join(ENGINES)}"
        )
    module, attribute = ENGINES[name].split(":")
    try:
        engine_class = getattr(import_module(f"{__name__}.{module}"), attribute)
    except ImportError as error:
        raise ConfigurationError(
            f"engine {name!r} needs the package {error.name}: pip install 'trl-ext-probing[{name}]'"
        ) from error
    try:
        inspect.signature(engine_class).bind(**options)
    except TypeError as error:
        raise ConfigurationError(f"engine {name!r}: {error}") from None
    made: Engine = engine_class(**options)
    return made
