"""Where a base model stands on the model-capability continuum of arXiv 2510.00526, and what that suggests.

Capability is the mean probability of the response tokens of the training set under the model before any fine-tuning.
The paper gives no cut-offs. It gives three groups of settings, kept here as `OBSERVED`; between and beyond them there
is no evidence, and the recommendation says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

BINS = 10_000  # of the histogram of p: quantiles are exact to 1e-4
SHARE_ABOVE = 0.55
GRID = 1001  # quantiles kept in the file


@dataclass(frozen=True)
class Region:
    """A group of the paper's settings."""

    name: str
    low: float
    high: float
    finding: str


OBSERVED = (
    Region("weak", 0.01, 0.07, "NLL wins; -p does not learn (figfont: exact match 35.20 against 0)"),
    Region("intermediate", 0.50, 0.59, "no objective wins (medical)"),
    Region("strong", 0.76, 0.81, "-p, -p^10 and thresholded variants beat NLL by a lot (math)"),
)
STRONG_FROM = OBSERVED[-1].low
LIMITS = (
    "The paper gives no cut-offs: these are the settings it reports, and the switch at the weakest of its strong ones "
    "is this tool's choice. Label noise alone can separate the objectives. On instruction-tuned models -p has been "
    "seen to lose to NLL (arXiv 2601.02151, table 1). Compare on held-out data of your task."
)


@dataclass(frozen=True)
class Recommendation:
    """An objective for a capability, with the reason."""

    objective: str
    region: str
    reason: str
    limits: str = LIMITS


def recommend(mean_p: float) -> Recommendation:
    """Place a mean probability on the continuum, and name an objective.

    `power:alpha=1` from the weakest of the paper's strong settings on; NLL below, where it wins or nothing does.
    """
    objective = "power:alpha=1" if mean_p >= STRONG_FROM else "nll"
    inside = next((r for r in OBSERVED if r.low <= mean_p <= r.high), None)
    if inside is not None:
        seen = f"{inside.low:g} to {inside.high:g}"
        reason = f"mean p is {mean_p:.3f}, among the paper's {inside.name} settings ({seen}): {inside.finding}"
        return Recommendation(objective, inside.name, reason)
    below = [r for r in OBSERVED if r.high < mean_p]
    above = [r for r in OBSERVED if r.low > mean_p]
    if below and above:
        region = f"between {below[-1].name} and {above[0].name}"
        reason = (
            f"mean p is {mean_p:.3f}, {region}: the paper has no setting from {below[-1].high:g} to {above[0].low:g}"
        )
        if objective == "nll":
            reason += "; NLL is the default until held-out data says otherwise"
        return Recommendation(objective, region, reason)
    edge = below[-1] if below else above[0]
    region = f"{'above' if below else 'below'} the {edge.name} settings"
    return Recommendation(objective, region, f"mean p is {mean_p:.3f}, {region}: beyond the evidence ({edge.finding})")


class Tally:
    """Sums over response tokens and examples, from which a `Capability` is made; addable in any order."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.tokens: list[np.ndarray] = []
        self.sum_p: list[np.ndarray] = []
        self.sum_nll: list[np.ndarray] = []

    def add(self, counts: np.ndarray, tokens: np.ndarray, sum_p: np.ndarray, sum_nll: np.ndarray) -> None:
        """Add examples: a histogram (BINS,) of p, and (n,) tokens, sums of p and sums of -log p."""
        self.counts += counts
        self.tokens.append(tokens)
        self.sum_p.append(sum_p)
        self.sum_nll.append(sum_nll)

    def summarize(self, about: dict[str, Any]) -> Capability:
        """The capability; raises ValueError without a single response token."""
        tokens, sum_p, sum_nll = (np.concatenate([*x, np.empty(0)]) for x in (self.tokens, self.sum_p, self.sum_nll))
        total = tokens.sum()
        if total == 0:
            raise ValueError("the data set has no response token to measure")
        mean_p = float(sum_p.sum() / total)
        # Tokens of one example go together, so the error is that of a ratio over examples.
        error = math.sqrt(float(((sum_p - mean_p * tokens) ** 2).sum())) / float(total)
        levels = np.linspace(0, 1, GRID)
        examples = np.quantile(sum_p / tokens, levels)
        return Capability(
            mean_p=mean_p,
            standard_error=error,
            nll=float(sum_nll.sum() / total),
            share_above=float(self.counts[round(SHARE_ABOVE * BINS) :].sum() / total),
            examples=len(tokens),
            tokens=int(total),
            quantiles=_histogram_quantiles(self.counts, levels),
            example_quantiles=[float(q) for q in examples],
            about=about,
        )


@dataclass(frozen=True)
class Capability:
    """What `trl-ext probe capability` measures."""

    mean_p: float
    standard_error: float
    """Of `mean_p`, with the examples as the independent units."""
    nll: float
    """Nats per response token."""
    share_above: float
    """Share of response tokens with p >= .55."""
    examples: int
    tokens: int
    quantiles: list[float]
    """Of p over response tokens, at `GRID` equally spaced levels, to 1e-4."""
    example_quantiles: list[float]
    """Of the mean p of each example, at the same levels."""
    about: dict[str, Any] = field(default_factory=dict)
    """Model, data set and settings."""

    def quantile(self, level: float) -> float:
        """The probability below which the share `level` of the response tokens lies."""
        return float(np.interp(level, np.linspace(0, 1, len(self.quantiles)), self.quantiles))

    def save(self, path: Path) -> None:
        """Write JSON, with the recommendation; the same capability gives the same bytes."""
        content = {"format": 1, **asdict(self), "recommendation": asdict(recommend(self.mean_p))}
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Capability:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or it is another kind of file.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != 1:
                raise KeyError("format")
            return cls(**{k: v for k, v in content.items() if k not in ("format", "recommendation")})
        except OSError as error:
            raise ValueError(
                f"{str(path)!r} cannot be read ({error}); write it with `trl-ext probe capability`"
            ) from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is no capability.json of `trl-ext probe capability`") from error


def histogram(p: Tensor) -> np.ndarray:
    """(BINS,) int64 counts of probabilities, any shape, on any device."""
    bins = (p.float() * BINS).long().clamp(0, BINS - 1)
    return torch.bincount(bins.flatten(), minlength=BINS).cpu().numpy()


def _histogram_quantiles(counts: np.ndarray, levels: np.ndarray) -> list[float]:
    shares = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    return [float(q) for q in np.interp(levels, shares, np.linspace(0, 1, BINS + 1))]
