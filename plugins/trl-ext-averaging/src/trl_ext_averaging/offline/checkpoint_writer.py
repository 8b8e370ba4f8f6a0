"""The files of a checkpoint: shards and index, config, tokenizer, and a model card that says what was averaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from trl_ext_averaging.offline.checkpoint import ADAPTER, MODEL
from trl_ext_averaging.offline.combination import Layout, Source
from trl_ext_averaging.offline.output_folder import write_json
from trl_ext_averaging.offline.tensorfile import TensorFileWriter

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor*config.json",
    "*.py",
)

Advance = Callable[[int], None]


def write_checkpoint(
    folder: Path,
    source: Source,
    kind: Literal["model", "adapter"],
    companions: Path,
    provenance: Mapping[str, Any],
    max_shard_bytes: int,
    advance: Advance = lambda nbytes: None,
) -> None:
    """Write a source's tensors and everything that makes them a checkpoint, the config last.

    Args:
        companions: the folder from which tokenizer and generation settings are copied.
        provenance: what the model card says.
        advance: told the bytes written, for a progress bar.
    """
    shards = _shards(source.layout, max_shard_bytes if kind == "model" else None)
    stem = MODEL if kind == "model" else ADAPTER
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        base = stem.removesuffix(".safetensors")
        file = stem if len(shards) == 1 else f"{base}-{number:05d}-of-{len(shards):05d}.safetensors"
        with TensorFileWriter(folder / file, {name: source.layout[name] for name in names}) as writer:
            for name in names:
                weight_map[name] = file
                for piece in source.pieces(name):
                    writer.write(piece)
                    advance(piece.nbytes)
    if len(shards) > 1:
        total = sum(_nbytes(source.layout, name) for name in weight_map)
        write_json(folder / f"{stem}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    for pattern in COMPANIONS:
        for path in companions.glob(pattern):
            if path.is_file():
                target = folder / path.relative_to(companions)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    (folder / "README.md").write_text(model_card(provenance, kind, source.config))
    # Last: without it nothing loads a folder that was left half-way.
    write_json(folder / ("config.json" if kind == "model" else "adapter_config.json"), source.config)


def model_card(provenance: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> str:
    """A model card that says what was averaged, and how."""
    front: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers"}
    if base := config.get("base_model_name_or_path"):
        front["base_model"] = base
    front["tags"] = ["trl-ext", "weight-averaging"]
    rows = "\n".join(
        f"| `{entry['path']}` | {entry['step'] if entry['step'] is not None else ''} | {entry.get('coefficient', '')} |"
        for entry in provenance["inputs"]
    )
    options = "\n".join(f"- {name}: `{value}`" for name, value in provenance["options"].items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {provenance['method']} of {len(provenance['inputs'])} "
        f"checkpoint(s)\n\nWritten by `trl-ext average` (trl-ext-averaging {provenance['version']}).\n\n"
        f"| input | step | coefficient |\n|---|---|---|\n{rows}\n\n{options}\n"
    )


def _shards(layout: Layout, limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in layout:
        nbytes = _nbytes(layout, name)
        if limit is not None and shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _nbytes(layout: Layout, name: str) -> int:
    dtype, shape = layout[name]
    count = dtype.itemsize
    for side in shape:
        count *= side
    return count
