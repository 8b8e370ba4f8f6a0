"""Where a base model stands on the model-capability continuum of arXiv 2510.00526, and what that suggests.

Capability is the mean probability of the response tokens of the training set under the model before any fine-tuning.
The paper gives no cut-offs. It gives three groups of settings, kept here as `OBSERVED`; between and beyond them there
is no evidence, and the recommendation says so.
"""

from __future__ import annotations

from dataclasses import dataclass


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
