"""A case that measures: what a step costs with the plugin, against one of plain TRL."""

from __future__ import annotations

import time
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode

from trl_ext.testing.conformance.case import case
from trl_ext.testing.conformance.subject import STEPS, Subject


@case()
def cost(subject: Subject, folder: Path) -> str:
    """What a training costs with the plugin, as a ratio to one without it; reported and not asserted.

    The floating-point operations of matrix products are counted, which is what large models spend their time on and
    does not depend on the machine. Seconds on a tiny model are mostly overhead, and shown beside it.
    """
    (operations, seconds), (plain_operations, plain_seconds) = (
        _spent(subject, folder / f"run{plain}", plain) for plain in (False, True)
    )
    return f"{operations / plain_operations:.2f}x operations, {seconds / plain_seconds:.1f}x seconds (tiny model)"


def _spent(subject: Subject, folder: Path, plain: bool) -> tuple[int, float]:
    """Floating-point operations and seconds of a training."""
    trainer = subject.build(folder, plain=plain, max_steps=STEPS)
    counter = FlopCounterMode(display=False)
    start = time.perf_counter()
    with counter:
        trainer.train()
    return counter.get_total_flops(), time.perf_counter() - start
