"""Two predictions about a base model: draws until a prompt is solved, and which prompts are solved in some draws.

    python examples/reachability_queries.py [--seeds 3] [--output runs/reachability_queries] [--large]

The base model and problems are those of `reachability_grpo.py`: words to copy, with all but the last letters given. A
prompt that the model solves with probability alpha, known from teacher forcing, should take 1/alpha draws (arXiv
2603.06957). And `trl-ext probe reachability` predicts from a few rollouts which held-out prompts are solved at least
once in as many further ones; `--check-against` compares that with another measurement.

Written: results.json, report.md, queries.png, and the calibration plot of each seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from reachability_grpo import LARGE, Row, Setup, likelihoods, probe, problems, quiet, spread, train_base

EDGES = (1.0, *(10 ** (i / 2) for i in range(1, 20)))
"""Of the bins of 1/alpha."""


@dataclass(frozen=True)
class Sizes:
    """Of the measurements."""

    most_draws: int = 1024
    """Of each prompt until it is solved."""
    rollouts: int = 16
    """Of each prompt, to predict from and to compare with."""


def queries(setup: Setup, sizes: Sizes, model: str, rows: Sequence[Row], seed: int) -> list[dict[str, float]]:
    """Probability of the right answer and draws until it comes, of each prompt in reach of `most_draws`."""
    from trl_ext_probing.engines import engine
    from trl_ext_probing.models import load_model

    alphas = likelihoods(model, rows)
    known = [i for i, alpha in enumerate(alphas) if alpha > 1 / sizes.most_draws]
    prompts, answers = ([rows[i][name] for i in known] for name in ("prompt", "answer"))
    loaded, tokenizer = load_model(model, "float32")
    sampler = engine("transformers", model=loaded, tokenizer=tokenizer, batch_size=512)
    drawn: Counter[int] = Counter()

    def draw(places: list[int]) -> list[bool]:
        wanted = []
        for place in places:
            wanted.append((place, drawn[place]))
            drawn[place] += 1
        n = max(drawn.values())
        found = sampler.generate(prompts, n=n, draws=wanted, max_tokens=setup.letters + 1, seed=seed)
        right = {(c.prompt_index, c.sample_index): c.text.strip() == answers[c.prompt_index] for c in found}
        return [right[pair] for pair in wanted]

    counts = draws_until_solved(draw, len(known), sizes.most_draws)
    return [{"alpha": float(alphas[i]), "draws": int(n)} for i, n in zip(known, counts, strict=True)]


def draws_until_solved(
    draw: Callable[[list[int]], Sequence[bool]], prompts: int, limit: int, at_once: int = 8
) -> np.ndarray:
    """(prompts,) number of the draw that solved each prompt first, from 1; 0 where none of `limit` did.

    Args:
        draw: for a list of prompt numbers, with repeats, one draw each: whether it is a success.
        prompts: how many there are.
        limit: most draws of a prompt.
        at_once: draws of a prompt between looks. Draws after the first success are thrown away, so that the number
            does not depend on it.
    """
    first = np.zeros(prompts, dtype=int)
    done = 0
    while done < limit and not first.all():
        now = min(at_once, limit - done)
        left = np.flatnonzero(first == 0)
        hits = np.array(draw(left.repeat(now).tolist()), dtype=bool).reshape(len(left), now)
        solved = hits.any(axis=1)
        first[left[solved]] = done + 1 + hits[solved].argmax(axis=1)
        done += now
    return first


def query_ratios(alphas: ArrayLike, draws: ArrayLike, limit: int) -> list[dict[str, Any]]:
    """Draws until the first success over what theory expects, for prompts in bins of half a decade of 1/alpha.

    Expected are (1 - (1 - alpha)^limit) / alpha draws: 1/alpha but for the limit, to which prompts that were never
    solved count (arXiv 2603.06957: 1/alpha reward queries on samples with base likelihood alpha).

    Args:
        alphas: (n,) success rates, known from elsewhere than these draws, above 0.
        draws: (n,) from `draws_until_solved`.
        limit: most draws of a prompt there.

    Returns:
        For each bin with prompts `from` and `to` (of 1/alpha), `prompts`, how many were `unsolved`, `mean_draws`,
        `expected`, their `ratio` and its 95 % `interval`, by resampling prompts 2,000 times.
    """
    p, counts = np.asarray(alphas, dtype=float), np.asarray(draws)
    unsolved = counts == 0
    spent, expected = np.where(unsolved, limit, counts), (1 - (1 - p) ** limit) / p
    rng = np.random.default_rng(0)
    found = []
    for low, high in pairwise(EDGES):
        mine = np.flatnonzero((1 / p >= low) & (1 / p < high))
        if not len(mine):
            continue
        again = rng.choice(mine, (2000, len(mine)))
        ratios = spent[again].sum(axis=1) / expected[again].sum(axis=1)
        found.append(
            {
                "from": low,
                "to": high,
                "prompts": len(mine),
                "unsolved": int(unsolved[mine].sum()),
                "mean_draws": float(spent[mine].mean()),
                "expected": float(expected[mine].mean()),
                "ratio": float(spent[mine].sum() / expected[mine].sum()),
                "interval": np.quantile(ratios, [0.025, 0.975]).tolist(),
            }
        )
    return found


def describe_queries(bins: Sequence[Mapping[str, Any]]) -> str:
    """The bins of `query_ratios` as a table in Markdown."""
    lines = ["| 1/alpha | prompts | never solved | mean draws | expected | ratio (95 %) |", "|---" * 6 + "|"]
    lines += [
        f"| {b['from']:.3g} to {b['to']:.3g} | {b['prompts']} | {b['unsolved']} | {b['mean_draws']:.1f} "
        f"| {b['expected']:.1f} | {b['ratio']:.2f} ({b['interval'][0]:.2f} to {b['interval'][1]:.2f}) |"
        for b in bins
    ]
    return "\n".join(lines)


def draw_queries(alphas: Sequence[float], draws: Sequence[int], bins: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws until the first success against 1/alpha, of each prompt and on average; see `query_ratios`."""
    from trl_ext_probing.plots import COLOURS, GREY, figure, save

    whole, axis = figure(size=(5.5, 5))
    x, y = 1 / np.asarray(alphas), np.asarray(draws)
    axis.loglog(x[y > 0], y[y > 0], ".", color=COLOURS[4], alpha=0.4, label="one prompt")
    axis.loglog([b["expected"] for b in bins], [b["mean_draws"] for b in bins], "o", color=COLOURS[0], label="bin mean")
    axis.loglog([1, x.max()], [1, x.max()], color=GREY, linestyle=":", label="1/alpha")
    axis.set(xlabel="1/alpha (draws)", ylabel="draws until the first success", title="Queries to success")
    axis.legend(fontsize=8)
    save(whole, path)


