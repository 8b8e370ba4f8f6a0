"""`trl-ext probe drift`: what training on one thing did to a model on general data: likelihood and accuracy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from trl_ext_mixing.sampling import load_model, prompt_text


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
) -> None:
    """Negative log-likelihood and next-token accuracy on general data, before and after, with paired intervals."""
    from rich.console import Console
    from rich.progress import Progress

    from trl_ext.data import load_dataset_spec, parse_columns

    spec = {"path": dataset, "name": dataset_name, "split": split, "columns": parse_columns(columns, "--columns")}
    rows = list(load_dataset_spec(spec))[:limit]
    if not rows:
        raise ValueError(f"{dataset} has no examples")
    scores: list[list[Score]] = []
    with Progress() as bar:
        for name in (base, model):
            task = bar.add_task(name, total=len(rows))
            loaded, tokenizer = load_model(name, dtype)
            scores.append([])
            for batch in score(loaded, tokenizer, rows, batch_size=batch_size, max_length=max_length):
                scores[-1] += batch
                bar.update(task, advance=len(batch))
            del loaded
    result = compare(*scores, confidence=confidence)
    report = {"base": base, "model": model, "dataset": dataset, "split": split, "confidence": confidence}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report | {name: asdict(c) for name, c in result.items()}, indent=1) + "\n")
    console = Console()
    for name, c in result.items():
        console.print(
            f"{name}: {c.before:.4f} -> {c.after:.4f}, change {c.change:+.4f} [{c.low:+.4f}, {c.high:+.4f}] "
            f"({c.examples} examples, {c.tokens} tokens)",
            highlight=False,
        )


@dataclass(frozen=True)
class Score:
    """Sums over the label tokens of one example."""

    nll: float
    hits: int
    """Labels that are the most probable token."""
    tokens: int


@dataclass(frozen=True)
class Change:
    """A mean per label token before and after, and the interval of its change."""

    before: float
    after: float
    change: float
    low: float
    high: float
    examples: int
    tokens: int


@torch.no_grad()
def score(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], *, batch_size: int = 8, max_length: int = 1024
) -> Iterator[list[Score]]:
    """Scores of the rows, a batch at a time.

    Labels are the completion where a row has one, and all tokens but the first otherwise (of messages: as the chat
    template writes them).
    """
    encoded = [_encode(tokenizer, row, max_length) for row in rows]
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (tokens, first) in enumerate(batch):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            attention[i, : len(tokens)] = 1
            mask[i, first : len(tokens)] = True
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=attention.to(model.device), use_cache=False).logits[:, :-1]
        yield _scores(logits, ids[:, 1:], mask[:, 1:])


def _scores(logits: Tensor, labels: Tensor, mask: Tensor) -> list[Score]:
    losses = torch.nn.functional.cross_entropy(logits[mask].float(), labels[mask], reduction="none")
    nll = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, losses)
    hits = (logits.argmax(-1) == labels) & mask
    columns = (nll.sum(1).tolist(), hits.sum(1).tolist(), mask.sum(1).tolist())
    return [Score(*row) for row in zip(*columns, strict=True)]


def _encode(tokenizer: Any, row: dict[str, Any], max_length: int) -> tuple[list[int], int]:
    """Token ids and the position of the first label."""
    if "messages" in row:
        text, head = tokenizer.apply_chat_template(row["messages"], tokenize=False), ""
    elif "completion" in row:
        head = prompt_text(tokenizer, row["prompt"])
        answer = row["completion"]
        text = (
            head + answer
            if isinstance(answer, str)
            else tokenizer.apply_chat_template([*row["prompt"], *answer], tokenize=False)
        )
    else:
        text, head = row["text"], ""
    special = isinstance(row.get("prompt", ""), str) and "messages" not in row  # a template brings its own
    ids = tokenizer(text, add_special_tokens=special)["input_ids"][:max_length]
    first = len(tokenizer(head, add_special_tokens=special)["input_ids"]) if head else 1
    return ids, max(first, 1)


def compare(before: Sequence[Score], after: Sequence[Score], *, confidence: float = 0.95) -> dict[str, Change]:
    """Change of the mean NLL and accuracy per label token, on the same examples before and after.

    Tokens of one example go together, so the interval is that of a ratio over examples: change +- z s / sqrt(N) / m,
    with s the standard deviation of d_i - change t_i, where d_i is the change of example i's sum, t_i its tokens and m
    their mean.

    Raises:
        ValueError: not the same examples, or no label.
    """
    if [s.tokens for s in before] != [s.tokens for s in after]:
        raise ValueError("before and after have other label tokens; the two models need one tokenizer")
    tokens = sum(s.tokens for s in before)
    if tokens == 0:
        raise ValueError("no label token to score")
    z, n = NormalDist().inv_cdf((1 + confidence) / 2), len(before)
    result = {}
    for name, value in (("nll", lambda s: s.nll), ("accuracy", lambda s: s.hits)):
        a, b = (math.fsum(value(s) for s in part) / tokens for part in (before, after))
        residuals = [value(y) - value(x) - (b - a) * x.tokens for x, y in zip(before, after, strict=True)]
        deviation = math.sqrt(math.fsum(r * r for r in residuals) / max(n - 1, 1))
        half = z * deviation * math.sqrt(n) / tokens
        result[name] = Change(a, b, b - a, b - a - half, b - a + half, n, tokens)
    return result
