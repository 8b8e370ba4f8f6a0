"""Pictures: the curves are those of the table, and every objective can be drawn."""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from trl_ext_objectives.composite import build_objective
from trl_ext_objectives.eaft import EAFT
from trl_ext_objectives.figures import curves, objective_figure
from trl_ext_objectives.gem import GEM
from trl_ext_objectives.nll import NLL
from trl_ext_objectives.power import Power

from trl_ext.errors import ConfigurationError

PNG = b"\x89PNG"
NAMES = sorted(
    entry.name
    for entry in metadata.entry_points(group="trl_ext")
    if entry.dist is not None and entry.dist.name == "trl-ext-objectives"
)


def test_curves_are_the_tables() -> None:
    p = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    loss, weight = curves(Power(2.0).per_token_loss, p)
    torch.testing.assert_close(loss, (1 - p**2) / 2)
    torch.testing.assert_close(weight, p**2 * (1 - p))
    loss, weight = curves(NLL().per_token_loss, p)
    torch.testing.assert_close(loss, -p.log())
    torch.testing.assert_close(weight, 1 - p)
    _, weight = curves(
        GEM(0.5, "linear").per_token_loss, p, temperature=0.5
    )  # softmax(z / beta): the label's logit is doubled against the 999 others
    tempered = p**2 / (p**2 + (1 - p) ** 2 / 999)
    torch.testing.assert_close(weight, 1 - tempered)


def test_every_objective_has_curves() -> None:
    assert len(NAMES) == 23
    p = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    for name in set(NAMES) - {"asft", "weighted", "wit", "by-column"}:  # these depend on the data
        objective = build_objective("rho1:reference=start" if name == "rho1" else name, "test")
        loss, weight = curves(objective.per_token_loss, p, temperature=objective.head_temperature)
        assert torch.isfinite(loss).all(), name
        assert torch.isfinite(weight).all(), name


def test_paper_gate_is_drawn_from_the_pictures_own_distribution() -> None:
    """Of 1,000 tokens with p = 0.9 on one, the likeliest 20 are that one and 19 of the others."""
    p = torch.tensor([0.9], dtype=torch.float64)
    loss, _ = curves(EAFT().per_token_loss, p)
    top = torch.tensor([0.9, *[0.1 / 999] * 19], dtype=torch.float64)
    top = top / top.sum()
    gate = -(top * top.log()).sum() / math.log(20)
    assert loss.item() == pytest.approx(-gate.item() * math.log(0.9), rel=1e-10)


@pytest.mark.parametrize(
    ("spec", "alphas"),
    [
        ("power:alpha=linear:1:3", (1, 2, 3)),
        ("mixture:first=power:alpha=linear:1:3,second=nll,weight=1", (1, 2, 3)),
        ("power:alpha=2", (2,)),
    ],
)
def test_scheduled_option_is_drawn_at_start_middle_and_end(spec: str, alphas: tuple[int, ...]) -> None:
    objective = build_objective(spec, "test")
    left, right = objective_figure(objective.per_token_loss, repr(objective), moves=objective.moves).axes
    _nll, *drawn = left.get_lines()
    moments = ("at the start", "in the middle", "at the end") if len(alphas) == 3 else ("",)
    assert [line.get_label() for line in drawn] == [f"{objective!r} {moment}".strip() for moment in moments]
    for line, alpha in zip(drawn, alphas, strict=True):
        p = line.get_xdata()
        assert line.get_ydata() == pytest.approx((1 - p**alpha) / alpha)
    assert len(right.get_lines()) == len(left.get_lines())


def test_drawing_a_schedule_draws_more_than_its_start(tmp_path: Path) -> None:
    """What `trl-ext plugins info power:alpha=linear:1:3 --draw FILE` calls."""
    for name, spec in {"moving.png": "power:alpha=linear:1:3", "still.png": "power:alpha=1"}.items():
        build_objective(spec, "test").draw(tmp_path / name)
    moving, still = (image.imread(tmp_path / name) for name in ("moving.png", "still.png"))
    blue, orange, green = ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73))  # the first of Okabe and Ito
    for color, in_still in ((blue, True), (orange, False), (green, False)):
        assert has_color(moving, color)
        assert has_color(still, color) == in_still


def test_what_depends_on_the_data_has_no_curve(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="its loss depends on the data's weight"):
        build_objective("weighted", "test").draw(tmp_path / "picture.png")


def has_color(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((np.abs(255 * picture[..., :3] - color) < 1).all(-1).any())


@pytest.mark.parametrize("name", ["power:alpha=10", "asft"])
def test_picture_is_written(name: str, tmp_path: Path) -> None:
    build_objective(name, "test").draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == PNG
