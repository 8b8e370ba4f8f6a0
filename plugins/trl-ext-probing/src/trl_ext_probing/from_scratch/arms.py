"""The weights that each arm starts from, as model folders: arms differ in nothing else."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch

from trl_ext.errors import ConfigurationError


class Base:
    """The user's model: where its weights are, and what shape they have.

    Args:
        model: TRL's `ModelConfig`.
        trust_remote_code: as in the trainer's config.

    Raises:
        ConfigurationError: there is no such model.
    """

    def __init__(self, model: Any, trust_remote_code: bool = False) -> None:
        from transformers import AutoConfig

        self.path: str = model.model_name_or_path
        self.options = {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
        try:
            self.config = AutoConfig.from_pretrained(self.path, **self.options)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"model_name_or_path: {self.path!r} has no configuration: {error}") from error

    def start(self, arm: str, seed: int, folder: Path) -> str:
        """Path or hub id of an arm's initial weights; random ones are written to `folder`, once.

        Args:
            arm: `pretrained`; `scratch`, the architecture's own random initialisation; or `embeddings`, the same with
                the pre-trained input embeddings (and so the head, where it is tied to them).
            seed: of the initialisation.
        """
        if arm == "pretrained":
            return self.path
        if not folder.is_dir():
            unfinished = folder.with_name(f".{folder.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            self._write(arm, seed, unfinished)
            unfinished.rename(folder)
        return str(folder)

    def _write(self, arm: str, seed: int, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        # As pre-trained weights are stored, so that a `dtype` of "auto" means the same for both.
        dtype = getattr(self.config, "dtype", None) or torch.float32
        with torch.random.fork_rng(devices=[]):  # the weights are drawn on the CPU
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, trust_remote_code=self.options["trust_remote_code"]
            )
        if arm == "embeddings":
            known = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype, **self.options)
            with torch.no_grad():
                model.get_input_embeddings().weight.copy_(known.get_input_embeddings().weight)
        # A model without one gets it from its configuration, as with the pre-trained weights.
        with contextlib.suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(self.path, revision=self.options["revision"])
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.path, **self.options).save_pretrained(folder)
