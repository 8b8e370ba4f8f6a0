"""The noise of the draws: its generator, its distribution, and what it depends on."""

from __future__ import annotations

import math
from operator import attrgetter

import pytest
import torch
from scipy.stats import kstest
from trl_ext_probing.engines.draws import noise_keys, outstanding
from trl_ext_probing.engines.interface import Draw
from trl_ext_probing.engines.noise import gumbel, mix
from trl_ext_probing.ranks import share

from trl_ext.errors import ConfigurationError

GOLDEN = 0x9E3779B97F4A7C15


def test_the_hash_is_splitmix64() -> None:
    """The first outputs with seed 1234567, as the reference implementation in C gives them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = torch.tensor([(1234567 + i * GOLDEN + 2**63) % 2**64 - 2**63 for i in range(4)])
    assert [z % 2**64 for z in mix(states).tolist()] == published


def test_the_noise_has_gumbels_distribution_over_tokens_positions_and_keys() -> None:
    def samples(keys: list[int], positions: list[int], vocab_size: int) -> torch.Tensor:
        return gumbel(torch.tensor(keys), torch.tensor(positions), vocab_size).flatten()

    many = list(range(20_000))
    for noise in (
        samples([7], [0], 20_000),
        samples([7] * len(many), many, 1),
        samples(many, [0] * len(many), 1),
    ):
        assert kstest(noise.numpy(), "gumbel_r").pvalue > 1e-4


def test_improbable_tokens_win_as_often_as_they_should() -> None:
    """P(noise > x) is about exp(-x), and the largest values are fine enough: of 24-bit numbers, about 15 would tie."""
    noise = gumbel(torch.tensor([3]), torch.tensor([0]), 4_000_000)[0]
    expected = math.exp(-8)  # 1,342 of them
    assert (noise > 8).double().mean().item() == pytest.approx(expected, rel=5 / math.sqrt(4_000_000 * expected))
    assert len(noise.topk(100).values.unique()) == 100
    assert noise.isfinite().all()


def test_a_key_depends_on_seed_prompt_and_sample_and_on_no_other_prompt() -> None:
    prompts = ["a", [{"role": "user", "content": "a"}], "b", "a"]
    keys = dict(zip(outstanding(4, 2), noise_keys(prompts, outstanding(4, 2), seed=0), strict=True))
    assert len(set(keys.values())) == 8
    assert noise_keys(["b"], [Draw(0, 1)], seed=0) == [keys[Draw(2, 1)]]
    assert noise_keys(["a", "b", "a"], [Draw(2, 0)], seed=0) == [keys[Draw(3, 0)]]
    assert set(noise_keys(prompts, outstanding(4, 2), seed=1)).isdisjoint(keys.values())


def test_ranks_share_the_prompts_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left = outstanding(5, 2, done={(0, 0), (0, 1), (3, 1)})
    assert share(left, attrgetter("prompt_index")) == left
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(share(left, attrgetter("prompt_index")))
    assert sorted(draw for part in parts for draw in part) == left
    assert [{draw.prompt_index for draw in part} for part in parts] == [{1, 4}, {2}, {3}]


@pytest.mark.parametrize(
    ("draws", "message"),
    [([(0, 0), (0, 0)], "there 2 times"), ([(2, 0)], "no \\(2, 0\\)"), ([(0, 1)], "no \\(0, 1\\)")],
)
def test_wrong_draws_are_refused(draws: list[tuple[int, int]], message: str) -> None:
    from trl_ext_probing.engines.draws import chosen_draws

    with pytest.raises(ConfigurationError, match=message):
        chosen_draws(["a", "b"], 1, draws)