def run_seed(setup: Setup, sizes: Sizes, seed: int, output: Path) -> dict[str, Any]:
    """One base model: draws until success, and predicted against observed on held-out prompts."""
    from trl_ext_probing.reachability.checking import check_against

    rows = [row for n in setup.in_reach for row in problems(setup, n, setup.held_out, seed, "held_out")]
    fixed = {"n": sizes.rollouts, "max_rollouts": sizes.rollouts}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = train_base(setup, seed, folder)
        probe(setup, base, rows, folder / "observed", seed=2 * seed + 1, **fixed)
        probe(setup, base, rows, folder / "predicted", seed=2 * seed, **fixed)
        calibration = check_against(folder / "predicted", folder / "observed")
        shutil.copy(folder / "predicted" / "calibration.png", output / f"seed{seed}-calibration.png")
        return {"seed": seed, "queries": queries(setup, sizes, base, rows, seed), "calibration": calibration}


def report(sizes: Sizes, results: Sequence[Mapping[str, Any]], bins: Sequence[Mapping[str, Any]]) -> str:
    """The tables in Markdown."""
    lines = [
        f"{len(results)} seeds.",
        "",
        f"Draws until the first right answer, at most {sizes.most_draws}; all seeds together:",
        "",
        describe_queries(bins),
        "",
        f"Prompts solved at least once in {sizes.rollouts} draws, predicted from as many others; mean [least, most]:",
        "",
        "| | |",
        "|---|---|",
    ]
    names = {
        "prompts": "prompts",
        "predicted_share": "predicted share",
        "observed_share": "observed share",
        "brier": "Brier score",
        "brier_constant": "Brier score of the best constant",
        "ece": "expected calibration error, ten bins of equal width",
        "ece_if_calibrated": "its 95 % bound if calibrated",
    }
    lines += [f"| {text} | {spread([r['calibration'][name] for r in results])} |" for name, text in names.items()]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/reachability_queries"))
    parser.add_argument("--large", action="store_true", help="the larger setup, on a GPU")
    options = parser.parse_args()
    setup, sizes = (LARGE, Sizes(8192, 64)) if options.large else (Setup(), Sizes())
    quiet(setup)
    options.output.mkdir(parents=True, exist_ok=True)

    results = [run_seed(setup, sizes, seed, options.output) for seed in range(options.seeds)]
    found = [query for result in results for query in result["queries"]]
    alphas, draws = [query["alpha"] for query in found], [query["draws"] for query in found]
    bins = query_ratios(alphas, draws, sizes.most_draws)
    content = {"setup": asdict(setup), "sizes": asdict(sizes), "query_ratios": bins, "results": results}
    (options.output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.output / "report.md").write_text(report(sizes, results, bins))
    draw_queries(alphas, draws, bins, options.output / "queries.png")
    print((options.output / "report.md").read_text())


if __name__ == "__main__":
    main()
