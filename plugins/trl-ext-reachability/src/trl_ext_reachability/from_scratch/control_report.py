"""The summary in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from trl_ext_reachability.from_scratch.conclusions import WHERE


def describe(summary: Mapping[str, Any]) -> str:
    """The conclusion, the scores at the end, S over the training, the searches and the evaluation sets."""
    settings, last = summary["settings"], summary["points"][-1]
    level = f"{settings['confidence']:.0%}"
    lines = [
        f"# From scratch: {settings['config']} with {summary['model']} and with random weights",
        "",
        *summary["conclusion"],
        "",
        f"{len(summary['seeds'])} seeds, {last['step']:,} steps, {last['tokens']:,.0f} tokens. The arms of a seed "
        "saw the same batches (checksums compared).",
        f"S = (score - floor) / (pre-trained score - floor), of means over seeds; {level} intervals over seeds "
        "(Fieller; paired t for nll). They say nothing about other evaluation samples.",
        "",
        *_final(summary, last),
        "",
        *_course(summary),
        "",
        *_search(summary),
        "",
        *_sets(summary),
    ]
    return "\n".join(lines) + "\n"


def _final(summary: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    lines = [
        "| at the end | arm | score: mean ± sd (range) | S | S without contaminated | nll | nll gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in summary["sets"]:
        for arm in summary["arms"]:
            shares = [last[key][name].get(arm) for key in ("share", "share_uncontaminated")]
            nll = last["nll"][name][arm]
            cells = [
                WHERE[name],
                arm,
                _spread(last["score"][name][arm]),
                *map(_interval, shares),
                "" if None in nll else f"{mean(nll):.3f} ± {stdev(nll):.3f}",
                _interval(last["nll_gap"][name].get(arm), signed=True),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _course(summary: Mapping[str, Any]) -> list[str]:
    columns = [(name, arm) for name in summary["sets"] for arm in summary["arms"] if arm != "pretrained"]
    heads = [f"S {WHERE[name]}, {arm}" for name, arm in columns]
    lines = [f"| tokens | steps | {' | '.join(heads)} |", "|---" * (len(columns) + 2) + "|"]
    for point in summary["points"]:
        cells = [_interval(point["share"][name][arm]) for name, arm in columns]
        lines.append(f"| {point['tokens']:,.0f} | {point['step']:,} | {' | '.join(cells)} |")
    return lines


def _search(summary: Mapping[str, Any]) -> list[str]:
    settings = summary["settings"]
    chooser = settings["validation"] or settings["eval_in"]
    if not any(arm["search"] for arm in summary["arms"].values()):
        return [f"One learning rate for all arms, without a search: {summary['arms']['scratch']['learning_rate']:g}."]
    rates = [entry["learning_rate"] for entry in summary["arms"]["scratch"]["search"]]
    lines = [
        f"Learning rates by nll on {chooser} ({settings['search_seeds']} seed(s), {settings['search_share']:.0%} of "
        "the training):",
        "",
        f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} | chosen |",
        "|---" * (len(rates) + 2) + "|",
    ]
    for name, arm in summary["arms"].items():
        nlls = ["diverged" if entry["nll"] is None else f"{entry['nll']:.4f}" for entry in arm["search"]]
        lines.append(f"| {name} | {' | '.join(nlls)} | {arm['learning_rate']:g} |")
    edge = [name for name, arm in summary["arms"].items() if arm["at_the_edge"]]
    if edge:
        lines += [
            "",
            f"The best rate of {', '.join(edge)} is at the end of the grid: a wider one may be better for it.",
        ]
    return lines


def _sets(summary: Mapping[str, Any]) -> list[str]:
    n = summary["settings"]["ngram"]
    lines = ["| set | samples | floor | which is | contaminated |", "|---|---|---|---|---|"]
    for name, facts in summary["sets"].items():
        cells = [
            WHERE[name],
            f"{facts['samples']:,}",
            f"{facts['floor']:.4f}",
            facts["floor_is"].replace("|", r"\|"),
            f"{facts['contaminated']:,} ({facts['contaminated'] / facts['samples']:.1%})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"Contaminated: shares {n} words in a row with the training set, or its whole prompt where that is shorter; "
        "listed in contamination.jsonl. What the model was pre-trained on is not looked at.",
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _interval(interval: Mapping[str, Any] | None, signed: bool = False) -> str:
    if interval is None:
        return ""
    if interval["value"] is None:
        return "undefined"
    sign = "+" if signed else ""
    return f"{interval['value']:{sign}.3f} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"
