"""What a prompt is to a model, and what ends a completion."""

from __future__ import annotations

from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_probing.encoding import prompt_ids
from trl_ext_probing.engines.interface import Prompt


def prompt_tokens(tokenizer: Any, prompt: Prompt, index: int) -> list[int]:
    """The tokens of text as the tokenizer gives them, special tokens included, or of messages in the chat template.

    Raises:
        ConfigurationError: There are messages and no chat template, or no tokens come out.
    """
    if not isinstance(prompt, str) and not getattr(tokenizer, "chat_template", None):
        raise ConfigurationError(
            f"prompt {index} is a list of messages, and the model's tokenizer has no chat template"
        )
    tokens = prompt_ids(tokenizer, prompt)
    if not tokens:
        raise ConfigurationError(f"prompt {index} has no tokens: {prompt!r}")
    return tokens


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a completion: the model's own, such as that of a turn, and the tokenizer's.

    As in TRL's `GRPOTrainer`, so that measured completions end where those of training do.
    """
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = [] if own is None else [own] if isinstance(own, int) else list(own)
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)
