"""The base-model barrier of arXiv 2603.06957 on its own ground: a linear autoregressive model, on CPU.

Contexts come from a mixture of Gaussians in d dimensions; each centre has one correct sequence of N tokens out of k.
The policy is p(y_i | x, y_<i) = softmax(W_i (x * s(y_{i-1}))) with frozen random signs s, so a wrong token changes what
follows. The base model is trained on demonstrations in which a few centres are rare; then policy gradients see all
centres alike, with a reward for the whole sequence (outcome) or for each right prefix (process), +1 or -1 or, by arm,
1 or 0, without a baseline.

What the notes on the paper leave open is chosen here: the signs; the centres, random directions of one norm; how many
are rare and how rare. The norm is such that the base model's error is the paper's 0.57, the rare centres such that it
puts some of them off its support.

    python examples/base_model_barrier.py                # a small setting, 3 seeds
    python examples/base_model_barrier.py --size full    # N=128, d=k=32: about 4 minutes for each seed
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from trl_ext_probing.reachability.statistics import likelihood_quantile
from trl_ext_reachability.pg import adaptive_rate

ARMS = ("outcome", "process", "outcome, 0/1", "process, 0/1", "outcome, constant rate", "outcome, adaptive rate")


@dataclass(frozen=True)
class Setting:
    """Sizes and rates; those of `full` are the paper's experiment as far as the notes give them."""

    length: int
    tokens: int
    centres: int
    base_steps: int
    steps: int
    batch: int
    norm: float
    """Of the centres."""
    rare: int
    """Centres that are rare in the demonstrations."""
    rarity: float
    """Frequency of a rare centre, relative to that of another one."""
    off_support: float
    """Likelihood under the base model below which a context counts as off its support."""
    base_batch: int = 256
    sigma: float = 0.05
    rate: float = 0.1
    evaluate_every: int = 20


SIZES = {
    "small": Setting(48, 16, 16, base_steps=500, steps=400, batch=512, norm=2.7, rare=3, rarity=0.04, off_support=1e-6),
    "full": Setting(
        128, 32, 32, base_steps=1000, steps=400, batch=1024, norm=2.55, rare=6, rarity=0.018, off_support=1e-12
    ),
}


class Problem:
    """Centres, their correct sequences, and the frozen features."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.generator = torch.Generator().manual_seed(seed)
        n, k, c = setting.length, setting.tokens, setting.centres
        directions = torch.randn(c, c, generator=self.generator)
        self.centres = setting.norm * directions / directions.norm(dim=1, keepdim=True)
        self.answers = torch.randint(k, (c, n), generator=self.generator)
        self.signs = torch.randint(2, (k + 1, c), generator=self.generator).float() * 2 - 1
        self.shares = torch.ones(c)
        self.shares[: setting.rare] = setting.rarity

    def draw(self, size: int, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Contexts (size, d) and their centres (size,), all alike or by shares."""
        weights = torch.ones(self.setting.centres) if shares is None else shares
        which = torch.multinomial(weights, size, replacement=True, generator=self.generator)
        noise = torch.randn(size, self.setting.centres, generator=self.generator) * self.setting.sigma
        return self.centres[which] + noise, which

    def features(self, x: Tensor, y: Tensor) -> Tensor:
        """(N, size, d): the context under the signs of the token before."""
        start = torch.full((len(y), 1), self.setting.tokens)
        return (x[:, None] * self.signs[torch.cat([start, y[:, :-1]], 1)]).transpose(0, 1)

    def sample(self, weights: Tensor, x: Tensor) -> Tensor:
        """(size, N) sequences from the policy."""
        noise = torch.rand(self.setting.length, len(x), self.setting.tokens, generator=self.generator)
        gumbel = -torch.log(-torch.log(noise.clamp(min=1e-20)))
        before = torch.full((len(x),), self.setting.tokens)
        tokens = []
        for i in range(self.setting.length):
            before = ((x * self.signs[before]) @ weights[i].T + gumbel[i]).argmax(1)
            tokens.append(before)
        return torch.stack(tokens, 1)


