"""The run of `capability`: scores, the position of each model on the continuum, and the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import numpy as np

from trl_ext_probing.capability.capability_plot import draw_capability
from trl_ext_probing.capability.capability_settings import CapabilitySettings
from trl_ext_probing.capability.continuum import recommend
from trl_ext_probing.capability.log_prob_cache import write_cache
from trl_ext_probing.capability.positions import SHARE_ABOVE, Capability
from trl_ext_probing.capability.sample_keys import sample_key, vocabulary_digest
from trl_ext_probing.intervals import Estimate, ratio_with_interval
from trl_ext_probing.models import load_tokenizer
from trl_ext_probing.ranks import is_first
from trl_ext_probing.results import write_results
from trl_ext_probing.scored_data import Data, Scores, score_models
from trl_ext_probing.tables import shown, table

LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def run(settings: CapabilitySettings) -> list[Capability]:
    """Score the data under all models, and write the results.

    Raises:
        ConfigurationError: The data or a model cannot be used.
    """
    data = Data(settings, settings.completion_only)
    scores = score_models(settings, settings.model, data, keep_log_probs=settings.log_probs is not None)
    found = [Capability.of(own, settings.confidence) for own in scores]
    if settings.log_probs is not None and is_first():
        write_log_probs(settings, data, scores[0])
    differences = [_differences(scores[0], own, settings.confidence) for own in scores]
    models = [
        {
            "model": s.model,
            "weights": s.about["weights"],
            **asdict(c),
            "recommendation": asdict(recommend(c.mean_p.bounds[0])),
        }
        | ({"difference_from_first": {k: asdict(v) for k, v in d.items()}} if s is not scores[0] else {})
        for s, c, d in zip(scores, found, differences, strict=True)
    ]
    rows = (
        {"model": s.model, "example": i, "tokens": int(n), "mean_p": p / n, "nll": nll / n}
        for s in scores
        for i, (n, p, nll) in enumerate(zip(*map(s.column, ("tokens", "sum_p", "sum_nll")), strict=True))
        if n
    )
    content = {"data": scores[0].about["data"], "models": models}
    draw = partial(draw_capability, dict(zip(settings.model, found, strict=True)))
    write_results(settings, content, rows, describe(settings, found, differences), draw)
    return found


def _differences(first: Scores, other: Scores, confidence: float) -> dict[str, Estimate]:
    """Of mean p and of nll per label token, paired by example."""
    tokens = first.column("tokens")
    columns = {"mean_p": "sum_p", "nll": "sum_nll"}
    return {
        name: ratio_with_interval(other.column(column) - first.column(column), tokens, confidence)
        for name, column in columns.items()
    }


def write_log_probs(settings: CapabilitySettings, data: Data, scores: Scores) -> None:
    """Write the log-probabilities of every token, keyed by the examples' content."""
    assert settings.log_probs is not None
    tokenizer = load_tokenizer(scores.model)
    examples = [example for chunk in data.chunks(tokenizer) for example in chunk]
    kept = [(e, values) for e, values in zip(examples, scores.log_probs, strict=True) if e.labels]
    keys = []
    for example, _ in kept:
        ids = np.array(example.ids)
        keys.append(sample_key(ids, np.where(np.arange(len(ids)) >= example.first, ids, -100)))
    metadata = {"vocabulary": vocabulary_digest(tokenizer), "model": scores.model}
    write_cache(settings.log_probs, keys, [values for _, values in kept], metadata)


def describe(
    settings: CapabilitySettings, found: Sequence[Capability], differences: Sequence[dict[str, Estimate]]
) -> str:
    """The capabilities as a table, the recommendations, and where their evidence ends, in Markdown."""
    head = ["", *settings.model]
    lines = [
        ["mean p of a token", *(shown(c.mean_p, 4) for c in found)],
        ["minus the first", "", *(shown(d["mean_p"], 4, "+") for d in differences[1:])],
        ["mean of the examples' mean p", *(f"{np.mean(c.example_quantiles):.4f}" for c in found)],
        *([f"{level:.0%} quantile of p", *(f"{c.quantile(level):.4g}" for c in found)] for level in LEVELS),
        [f"share of tokens with p >= {SHARE_ABOVE}", *(f"{c.share_above:.4f}" for c in found)],
        ["nll (nats per token)", *(shown(c.nll, 4) for c in found)],
        ["minus the first", "", *(shown(d["nll"], 4, "+") for d in differences[1:])],
    ]
    if len(found) == 1:
        lines = [line for line in lines if line[0] != "minus the first"]
    text = [
        f"# Capability on {settings.dataset}",
        "",
        f"{found[0].tokens:,} response tokens of {found[0].examples:,} examples; "
        f"{settings.confidence:.0%} intervals over examples.",
        "",
        table(head, lines),
    ]
    for model, capability in zip(settings.model, found, strict=True):
        advice = recommend(capability.mean_p.bounds[0])
        text += [
            f"Position of {model}: {advice.region}. Recommended objective: `{advice.objective}`.",
            f"Reason: {advice.reason}.",
            "",
        ]
    return "\n".join([*text, f"Where the evidence ends: {advice.limits}"])
