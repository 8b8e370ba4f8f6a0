"""`trl-ext probe drift`: what training on one thing did to a model on general data: likelihood and accuracy."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from trl_ext.errors import ConfigurationError
from trl_ext_mixing.drift_scores import Encoded, Score, data_column, encode, score, score_encoded
from trl_ext_mixing.estimators import student_t
from trl_ext_mixing.loading import check_template, load_model, load_tokenizer, refuse_bad_options
from trl_ext_mixing.progress import Report

__all__ = ["Change", "Score", "compare", "drift", "score"]


def drift(
    model: Annotated[str, typer.Option(help="Model after training: a path, an adapter's path, or a hub id.")],
    base: Annotated[str, typer.Option(help="Model before training.")],
    dataset: Annotated[
        str, typer.Option(help="General data: text, prompt and completion, or messages; a file or a hub id.")
    ],
    output: Annotated[Path, typer.Option(help="File for the results.")] = Path("drift.json"),
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    dataset_name: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    columns: Annotated[str | None, typer.Option(help="Renaming of columns: question=prompt,answer=completion.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first examples only.", min=1)] = None,
    max_length: Annotated[int, typer.Option(help="Truncation in tokens.", min=2)] = 1024,
    batch_size: Annotated[int, typer.Option(help="Examples at a time.", min=1)] = 8,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    dtype: Annotated[str, typer.Option(help="Precision of the weights: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1.")] = "auto",
) -> None:
    """Negative log-likelihood and next-token accuracy on general data, before and after, with paired intervals."""
    from trl_ext.data import load_dataset_spec, parse_columns

    refuse_bad_options(confidence, dtype, device)
    spec = {"path": dataset, "name": dataset_name, "split": split, "columns": parse_columns(columns, "--columns")}
    data = load_dataset_spec(spec)
    column = data_column(data.column_names)
    rows = list(data.select(range(min(limit or len(data), len(data)))))
    encoded = encode_for_both(base, model, rows, column, max_length)
    unlabelled = sum(first >= len(ids) for ids, first in encoded)
    scores: list[list[Score]] = []
    with Report() as report:
        for name in (base, model):
            report.start(name, len(rows))
            loaded, _ = load_model(name, dtype, device)
            scores.append([])
            for batch in score_encoded(loaded, encoded, batch_size=batch_size):
                scores[-1] += batch
                report.update(len(scores[-1]))
            del loaded
            gc.collect()  # models hold circles of references, and the next one wants the memory
    result = compare(*scores, confidence=confidence)
    facts = {
        "base": base, "model": model, "dataset": dataset, "split": split, "confidence": confidence,
        "without_labels": unlabelled,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(facts | {name: asdict(c) for name, c in result.items()}, indent=1) + "\n")
    for name, c in result.items():
        print(
            f"{name}: {c.before:.4f} -> {c.after:.4f}, change {c.change:+.4f} [{c.low:+.4f}, {c.high:+.4f}] "
            f"({c.examples} examples, {c.tokens} tokens)"
        )
    if unlabelled:
        print(f"{unlabelled} of {len(rows)} examples have no token to score and are left out")


def encode_for_both(
    base: str, model: str, rows: Sequence[dict[str, Any]], column: str, max_length: int
) -> list[Encoded]:
    """Tokenise the rows with both models' tokenizers, before either model loads, and give what they agree on.

    Raises:
        ConfigurationError: they make other tokens of a row, one cannot write messages, or fewer than two rows have a
            label.
    """
    both = []
    for name in (base, model):
        tokenizer = load_tokenizer(name)
        if any(isinstance(row[column], list) for row in rows):
            check_template(tokenizer, name, column)
        both.append([encode(tokenizer, row, max_length) for row in rows])
    if other := [i for i, (x, y) in enumerate(zip(*both, strict=True)) if x != y]:
        raise ConfigurationError(
            f"the tokenizers of {base!r} and {model!r} make other tokens of example {other[0]} (and of "
            f"{len(other) - 1} more), so likelihoods per token do not compare; give both models one tokenizer and chat "
            "template"
        )
    if (scored := sum(first < len(ids) for ids, first in both[0])) < 2:
        raise ConfigurationError(
            f"{scored} of {len(rows)} examples have a token to score in the column {column!r} within --max-length "
            f"{max_length}; an interval needs two"
        )
    return both[0]


@dataclass(frozen=True)
class Change:
    """A mean per label token before and after, and the interval of its change."""

    before: float
    after: float
    change: float
    low: float
    high: float
    examples: int
    """Those with a label."""
    tokens: int


def compare(before: Sequence[Score], after: Sequence[Score], *, confidence: float = 0.95) -> dict[str, Change]:
    """Change of the mean NLL and accuracy per label token, on the same examples before and after.

    Tokens of one example go together, so the interval is that of a ratio over the N examples with a label: change +- t
    s / sqrt(N) / m, with s the standard deviation of d_i - change t_i, where d_i is the change of example i's sum, t_i
    its tokens and m their mean, and with t the quantile of Student's distribution with N - 1 degrees of freedom.

    An interval of width zero is no evidence: it says that the examples at hand all changed alike (the accuracy of every
    one by nothing, say), and not how far others may.

    Raises:
        ValueError: not the same examples, no label, or a single example with one, which shows no spread.
    """
    if [s.tokens for s in before] != [s.tokens for s in after]:
        raise ValueError("before and after have other label tokens; the two models need one tokenizer")
    pairs = [(x, y) for x, y in zip(before, after, strict=True) if x.tokens]
    tokens, n = sum(x.tokens for x, _ in pairs), len(pairs)
    if n == 0:
        raise ValueError("no label token to score")
    if n == 1:
        raise ValueError("an interval needs at least two examples with labels, and there is one")
    t = student_t(confidence, n - 1)
    result = {}
    for name, value in (("nll", lambda s: s.nll), ("accuracy", lambda s: s.hits)):
        a, b = (math.fsum(value(s) for s in part) / tokens for part in zip(*pairs, strict=True))
        residuals = [value(y) - value(x) - (b - a) * x.tokens for x, y in pairs]
        deviation = math.sqrt(math.fsum(r * r for r in residuals) / (n - 1))
        half = t * deviation * math.sqrt(n) / tokens
        result[name] = Change(a, b, b - a, b - a - half, b - a + half, n, tokens)
    return result
