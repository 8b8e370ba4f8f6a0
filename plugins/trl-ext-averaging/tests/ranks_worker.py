"""On two ranks: whole runs under DDP and FSDP2, against the EMA of the recorded raw weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from tiny_runs import Recorder, trainer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

DECAY = 0.8


def gathered(run) -> dict[str, torch.Tensor]:
    """The raw weights of the model, whole, from the shards of the moment."""
    weights = run.ext_weights
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().double()
        for name, p in zip(weights.names, weights.parameters, strict=True)
    }


def main(sharding: str, root: Path) -> None:
    rank = dist.get_rank()
    if rank == 0:
        save_model(tiny_llama(hidden=16), tiny_tokenizer(), root / "start")
    dist.barrier()
    config = {"distributed_config": DistributedConfig(fsdp_size=2)} if sharding != "ddp" else {}
    model = AutoModelForCausalLM.from_pretrained(root / "start", **config)
    output, recorder = root / "run", Recorder()
    run = trainer(
        output, [f"ema:decay={DECAY},compare=true"], recorder=recorder, model=model, eval_strategy="steps", eval_steps=2
    )
    run.train()
    run.evaluate()
    if sharding == "fsdp2-accelerate":
        # accelerate wraps models on GPUs only. Its way to save is taken here all the same, on shards made otherwise.
        run.is_fsdp_enabled = True
        run.accelerator.state.distributed_type = DistributedType.FSDP
        run.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        assert "SHARDED_STATE_DICT" in str(run.accelerator.state.fsdp_plugin.state_dict_type)
    run.save_model()
    if sharding == "fsdp2-accelerate":
        assert "SHARDED_STATE_DICT" in str(run.accelerator.state.fsdp_plugin.state_dict_type)
    raw = gathered(run)
    assert run.ext_weights.sharded == (sharding != "ddp")
    assert {"eval_loss", "eval_raw_loss"} <= run.state.log_history[-1].keys() | run.state.log_history[-2].keys()

    # What the shards of this rank went through gives the shards of the average.
    expected = {}
    for name, parameter in zip(run.ext_weights.names, run.ext_weights.parameters, strict=True):
        trajectory = recorder.path(name)
        average = trajectory[0]
        for theta in trajectory[1:]:
            average = DECAY * average + (1 - DECAY) * theta
        if isinstance(parameter, DTensor):
            shard = DTensor.from_local(
                average, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
            average = shard.full_tensor()
        expected[name] = average
    dist.barrier()
    final, beside = load_file(output / "model.safetensors"), load_file(output / "raw/model.safetensors")
    for name, average in expected.items():
        torch.testing.assert_close(final[name].double(), average, rtol=1e-5, atol=1e-6)  # fp32 against fp64
        assert torch.equal(beside[name].double(), raw[name])
        assert not torch.allclose(raw[name], average, atol=1e-4) or "norm" in name
    # Every rank has the same raw weights afterwards.
    for name in raw:
        other = [torch.empty_like(raw[name]) for _ in range(2)]
        dist.all_gather(other, raw[name].contiguous())
        assert torch.equal(*other), name
