"""Tiny checkpoints on disk, and the command run on them in this process."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trl_ext_averaging.offline.command import average_command
from typer.testing import CliRunner

from trl_ext.testing import tiny_llama, tiny_tokenizer

app = typer.Typer()
app.command()(average_command)


def average(*arguments: object) -> str:
    """Run `trl-ext average` and give what it printed; exceptions come through."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def save(folder: Path, seed: int = 0, shards: str = "5GB", dtype: torch.dtype = torch.float32, **model) -> Path:
    tiny_llama(hidden=16, seed=seed, **model).to(dtype).save_pretrained(folder, max_shard_size=shards)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, seed: int = 0, step: int | None = None, **lora) -> Path:
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(tiny_llama(hidden=16), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = None  # else PEFT asks the hub for it
    model.save_pretrained(folder)
    if step is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
