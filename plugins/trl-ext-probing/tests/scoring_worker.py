"""One of several processes that score examples together: checks its part, and that all have the scores of a whole."""

from __future__ import annotations

import torch
from trl_ext_probing.encoding import Encoded
from trl_ext_probing.ranks import from_first, is_first, rank
from trl_ext_probing.scoring import Scorer

from trl_ext.testing import tiny_llama

scorer = Scorer(tiny_llama(hidden=16))
examples = [Encoded([1 + i, 2, 3, 4][: 2 + i % 3], 1) for i in range(7)]
expected = scorer.score(examples)
read: list[int] = []
scorer._model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(len(inputs[0])))
found = scorer.score_shared(examples)
assert sum(read) == (4, 3)[rank()], f"process {rank()} has read {sum(read)} of 7 examples"
for one, other in zip(found, expected, strict=True):
    # Other batches: another order of sums in a matrix product, in float32.
    torch.testing.assert_close(torch.from_numpy(one.log_probs), torch.from_numpy(other.log_probs), rtol=1e-5, atol=1e-6)
    assert one.hits == other.hits
made: list[int] = []
assert from_first(lambda: made.append(1) or 7) == 7
assert len(made) == is_first()
print(f"process {rank()} is content")
