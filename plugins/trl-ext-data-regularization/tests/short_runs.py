"""Short SFT runs on a tiny model, with and without the plugin."""

import copy
import tempfile
from typing import Any

import torch
import trl
from torch.distributed.tensor import DTensor
from trl_ext_data_regularization.data_regularization import DataRegularization  # noqa: F401

import trl_ext
from trl_ext.testing import Addition, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
GENERAL = Addition(digits=2).dataset(48, seed=1)
TARGET = Addition(digits=2).dataset(
    6, seed=2
)  # shares tokens with the general data, or embedding scores would tie at 0


def model(**options: Any):
    options = {"hidden": 16, "layers": 2} | options
    return tiny_llama(len(TOKENIZER), **options)


def arguments(cls: type, **options: Any):
    defaults = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "activation_checkpointing": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_grad_norm": 0.0,  # clipping would hide a wrong scale
    }
    return cls(**{**defaults, **options})


def train(
    plugin: Any = None,
    net: Any = None,
    streams: Any = None,
    data: Any = None,
    peft_config: Any = None,
    resume: str | None = None,
    beside: Any = (),
    **options: Any,
):
    """Train and give the trainer; plain TRL without a plugin."""
    net = model() if net is None else net
    sharded = any(isinstance(p, DTensor) for p in net.parameters())
    net = net if sharded else copy.deepcopy(net)
    common = {"train_dataset": data or GENERAL, "processing_class": TOKENIZER, "peft_config": peft_config}
    torch.manual_seed(0)
    if plugin is None:
        trainer = trl.SFTTrainer(net, args=arguments(trl.SFTConfig, **options), **common)
    else:
        if streams is None:
            streams = {"target": TARGET} if plugin.general == "train" else {"general": GENERAL}
        args = arguments(trl_ext.SFTConfig, **options)
        trainer = trl_ext.SFTTrainer(net, args=args, plugins=[plugin, *beside], streams=streams, **common)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer) -> dict[str, torch.Tensor]:
    named = ((name, p.detach()) for name, p in trainer.model.named_parameters() if p.requires_grad)
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in named}


def differences(a, b) -> float:
    mine, theirs = parameters(a), parameters(b)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)
