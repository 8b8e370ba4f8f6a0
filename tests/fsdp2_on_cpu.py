"""accelerate's FSDP2 on CPU ranks, for tests.

accelerate 1.15 takes ranks for FSDP's only where they have an accelerator: on the CPU its state says several processes.
torch itself shards there, with gloo. So `run_on_cpu` lets accelerate's state say what it would say on GPUs, in a rank's
own process (`trl_ext.testing.ranks`), before anything is built. All else is accelerate's and transformers' own code.
"""

from __future__ import annotations

import functools
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def run_on_cpu() -> None:
    """Let this process, one of several ranks, be a rank of FSDP2 on the CPU where a run asks for FSDP."""
    build = AcceleratorState.__init__

    @functools.wraps(build)
    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        build(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is None or self.distributed_type is not DistributedType.MULTI_CPU:
            return
        # What `AcceleratorState.__init__` does where the type is MULTI_GPU.
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def fsdp2(**fsdp_config: Any) -> dict[str, Any]:
    """Settings of a run whose model accelerate shards, for `make_sft` and others."""
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {"fsdp": True, "fsdp_config": {"version": 2, **wrap, **fsdp_config}}
