"""The capability of a model on a data set, as `trl-ext probe capability` measures it and objectives read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trl_ext.errors import ConfigurationError
from trl_ext_probing.intervals import Estimate, ratio_with_interval
from trl_ext_probing.results import read_results
from trl_ext_probing.scored_data import BINS, Scores

SHARE_ABOVE = 0.55
GRID = 1001  # quantiles kept in the file


@dataclass(frozen=True)
class Capability:
    """How likely a model finds the response tokens of a data set."""

    mean_p: Estimate
    """Mean probability of a response token, with the examples as the independent units."""
    nll: Estimate
    """Nats per response token."""
    share_above: float
    """Share of response tokens with p >= .55."""
    examples: int
    tokens: int
    quantiles: list[float]
    """Of p over response tokens, at `GRID` equally spaced levels, to 1e-4."""
    example_quantiles: list[float]
    """Of the mean p of each example, at the same levels."""

    @classmethod
    def of(cls, scores: Scores, confidence: float = 0.95) -> Capability:
        """Sum scores up.

        Raises:
            ValueError: Fewer than two examples have a response token.
        """
        tokens, sum_p = scores.column("tokens"), scores.column("sum_p")
        levels, some = np.linspace(0, 1, GRID), tokens > 0
        return cls(
            mean_p=ratio_with_interval(sum_p, tokens, confidence),
            nll=ratio_with_interval(scores.column("sum_nll"), tokens, confidence),
            share_above=float(scores.histogram[round(SHARE_ABOVE * BINS) :].sum() / tokens.sum()),
            examples=int(some.sum()),
            tokens=int(tokens.sum()),
            quantiles=_histogram_quantiles(scores.histogram, levels),
            example_quantiles=np.quantile(sum_p[some] / tokens[some], levels).tolist(),
        )

    def quantile(self, level: float) -> float:
        """The probability below which the share `level` of the response tokens lies."""
        return float(np.interp(level, np.linspace(0, 1, len(self.quantiles)), self.quantiles))

    @classmethod
    def load(cls, folder: str | Path, setting: str) -> Capability:
        """Read what the probe found of one model.

        Args:
            folder: The probe's output.
            setting: What holds it, for the message: "auto: probe".

        Raises:
            ConfigurationError: There is no finished measurement, or it is of several models.
        """
        models = read_results(Path(folder), "capability", setting)["models"]
        if len(models) > 1:
            raise ConfigurationError(f"{setting}: {str(folder)!r} is of {len(models)} models; probe one of them alone")
        kept = {name: models[0][name] for name in cls.__dataclass_fields__}
        return cls(**{**kept, "mean_p": Estimate(**kept["mean_p"]), "nll": Estimate(**kept["nll"])})


def _histogram_quantiles(counts: NDArray[np.int64], levels: NDArray[np.float64]) -> list[float]:
    shares = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    return [float(q) for q in np.interp(levels, shares, np.linspace(0, 1, BINS + 1))]