def log_probs_and_residual(weights: Tensor, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """log p(y_i | x, y_<i) (size, N), and its gradient in the logits, onehot - softmax (N, size, k)."""
    log_softmax = (features @ weights.transpose(1, 2)).log_softmax(-1)
    chosen = y.T.unsqueeze(-1)
    residual = -log_softmax.exp()
    residual.scatter_add_(2, chosen, torch.ones_like(chosen, dtype=residual.dtype))
    return log_softmax.gather(2, chosen)[..., 0].T, residual


def ascent(weights: Tensor, features: Tensor, residual: Tensor, coefficients: Tensor) -> Tensor:
    """Gradient of mean_b sum_i coefficients[b, i] log p(y_i | .), shaped as the weights (N, k, d)."""
    return (residual * coefficients.T.unsqueeze(-1)).transpose(1, 2) @ features / len(coefficients)


def squared_norms(features: Tensor, residual: Tensor) -> Tensor:
    """(size,) |grad log p(y|x)|² in closed form: W_i enters token i alone."""
    return ((residual**2).sum(-1) * (features**2).sum(-1)).sum(0)


class Adagrad:
    """Scales each coordinate of a step by the root of the sum of its squared gradients."""

    def __init__(self, weights: Tensor, rate: float) -> None:
        self.weights, self.rate, self.sum = weights, rate, torch.zeros_like(weights)

    def step(self, gradient: Tensor) -> None:
        self.sum += gradient**2
        self.weights += self.rate * gradient / (self.sum.sqrt() + 1e-10)


def train_base(problem: Problem) -> Tensor:
    """Maximum likelihood on demonstrations."""
    setting = problem.setting
    weights = torch.zeros(setting.length, setting.tokens, setting.centres)
    optimizer = Adagrad(weights, setting.rate)
    for _ in range(setting.base_steps):
        x, which = problem.draw(setting.base_batch, problem.shares)
        y = problem.answers[which]
        features = problem.features(x, y)
        _, residual = log_probs_and_residual(weights, features, y)
        optimizer.step(ascent(weights, features, residual, torch.ones(y.shape)))
    return weights


def rewards(right: Tensor, arm: str) -> Tensor:
    """(size, N) rewards of tokens, +1 or -1, or 1 or 0, from (size, N) whether the prefix up to each is right."""
    found = (right if arm.startswith("process") else right[:, -1:].expand_as(right)).float()
    return found if "0/1" in arm else 2 * found - 1


def train_policy(problem: Problem, base: Tensor, arm: str, test: tuple[Tensor, Tensor]) -> list[dict[str, float]]:
    """One arm of policy gradient from the base model, evaluated on the way."""
    setting = problem.setting
    weights = base.clone()
    optimizer = Adagrad(weights, setting.rate)
    off = likelihoods(problem, base, test).exp() < setting.off_support
    curve = []
    for step in range(setting.steps + 1):
        if step % setting.evaluate_every == 0 or step == setting.steps:
            p = likelihoods(problem, weights, test).exp()
            curve.append({"step": step, "error": float(1 - p.mean()), "off_support": float(p[off].mean())})
        x, which = problem.draw(setting.batch)
        y = problem.sample(weights, x)
        right = (y == problem.answers[which]).cumprod(1)
        reward = rewards(right, arm)
        features = problem.features(x, y)
        _, residual = log_probs_and_residual(weights, features, y)
        if "rate" not in arm:
            optimizer.step(ascent(weights, features, residual, reward))
            continue
        # The rates are for features of unit length: with features scaled down, gradients shrink by the norm and weights
        # grow by it. The constant rate is that of the longest gradient, 1 / (4 + 2 * 2N).
        norms = squared_norms(features, residual) / setting.norm**2
        longest = torch.full_like(norms, 2.0 * setting.length)
        rate = adaptive_rate(norms if "adaptive" in arm else longest) / setting.norm**2
        # Each centre has a step of this rate from the mean over its own part of the batch.
        weights += setting.centres * ascent(weights, features, residual, reward * rate[:, None])
    return curve


def likelihoods(problem: Problem, weights: Tensor, test: tuple[Tensor, Tensor]) -> Tensor:
    """(size,) float64 log-likelihood of the correct sequence."""
    x, which = test
    y = problem.answers[which]
    return log_probs_and_residual(weights, problem.features(x, y), y)[0].double().sum(1)


def run(setting: Setting, seed: int, arms: Sequence[str]) -> dict[str, object]:
    """One seed: a base model and all arms from it."""
    problem = Problem(setting, seed)
    base = train_base(problem)
    test = problem.draw(2000)
    log_q = likelihoods(problem, base, test).numpy()
    result: dict[str, object] = {
        "seed": seed,
        "base_error": float(1 - np.exp(log_q).mean()),
        "off_support_share": float((log_q < math.log(setting.off_support)).mean()),
        "log_quantiles": likelihood_quantile(log_q, np.linspace(0, 1, 21)).tolist(),
    }
    for arm in arms:
        start = time.perf_counter()
        result[arm] = train_policy(problem, base, arm, test)
        last = result[arm][-1]  # type: ignore[index]
        print(
            f"seed {seed}, {arm}: error {result['base_error']:.4f} -> {last['error']:.4f}, likelihood off the base's "
            f"support -> {last['off_support']:.2g}  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    return result


def report(results: Sequence[dict], arms: Sequence[str]) -> str:
    """Mean and range over seeds at the last step."""
    base = [result["base_error"] for result in results]
    lines = [
        f"{len(results)} seeds: mean [least, most]",
        f"base model: error {np.mean(base):.3f} [{min(base):.3f}, {max(base):.3f}]",
    ]
    for arm in arms:
        for name in ("error", "off_support"):
            values = [result[arm][-1][name] for result in results]
            lines.append(f"{arm}: {name} {np.mean(values):.3g} [{min(values):.3g}, {max(values):.3g}]")
    return "\n".join(lines)


def draw(results: Sequence[dict], arms: Sequence[str], path: Path) -> None:
    """Error and likelihood off the base's support against steps: mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("error", "off_support"), strict=True):
        for arm in arms:
            steps = [point["step"] for point in results[0][arm]]
            values = np.array([[point[name] for point in result[arm]] for result in results])
            if name == "off_support":
                values = np.log10(values.clip(1e-300))
            (line,) = axis.plot(steps, values.mean(0), label=arm)
            axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes[0].set(xlabel="step of the policy gradient", ylabel="1 - E p(y*|x)", title="Test error")
    axes[1].set(xlabel="step of the policy gradient", title="log10 of the mean likelihood off the base's support")
    axes[0].legend(title=f"{len(results)} seeds: mean and range")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of the policy gradient")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, default=Path("runs/base_model_barrier"))
    options = parser.parse_args()
    setting = SIZES[options.size]
    if options.steps:
        setting = Setting(**{**asdict(setting), "steps": options.steps})
    options.output.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in range(options.seeds):
        results.append(run(setting, seed, options.arms))
        content = {"setting": asdict(setting), "results": results}
        (options.output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        text = report(results, options.arms)
        (options.output / "report.txt").write_text(text + "\n")
        draw(results, options.arms, options.output / "base_model_barrier.png")
    print(text)


if __name__ == "__main__":
    main()
