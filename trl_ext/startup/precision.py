"""In what number format a run computes, as its settings say before the model loads."""

from __future__ import annotations

import os
from typing import Any

from trl_ext.startup.sharding import distributed_config_of


def low_precision_settings(args: Any, model: Any) -> tuple[str, ...]:
    """What to set for passes that compute in the weights' own format; empty where they do so already.

    The config may ask for less, accelerate's launcher, whom a False of the config does not overrule, and transformers'
    sharding.
    """
    settings = [f"{name}=False" for name in ("fp16", "bf16") if getattr(args, name)]
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher != "no":
        settings.append(f"mixed_precision of accelerate's launcher to 'no' (it is '{launcher}')")
    distributed = distributed_config_of(args, model)
    if distributed is not None and distributed.dp_size > 1 and distributed.fsdp_mixed_precision:
        settings.append("fsdp_mixed_precision=False")
    return tuple(settings)
