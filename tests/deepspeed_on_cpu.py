"""DeepSpeed's ZeRO on CPU ranks, through TRL and accelerate, for tests.

accelerate 1.15 takes ranks for DeepSpeed's only where they have an accelerator: on the CPU its state says one process.
DeepSpeed itself runs ZeRO there, with gloo. So `run_on_cpu` tells accelerate's state what it would say on GPUs, in a
rank's own process (`trl_ext.testing.ranks`), before anything is built.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import transformers.training_args
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def run_on_cpu() -> None:
    """Let this process, one of several ranks, be a rank of DeepSpeed's on the CPU."""
    os.environ.update(DS_ACCELERATOR="cpu")
    # "Several processes on the CPU" sets ranks and device; `ACCELERATE_USE_DEEPSPEED`, which transformers sets while
    # it builds the state, then makes it DeepSpeed's, as on GPUs.
    PartialState._prepare_backend = lambda self, *settings: ("gloo", DistributedType.MULTI_CPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # it asks for a GPU without `use_cpu`
    from deepspeed.comm import torch as backend  # only here: the ordinary environment has no DeepSpeed

    backend.build_shm_op = lambda: None  # a faster all-reduce, which it would compile for minutes


def zero(stage: int, more: Mapping[str, Any] | None = None, **zero_optimization: Any) -> dict[str, Any]:
    """Settings of a run with ZeRO of this stage, for `make_sft` and `make_grpo`; `more` goes into DeepSpeed's."""
    config = {
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            # Small, so that a tiny model has whole ("persistent") and cut parameters.
            "stage3_param_persistence_threshold": 64,
            **zero_optimization,
        },
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        **(more or {}),
    }
    return {"deepspeed": config, "use_cpu": False}
