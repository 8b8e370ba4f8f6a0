"""Models and tokenizers of a path, an adapter or a hub id, checked before the weights are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from trl_ext.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of weights, as transformers names it."""


def find_device(device: str = "auto") -> torch.device:
    """The device by name; "auto" is the accelerator where there is one.

    Of several devices of a kind, processes under a launcher take one each, unless the name has a number.

    Raises:
        ConfigurationError: not a device, or not one of this machine.
    """
    import torch

    try:
        found = torch.device("cpu" if device == "auto" else device)
        if device == "auto" and torch.accelerator.is_available():
            found = torch.accelerator.current_accelerator() or found
        if found.index is None and found.type != "cpu":
            found = torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"--device {device!r} cannot be used: {reason}") from None
    return found


def adapter_config(model: str) -> dict[str, Any] | None:
    """The configuration of a PEFT adapter with its `base_model_name_or_path`; None of a whole model.

    Raises:
        ConfigurationError: there is no such folder or hub id, or it holds neither an adapter nor a model.
    """
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    path = Path(model)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ConfigurationError(f"model {model!r}: the folder has neither config.json nor adapter_config.json")
        found = str(path / "adapter_config.json") if (path / "adapter_config.json").is_file() else None
    elif path.exists():
        raise ConfigurationError(f"model {model!r} is a file; give the folder that it is in")
    else:
        try:
            found = find_adapter_config_file(model)
            if found is None:
                cached_file(model, "config.json")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigurationError(
                f"model {model!r}: there is no such folder, and it cannot be had as a hub id: {reason}"
            ) from None
    if found is None:
        return None
    config = json.loads(Path(found).read_text())
    if not config.get("base_model_name_or_path"):
        raise ConfigurationError(f"model {model!r}: adapter_config.json names no base_model_name_or_path")
    return dict(config)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model; of an adapter's base where the adapter has none. Padding is EOS where it has no own.

    Raises:
        ConfigurationError: there is no such model, or no tokenizer in it, or the tokenizer can pad with nothing.
    """
    from transformers import AutoTokenizer

    adapter = adapter_config(model)
    sources = [model] if adapter is None else [model, adapter["base_model_name_or_path"]]
    for source in sources:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            break
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
    else:
        raise ConfigurationError(f"model {model!r}: its tokenizer cannot be loaded: {reason}")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigurationError(f"model {model!r}: its tokenizer has neither a padding nor an EOS token; set one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_template(tokenizer: Any, model: str, column: str) -> None:
    """Refuse messages for a tokenizer that cannot write them.

    Raises:
        ConfigurationError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigurationError(
            f"model {model!r} has no chat template, which the messages in the column {column!r} need; give the data as "
            "text, or save a tokenizer with a template beside the model"
        )


def load_model(model: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Model, in evaluation mode, and tokenizer of a path, an adapter or a hub id.

    An adapter goes through PEFT itself: transformers' own reading of adapters leaves out the magnitudes of DoRA.

    Args:
        model: a folder or a hub id.
        dtype: one of `Dtype`.
        device: as torch names it, or "auto".

    Raises:
        ConfigurationError: there is no such model, an unknown dtype or device, or an adapter without PEFT.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in get_args(Dtype):
        raise ConfigurationError(f"--dtype {dtype!r} is not one of {', '.join(get_args(Dtype))}")
    place = find_device(device)
    loader: Any = AutoModelForCausalLM
    if adapter_config(model) is not None:
        try:
            from peft import AutoPeftModelForCausalLM
        except ImportError:
            raise ConfigurationError(
                f"model {model!r} is an adapter, and PEFT is not installed: pip install 'trl-ext[peft]'"
            ) from None
        loader = AutoPeftModelForCausalLM
    tokenizer = load_tokenizer(model)
    try:
        loaded = loader.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model {model!r} cannot be loaded: {error}") from error
    return loaded.eval().to(place), tokenizer
