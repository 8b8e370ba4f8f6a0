"""The user's run as `trl-ext sft` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_probing.from_scratch.control_settings import FromScratchSettings
from trl_ext_probing.ranks import refuse_several


class Run:
    """The user's run as `trl-ext sft` reads it.

    Args:
        settings: of the probe.

    Raises:
        ConfigurationError: it is of a kind that has no control from random weights.
    """

    def __init__(self, settings: FromScratchSettings) -> None:
        from trl_ext.cli import parse, read_yaml

        refuse_several("from-scratch")
        self.settings = settings
        self.yaml: dict[str, Any] = read_yaml(Path(settings.config), "--config")
        self.script, self.training, self.model, self.data = parse("sft", ["--config", settings.config])
        path = settings.config
        if not self.model.model_name_or_path:
            raise ConfigurationError(f"{path}: model_name_or_path is missing, the weights to compare with random ones")
        for name in ("use_peft", "load_in_4bit", "load_in_8bit"):
            if getattr(self.model, name):
                raise ConfigurationError(
                    f"{path}: {name} trains an adapter or quantised weights, and frozen random weights learn nothing; "
                    f"set {name}: false and a learning rate for full training"
                )
        if self.data.streaming or self.script.dataset_streaming:
            raise ConfigurationError(f"{path}: the contamination check reads the whole training set; do not stream it")
        if self.training.resume_from_checkpoint:
            raise ConfigurationError(f"{path}: resume_from_checkpoint is this probe's own; remove it")
        self.rates = settings.rates(self.training.learning_rate)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The YAML's seed and those that follow it."""
        return tuple(self.training.seed + i for i in range(self.settings.seeds))

    @property
    def arms(self) -> tuple[str, ...]:
        """pretrained, scratch, and embeddings where wanted."""
        return ("pretrained", "scratch", "embeddings") if self.settings.embeddings else ("pretrained", "scratch")

    def training_rows(self) -> Any:
        """The training split, with the columns renamed as the trainer does; TRL's script loads the same."""
        from datasets import load_dataset
        from trl import get_dataset

        from trl_ext.data import rename_columns

        if self.data.datasets:
            loaded = get_dataset(self.data)
        elif self.script.dataset_name:
            loaded = load_dataset(self.script.dataset_name, name=self.script.dataset_config)
        else:
            raise ConfigurationError(f"{self.settings.config}: neither dataset_name nor datasets names training data")
        return rename_columns(loaded[self.script.dataset_train_split], self.training.dataset_columns)
