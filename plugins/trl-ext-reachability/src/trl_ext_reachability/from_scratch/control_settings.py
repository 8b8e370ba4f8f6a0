"""What to measure; everything that can be refused before a model loads is refused here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trl_ext.errors import ConfigurationError
from trl_ext_reachability.dotted import load_function
from trl_ext_reachability.from_scratch.floors import read_floor

MIN_SEEDS = 3
MULTIPLIERS = "0.3,1,3,10,30"
EXACT = "trl_ext_reachability.answer_rewards:exact"


@dataclass(frozen=True)
class ControlSettings:
    """Everything that the measurement depends on; the options of the command."""

    config: str
    eval_in: str | None = None
    eval_out: str | None = None
    validation: str | None = None
    eval_split: str = "train"
    columns: str | None = None
    reward: str = EXACT
    floor: str = "majority"
    embeddings: bool = False
    seeds: int = MIN_SEEDS
    learning_rates: str | None = None
    lr_multipliers: str | None = None
    search_seeds: int = 1
    search_share: float = 1.0
    points: int = 5
    ngram: int = 13
    samples: int = 0
    temperature: float = 1.0
    max_completion_length: int = 256
    eval_batch_size: int = 64
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not Path(self.config).is_file():
            raise ConfigurationError(f"--config: there is no file {self.config!r}")
        if self.eval_in is None and self.eval_out is None:
            raise ConfigurationError("nothing to evaluate on: give --eval-in, --eval-out or both")
        if self.seeds < MIN_SEEDS:
            raise ConfigurationError(f"--seeds {self.seeds}: a spread needs {MIN_SEEDS} seeds or more")
        if self.learning_rates is not None and self.lr_multipliers is not None:
            raise ConfigurationError("--learning-rates and --lr-multipliers contradict each other; give one of them")
        if not 1 <= self.search_seeds <= self.seeds:
            raise ConfigurationError(f"--search-seeds {self.search_seeds}: from 1 to --seeds {self.seeds}")
        if not 0 < self.search_share <= 1:
            raise ConfigurationError(f"--search-share {self.search_share}: above 0, up to 1")
        if not 0 < self.confidence < 1:
            raise ConfigurationError(f"--confidence {self.confidence}: between 0 and 1")
        if self.samples and not self.temperature > 0:
            raise ConfigurationError(f"--temperature {self.temperature}: above 0 with --samples; 0 samples are greedy")
        for option, value in (("--points", self.points), ("--ngram", self.ngram)):
            if value < 1:
                raise ConfigurationError(f"{option} {value}: at least 1")
        read_floor(self.floor)
        if len(self.rates(1.0)) > 1 and self.eval_in is None and self.validation is None:
            raise ConfigurationError(
                "the learning rates are chosen by validation nll: give --validation or --eval-in, or one rate by "
                "--learning-rates"
            )
        self.load_reward()

    @property
    def sets(self) -> dict[str, str]:
        """Name to path of what is scored: `in`, `out`."""
        return {name: path for name, path in (("in", self.eval_in), ("out", self.eval_out)) if path is not None}

    def rates(self, configured: float) -> tuple[float, ...]:
        """The learning rates to search, ascending; `configured` is that of the YAML."""
        if self.learning_rates is not None:
            return _numbers(self.learning_rates, "--learning-rates")
        factors = _numbers(self.lr_multipliers or MULTIPLIERS, "--lr-multipliers")
        return tuple(float(f"{configured * factor:.6g}") for factor in factors)

    def load_reward(self) -> Any:
        """The reward function."""
        try:
            return load_function(self.reward)
        except ValueError as error:
            raise ConfigurationError(f"--reward: {error}") from None


class Run:
    """The user's run as `trl-ext sft` reads it.

    Args:
        settings: of the probe.

    Raises:
        ConfigurationError: it is of a kind that has no control from random weights.
    """

    def __init__(self, settings: ControlSettings) -> None:
        from trl_ext.cli import parse

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigurationError("probe from-scratch runs in one process; start it without a launcher")
        self.settings = settings
        self.yaml: dict[str, Any] = yaml.safe_load(Path(settings.config).read_text()) or {}
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
        if min(self.rates) <= 0:
            raise ConfigurationError(f"learning rates are above 0, unlike {min(self.rates):g}")

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


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise ConfigurationError(f"{option} {text!r}: numbers with commas, such as 1e-5,1e-4") from None
    if not numbers[0] > 0:
        raise ConfigurationError(f"{option} {text!r}: above 0")
    return tuple(numbers)
