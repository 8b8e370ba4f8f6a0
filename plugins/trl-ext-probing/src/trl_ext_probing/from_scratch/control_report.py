"""The summary in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from trl_ext_probing.from_scratch.conclusions import WHERE
from trl_ext_probing.from_scratch.control_settings import FromScratchSettings
from trl_ext_probing.intervals import Estimate
from trl_ext_probing.tables import shown, table

AT_THE_END = ("at the end", "arm", "score: mean ± sd (range)", "S", "S without contaminated", "nll", "nll gap")


def describe(settings: FromScratchSettings, summary: Mapping[str, Any]) -> str:
    """The conclusion, the scores at the end, S over the training, the searches and the evaluation sets."""
    last = summary["points"][-1]
    return "\n".join(
        [
            f"# From scratch: {settings.config} with {summary['model']} and with random weights",
            "",
            *summary["conclusion"],
            "",
            f"{len(summary['seeds'])} seeds, {last['step']:,} steps, {last['tokens']:,.0f} tokens. The arms of a seed "
            "saw the same batches (checksums compared).",
            "S = (score - floor) / (pre-trained score - floor), of means over seeds; "
            f"{settings.confidence:.0%} intervals over seeds (Fieller; paired t for nll). They say nothing about other "
            "evaluation samples.",
            "",
            table(AT_THE_END, _final(summary, last)),
            _course(summary),
            *_search(settings, summary),
            table(("set", "samples", "floor", "which is", "contaminated"), _sets(summary)),
            f"Contaminated: shares {settings.ngram} words in a row with the training set, or its whole prompt where "
            "that is shorter; listed in contamination.jsonl. What the model was pre-trained on is not looked at.",
        ]
    )


def _final(summary: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[list[str]]:
    for name in summary["sets"]:
        for arm in summary["arms"]:
            shares = [last[key][name].get(arm) for key in ("share", "share_uncontaminated")]
            nll = last["nll"][name][arm]
            yield [
                WHERE[name],
                arm,
                _spread(last["score"][name][arm]),
                *map(_interval, shares),
                "" if None in nll else f"{mean(nll):.3f} ± {stdev(nll):.3f}",
                _interval(last["nll_gap"][name].get(arm), "+"),
            ]


def _course(summary: Mapping[str, Any]) -> str:
    columns = [(name, arm) for name in summary["sets"] for arm in summary["arms"] if arm != "pretrained"]
    head = ["tokens", "steps", *(f"S {WHERE[name]}, {arm}" for name, arm in columns)]
    points = summary["points"]
    return table(
        head,
        (
            [f"{p['tokens']:,.0f}", f"{p['step']:,}", *(_interval(p["share"][name][arm]) for name, arm in columns)]
            for p in points
        ),
    )


def _search(settings: FromScratchSettings, summary: Mapping[str, Any]) -> list[str]:
    arms = summary["arms"]
    if not any(arm["search"] for arm in arms.values()):
        return [f"One learning rate for all arms, without a search: {arms['scratch']['learning_rate']:g}.", ""]
    head = ["arm", *(f"{entry['learning_rate']:g}" for entry in arms["scratch"]["search"]), "chosen"]
    lines = []
    for name, arm in arms.items():
        nlls = ["diverged" if entry["nll"] is None else f"{entry['nll']:.4f}" for entry in arm["search"]]
        lines.append([name, *nlls, f"{arm['learning_rate']:g}"])
    text = [
        f"Learning rates by nll on {settings.validation or settings.eval_in} ({settings.search_seeds} seed(s), "
        f"{settings.search_share:.0%} of the training):",
        "",
        table(head, lines),
    ]
    if edge := [name for name, arm in arms.items() if arm["at_the_edge"]]:
        text += [f"The best rate of {', '.join(edge)} is at the end of the grid: a wider one may be better for it.", ""]
    return text


def _sets(summary: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, facts in summary["sets"].items():
        yield [
            WHERE[name],
            f"{facts['samples']:,}",
            f"{facts['floor']:.4f}",
            facts["floor_is"].replace("|", r"\|"),
            f"{facts['contaminated']:,} ({facts['contaminated'] / facts['samples']:.1%})",
        ]


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _interval(estimate: Mapping[str, Any] | None, sign: str = "") -> str:
    return shown(None if estimate is None else Estimate(**estimate), 3, sign)
