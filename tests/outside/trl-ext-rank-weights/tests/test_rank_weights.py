"""An objective with ranks from the head, as an outside author would test it."""

import pytest
import torch
from trl_ext_rank_weights import RankWeights

from trl_ext.testing.conformance import conformance


def by_full_logits(logits, labels):
    own = logits.gather(1, labels[:, None])
    rank = (logits.detach() > own.detach()).sum(1)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (1.0 + rank) ** -0.5 * nll


test_rank_weights = pytest.mark.slow(conformance(RankWeights(0.5), trainer="sft", formula=by_full_logits))
