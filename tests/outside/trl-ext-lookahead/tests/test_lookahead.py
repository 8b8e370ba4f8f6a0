"""An optimiser wrapper with a diagnostic, as an outside author would test it."""

import pytest
import torch
from trl_ext_lookahead import Lookahead, LookaheadOptimizer

from trl_ext.testing.conformance import conformance
from trl_ext.testing.runs import make_sft

test_lookahead = pytest.mark.slow(conformance(Lookahead(k=2), trainer="sft"))


def test_a_picture_of_the_distances_is_logged_at_the_end(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_sft(tmp_path / "run", plugins=[Lookahead(k=2)], max_steps=3, report_to="tensorboard")
    trainer.train()
    (picture,) = EventAccumulator(str(tmp_path / "board")).Reload().Images("lookahead/distances")
    assert (picture.step, picture.height) == (3, 64)
    assert picture.width == 8 * len(list(trainer.model.parameters()))


def test_every_second_step_goes_half_of_the_way_back():
    """By hand: gradients of 1 at a rate of 1, from 0."""
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = LookaheadOptimizer(torch.optim.SGD([weight], lr=1.0), k=2, alpha=0.5)
    seen = []
    for _ in range(4):
        weight.grad = -torch.ones(())
        optimizer.step()
        seen.append(float(weight))
    assert seen == [1.0, 1.0, 2.0, 2.0]
