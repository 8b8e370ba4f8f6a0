"""`trl-ext probe from-scratch`: its settings, refused before a model loads where they cannot work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from trl_ext.errors import ConfigurationError
from trl_ext_probing.settings import Option, ProbeSettings, RewardSettings, SamplingSettings, numbers

MIN_SEEDS = 3
MULTIPLIERS = "0.3,1,3,10,30"
EXACT = "trl_ext_probing.answers:exact_text"


@dataclass(frozen=True, kw_only=True)
class FromScratchSettings(SamplingSettings, RewardSettings):
    """What `from-scratch` measures."""

    config: Annotated[str, Option(help="The run: a YAML as `trl-ext sft --config` takes it.")]
    output: Annotated[Path, Option(help="Folder for runs and results; the same command goes on in it.")] = Path(
        "from-scratch"
    )
    eval_in: Annotated[
        str | None, Option(help="Prompts like the training's: a data file or hub id; `completion` gives the nll.")
    ] = None
    eval_out: Annotated[str | None, Option(help="Prompts unlike the training's.")] = None
    validation: Annotated[str | None, Option(help="Data whose nll chooses learning rates; --eval-in by default.")] = (
        None
    )
    split: Annotated[str, Option(help="Split of these data sets.")] = "train"
    columns: Annotated[str | None, Option(help="Renaming of their columns: question=prompt.")] = None
    reward: Annotated[
        list[str],
        Option(help="A reward function in TRL's form: module:function or file.py:function. Several are added up."),
    ] = field(default_factory=lambda: [EXACT])
    floor: Annotated[str, Option(help="Score without knowledge: majority, format, or a number.")] = "majority"
    embeddings: Annotated[
        bool, Option("--embeddings", help="A third arm: random weights with the pre-trained embeddings.")
    ] = False
    seeds: Annotated[int, Option(help="Trainings of each arm.", min=MIN_SEEDS)] = MIN_SEEDS
    learning_rates: Annotated[str | None, Option(help="Rates to search, for every arm: 1e-5,1e-4.")] = None
    lr_multipliers: Annotated[
        str | None, Option(help=f"Rates to search, as multiples of the YAML's; {MULTIPLIERS} by default.")
    ] = None
    search_seeds: Annotated[int, Option(help="Seeds of the search.", min=1)] = 1
    search_share: Annotated[float, Option(help="Share of the training that the search takes.", max=1.0)] = 1.0
    points: Annotated[int, Option(help="Evaluations on the way, the end included.", min=1)] = 5
    ngram: Annotated[int, Option(help="Words in a row that make a sample contaminated.", min=1)] = 13
    n: Annotated[int, Option(help="Completions of each prompt.", min=1)] = 1
    temperature: Annotated[float, Option(help="Sampling temperature; 0 decodes greedily.", min=0.0)] = 0.0

    probe: ClassVar[str] = "from-scratch"
    files: ClassVar[tuple[str, ...]] = (*ProbeSettings.files, "contamination.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not Path(self.config).is_file():
            raise ConfigurationError(f"--config: there is no file {self.config!r}")
        if self.eval_in is None and self.eval_out is None:
            raise ConfigurationError("nothing to evaluate on: give --eval-in, --eval-out or both")
        if self.learning_rates is not None and self.lr_multipliers is not None:
            raise ConfigurationError("--learning-rates and --lr-multipliers contradict each other; give one of them")
        if self.search_seeds > self.seeds:
            raise ConfigurationError(f"--search-seeds {self.search_seeds}: from 1 to --seeds {self.seeds}")
        if not self.search_share > 0:
            raise ConfigurationError(f"--search-share {self.search_share:g}: above 0, up to 1")
        if self.n > 1 and self.temperature == 0:
            raise ConfigurationError(f"--n {self.n} with --temperature 0: greedy completions are all the same")
        if self.engine != "transformers":
            raise ConfigurationError(
                f"--engine {self.engine}: this probe evaluates its models in its own process; leave it out"
            )
        _ = self.floor_score
        if len(self.rates(1.0)) > 1 and self.eval_in is None and self.validation is None:
            raise ConfigurationError(
                "the learning rates are chosen by validation nll: give --validation or --eval-in, or one rate by "
                "--learning-rates"
            )

    @property
    def sets(self) -> dict[str, str]:
        """Name to path of what is scored: `in`, `out`."""
        return {name: path for name, path in (("in", self.eval_in), ("out", self.eval_out)) if path is not None}

    @property
    def floor_score(self) -> str | float:
        """`majority`, `format` or a number.

        Raises:
            ConfigurationError: It is none of these.
        """
        if self.floor in ("majority", "format"):
            return self.floor
        try:
            return float(self.floor)
        except ValueError:
            raise ConfigurationError(f"--floor: {self.floor!r} is not majority, format or a number") from None

    def rates(self, configured: float) -> tuple[float, ...]:
        """The learning rates to search, ascending; `configured` is that of the YAML.

        Raises:
            ConfigurationError: They are no numbers above 0.
        """
        given = (self.learning_rates, "--learning-rates", 1.0)
        if self.learning_rates is None:
            given = (self.lr_multipliers or MULTIPLIERS, "--lr-multipliers", configured)
        text, flag, factor = given
        found = sorted({float(f"{factor * number:.6g}") for number in numbers(str(text), flag)})
        if not found[0] > 0:
            raise ConfigurationError(f"{flag} {text!r}: learning rates are above 0, unlike {found[0]:g}")
        return tuple(found)
