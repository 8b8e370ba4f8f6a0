"""What checkpoints must have in common before an average of them means anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trl_ext.errors import CheckpointError
from trl_ext_averaging.offline.adapters import FACTOR
from trl_ext_averaging.offline.checkpoint import Checkpoint, read_json
from trl_ext_averaging.offline.tensorfile import TensorEntry

# Where a file came from and how it is run, not what the weights mean.
FREE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "output_router_logits"}
FREE_ADAPTER = {"inference_mode", "revision", "peft_version", "auto_mapping", "init_lora_weights", "lora_dropout"}
RANKS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
PIECE = 1 << 20


def check_compatible(
    checkpoints: Sequence[Checkpoint], *, same_ranks: bool = True, any_dtype: bool = False
) -> list[str]:
    """Refuse checkpoints that do not belong together, and give the names of the tensors to average.

    Args:
        same_ranks: LoRA ranks and scales must agree too.
        any_dtype: inputs may differ in dtype.

    Raises:
        CheckpointError: different kinds, architectures, tensors, shapes, dtypes, ties or vocabularies; says which.
    """
    first = checkpoints[0]
    names = dict.fromkeys(_tensor_names(first))
    for other in checkpoints[1:]:
        pair = f"{first.path} and {other.path}"
        if other.kind != first.kind:
            raise CheckpointError(f"{pair}: one is a {first.kind}, the other a {other.kind}")
        if differing := _differences(first, other, FREE_ADAPTER | (set() if same_ranks else RANKS)):
            raise CheckpointError(f"{pair} differ in their configs: {', '.join(differing[:5])}")
        if unlike := sorted(set(names) ^ set(_tensor_names(other))):
            raise CheckpointError(f"{pair} do not have the same tensors: {', '.join(unlike[:5])} in only one of them")
        for name in names:
            a, b = first.entries[name], other.entries[name]
            if _sides(name, a, same_ranks) != _sides(name, b, same_ranks):
                raise CheckpointError(f"{pair}: {name} has shapes {a.shape} and {b.shape}")
            if a.dtype != b.dtype and not any_dtype:
                raise CheckpointError(f"{pair}: {name} is {_dtype(a)} and {_dtype(b)}; choose one with --dtype")
            if not a.dtype.is_floating_point and not _equal(a, b):
                raise CheckpointError(f"{pair}: {name} holds integers, which cannot be averaged, and they differ")
    _check_tokenizers(checkpoints)
    return list(names)


def _tensor_names(checkpoint: Checkpoint) -> list[str]:
    """All tensors but the second name of a tied LM head, which some checkpoints store and others do not.

    Raises:
        CheckpointError: the config says tied, the stored tensors differ.
    """
    names = list(checkpoint.entries)
    if checkpoint.kind == "model" and checkpoint.config.get("tie_word_embeddings") and "lm_head.weight" in names:
        embedding = next((name for name in names if name.endswith(EMBEDDINGS)), None)
        if embedding is not None:
            if not _equal(checkpoint.entries["lm_head.weight"], checkpoint.entries[embedding]):
                raise CheckpointError(
                    f"{checkpoint.path}: its config ties lm_head.weight to {embedding}, but the two differ in the file"
                )
            names.remove("lm_head.weight")
    return names


def _sides(name: str, entry: TensorEntry, same_ranks: bool) -> tuple[int, ...]:
    """The shape; of the factors of a product without their rank, which is the first side of A and the second of B."""
    match = None if same_ranks else FACTOR.fullmatch(name)
    rank = None if match is None else "AB".index(match["factor"])
    return tuple(side for i, side in enumerate(entry.shape) if i != rank)


def _equal(a: TensorEntry, b: TensorEntry) -> bool:
    return a.shape == b.shape and all(
        torch.equal(a.read(start, min(start + PIECE, a.numel)), b.read(start, min(start + PIECE, a.numel)))
        for start in range(0, a.numel, PIECE)
    )


def _differences(a: Checkpoint, b: Checkpoint, free_adapter: set[str]) -> list[str]:
    """The config keys in which two checkpoints mean different models, with both values."""
    free = FREE if a.kind == "model" else free_adapter
    one, other = _comparable(a.config, free), _comparable(b.config, free)
    if a.kind == "model" and one != other:
        # Versions of transformers write different keys for the same model: compare what they are read as.
        one, other = (_comparable(_parsed(checkpoint), free) for checkpoint in (a, b))
    keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    return [f"{key} ({_short(one.get(key))} and {_short(other.get(key))})" for key in keys]


def _comparable(config: Mapping[str, Any], free: set[str]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in free and not key.endswith("_token_id")}
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"] = sorted(kept["target_modules"], key=str)
    return kept


def _parsed(checkpoint: Checkpoint) -> Mapping[str, Any]:
    from transformers import CONFIG_MAPPING  # seconds to import, and seldom needed

    kind = str(checkpoint.config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return checkpoint.config
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(checkpoint.config)).to_dict()
    except Exception as error:  # each model's config checks its values in its own way
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.path}: transformers cannot read its config: {reason}") from None


def _check_tokenizers(checkpoints: Sequence[Checkpoint]) -> None:
    known = [(c.path, vocabulary) for c in checkpoints if (vocabulary := _vocabulary(c.path)) is not None]
    for path, vocabulary in known[1:]:
        if vocabulary != known[0][1]:
            raise CheckpointError(f"{known[0][0]} and {path} have different vocabularies: their rows do not correspond")


def _vocabulary(path: Path) -> Any:
    """What maps text to ids, without settings such as truncation that a trainer may have left in the file."""
    tokenizer = path / "tokenizer.json"
    if tokenizer.is_file():
        content = read_json(tokenizer)
        try:
            model = content.get("model", {})
            added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
            return model.get("vocab"), model.get("merges"), added
        except (AttributeError, KeyError, TypeError):
            raise CheckpointError(f"{tokenizer} does not describe a tokenizer") from None
    for name in ("tokenizer.model", "vocab.json", "vocab.txt"):
        if (path / name).is_file():
            return (path / name).read_bytes()
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _dtype(entry: TensorEntry) -> str:
    return str(entry.dtype).removeprefix("torch.")
