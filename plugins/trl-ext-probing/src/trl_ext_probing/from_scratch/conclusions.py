"""What the intervals say, in sentences; nothing that the spread of the seeds does not carry."""

from __future__ import annotations

from collections.abc import Mapping

from trl_ext_probing.intervals import Estimate

MOST = 0.5
"""Share from which training from scratch is said to reach most of the gain: this tool's choice, not the paper's."""

WHERE = {"in": "in distribution", "out": "out of distribution"}
"""The evaluation sets in words."""


def side(interval: Estimate) -> str:
    """high or low where the whole interval is above or below `MOST`; open otherwise; undefined without one."""
    if interval.value is None or interval.low is None or interval.high is None:
        return "undefined"
    return "high" if interval.low > MOST else "low" if interval.high < MOST else "open"


def conclude(shares: Mapping[str, Estimate]) -> list[str]:
    """Sentences about S in distribution (`in`) and out of it (`out`), where they were measured.

    A joint finding needs both intervals on their side of `MOST`: each test at its own level makes the joint one hold at
    that level too (intersection-union), so the intervals need no correction.
    """
    sides = {name: side(interval) for name, interval in shares.items()}
    lines = [_sentence(WHERE[name], sides[name], shares[name]) for name in shares]
    pair = (sides.get("in"), sides.get("out"))
    if pair == ("high", "low"):
        lines.append(
            "Training from random weights gains most of the score in distribution and less than half out of it: this "
            "points to distribution fitting."
        )
    elif pair == ("high", "high"):
        lines.append("Most of the score, in and out of distribution, does not need the pre-trained weights.")
    elif pair == ("low", "low"):
        lines.append("More than half of the score rests on the pre-trained weights, in and out of distribution.")
    elif pair == ("low", "high"):
        lines.append("Random weights do better out of distribution than in it: look at the two sets before all else.")
    elif None not in pair and "open" in pair:
        lines.append(
            "The seeds do not decide whether the training fits the distribution; more seeds would narrow this."
        )
    return lines


def _sentence(where: str, side: str, interval: Estimate) -> str:
    if interval.value is None:
        return f"S {where} is undefined: {interval.reason}."
    shown = f"S {where} is {interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
    if side == "open":
        return f"{shown}: the seeds do not decide whether it is above or below {MOST:g}."
    return f"{shown}, {'above' if side == 'high' else 'below'} {MOST:g}."
