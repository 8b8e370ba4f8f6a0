"""Memory does not follow the size of the checkpoints: peak resident size of the real process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl_ext_averaging.offline import open_checkpoint
from trl_ext_averaging.offline.tensorfile import TensorFileWriter

MIB = 2**20

MEASURED = """
import sys, time
from pathlib import Path
from trl_ext_averaging.offline import average
from trl_ext_averaging.offline.methods import Request

def peak():  # not getrusage: that survives exec, and so may be the parent's
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024

before, start = peak(), time.perf_counter()
method, output, *inputs = sys.argv[1:]
average(Request(method, tuple(map(Path, inputs))).plan(), Path(output))
print(before, peak(), time.perf_counter() - start)
"""


def big_checkpoint(folder: Path, value: float, tensor_mib: int, tensors: int, shards: int) -> Path:
    """A checkpoint of fp32 tensors, written piece by piece; its config is that of no real model."""
    folder.mkdir()
    layout = {f"layer.{i}.weight": (torch.float32, (tensor_mib * 256, 1024)) for i in range(tensors)}
    piece, weight_map = torch.full((MIB,), value), {}
    for shard in range(shards):
        names = list(layout)[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with TensorFileWriter(folder / file, {name: layout[name] for name in names}) as writer:
            for _ in range(len(names) * tensor_mib // 4):
                writer.write(piece)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "none"}))
    return folder


def peaks(method: str, output: Path, inputs: list[Path]) -> tuple[int, int, float]:
    """Bytes resident at most, before and after averaging, and its seconds."""
    command = [sys.executable, "-c", MEASURED, method, str(output), *map(str, inputs)]
    before, after, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(before), int(after), float(seconds)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process from /proc")
@pytest.mark.parametrize("method", ["mean", "slerp"])
def test_one_tensor_larger_than_the_memory_used(tmp_path, method):
    inputs = [big_checkpoint(tmp_path / f"{i}", float(i), tensor_mib=192, tensors=1, shards=1) for i in (1, 3)]
    before, after, _ = peaks(method, tmp_path / "out", inputs)
    assert after - before < 128 * MIB  # pieces of 8 MiB, and what torch loads on first use
    entry = open_checkpoint(tmp_path / "out").entries["layer.0.weight"]
    assert torch.equal(entry.read(10**7, 10**7 + 5), torch.full((5,), 2.0))  # parallel vectors: the line


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process from /proc")
def test_two_gib_in_shards_with_less_than_one_gib_of_memory(tmp_path):
    inputs = [big_checkpoint(tmp_path / f"{i}", float(i), tensor_mib=256, tensors=8, shards=4) for i in (1, 3)]
    assert all(open_checkpoint(path).nbytes == 2 * 2**30 for path in inputs)
    before, after, seconds = peaks("mean", tmp_path / "out", inputs)
    print(f"peak {after / MIB:.0f} MiB, {before / MIB:.0f} MiB of it before; {seconds:.1f} s")
    assert after < 2**30
    for entry in open_checkpoint(tmp_path / "out").entries.values():
        assert torch.equal(entry.read(entry.numel - 3), torch.full((3,), 2.0))
