"""Fresh rollouts of the current policy on held-out prompts, without a trace in the trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import Tensor, nn

RewardFunction = Callable[..., Sequence[float]]


def load_function(path: str) -> RewardFunction:
    """The object that "package.module:name" or "package.module:object.method" names.

    Raises:
        ValueError: it cannot be found.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward={path!r} cannot be loaded: {error}; write it as package.module:function") from error
    return found


def load_prompts(path: str, per_step: int, world_size: int) -> Dataset:
    """A .json or .jsonl file, or the split "train" of what `datasets.load_dataset` takes.

    Args:
        path: file, folder or hub id.
        per_step: prompts that each of `world_size` ranks takes in one go.

    Raises:
        ValueError: there is no column `prompt`, or there are too few rows.
    """
    file = path.endswith((".json", ".jsonl"))
    found = load_dataset("json", data_files=path, split="train") if file else load_dataset(path, split="train")
    if "prompt" not in found.column_names:
        raise ValueError(f"prompts={path} has no column 'prompt' ({', '.join(found.column_names)}); rename one to it")
    if len(found) < per_step * world_size:
        raise ValueError(
            f"prompts={path} has {len(found)} rows, fewer than prompts_per_step={per_step} on {world_size} rank(s); "
            "lower prompts_per_step"
        )
    return found


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def roll_out(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Any], options: dict[str, Any], seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample one completion per prompt.

    Args:
        model: the unwrapped model.
        tokenizer: its tokenizer.
        prompts: N texts or lists of messages.
        options: what `generate` takes.
        seed: seed of the sampling; the surrounding random state is preserved.

    Returns:
        Prompt ids and mask (N, P), padded on the left; completion ids and mask (N, T), up to and with the EOS token.
    """
    texts = [
        p if isinstance(p, str) else tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    device = next(model.parameters()).device
    # Special tokens are in the template's text already; a plain prompt gets them as TRL's own tokenization does.
    special = isinstance(prompts[0], str)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special).to(
        device
    )
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"), generating(model):
        torch.manual_seed(seed)
        output = model.generate(**batch, **options)  # type: ignore[operator]
    completion = output[:, batch["input_ids"].shape[1] :]
    ended = (completion == tokenizer.eos_token_id).cumsum(1)
    mask = ((ended == 0) | ((ended == 1) & (completion == tokenizer.eos_token_id))).long()
    return batch["input_ids"], batch["attention_mask"], completion, mask


def rewards_of(function: RewardFunction, rows: Dataset, tokenizer: Any, completion_ids: Tensor, mask: Tensor) -> Tensor:
    """(N,) float: the rewards, by a function in TRL's form, of completions to N rows with a column `prompt`."""
    texts = [
        tokenizer.decode(ids[m.bool()], skip_special_tokens=True) for ids, m in zip(completion_ids, mask, strict=True)
    ]
    columns = {name: list(rows[name]) for name in rows.column_names}
    prompts = columns.pop("prompt")
    completions = texts if isinstance(prompts[0], str) else [[{"role": "assistant", "content": text}] for text in texts]
    values = function(prompts=prompts, completions=completions, **columns)
    return torch.tensor([float(v) for v in values], device=completion_ids.device)
