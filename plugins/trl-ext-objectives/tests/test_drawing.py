"""Pictures: the curves are those of the table, and every objective can be drawn."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch
from trl_ext_objectives.capability import Tally
from trl_ext_objectives.drawing import curves, draw_capability
from trl_ext_objectives.gem import GEM
from trl_ext_objectives.mixture import build_objective
from trl_ext_objectives.nll import NLL
from trl_ext_objectives.power import Power

PNG = b"\x89PNG"
NAMES = sorted(
    entry.name
    for entry in metadata.entry_points(group="trl_ext")
    if entry.dist is not None and entry.dist.name == "trl-ext-objectives"
)


def test_curves_are_the_tables() -> None:
    p = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    loss, weight = curves(Power(2.0), p)
    torch.testing.assert_close(loss, (1 - p**2) / 2)
    torch.testing.assert_close(weight, p**2 * (1 - p))
    loss, weight = curves(NLL(), p)
    torch.testing.assert_close(loss, -p.log())
    torch.testing.assert_close(weight, 1 - p)
    _, weight = curves(GEM(0.5), p)  # softmax(z / beta): the label's logit is doubled against the 999 others
    tempered = p**2 / (p**2 + (1 - p) ** 2 / 999)
    torch.testing.assert_close(weight, 1 - tempered)


def test_every_objective_has_curves() -> None:
    assert len(NAMES) == 20
    p = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    for name in set(NAMES) - {"asft"}:
        loss, weight = curves(build_objective("rho1:reference=start" if name == "rho1" else name, "test"), p)
        assert torch.isfinite(loss).all(), name
        assert torch.isfinite(weight).all(), name


@pytest.mark.parametrize("name", ["power:alpha=10", "asft"])
def test_picture_is_written(name: str, tmp_path: Path) -> None:
    build_objective(name, "test").draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == PNG


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_says_where_it_comes_from(name: str) -> None:
    (entry,) = metadata.entry_points(group="trl_ext", name=name)
    objective = entry.load()
    assert "arXiv" in objective.citation
    assert objective.__doc__
    assert not objective.__doc__.startswith(f"{objective.__name__}(")  # a dataclass's own makeshift


def test_capability_is_drawn_the_same_each_time(tmp_path: Path) -> None:
    tally = Tally()
    counts = torch.ones(10_000, dtype=torch.int64).numpy()
    tokens = torch.full((10,), 1000.0).numpy()
    tally.add(counts, tokens, tokens / 2, tokens)
    capability = tally.summarize({"model": "m", "dataset": "d"})
    for name in ("a.png", "b.png"):
        draw_capability(capability, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert capability.quantile(0.25) == pytest.approx(0.25, abs=1e-4)
    assert capability.share_above == pytest.approx(0.45)
