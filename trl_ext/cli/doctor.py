"""`trl-ext doctor`: what a bug report needs of this machine and its installation, as text or JSON."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

import typer

LIBRARIES = ("trl", "transformers", "torch", "accelerate", "datasets", "safetensors", "pluggy", "typer")
OPTIONAL = {
    "peft": "LoRA (use_peft)",
    "bitsandbytes": "quantised models (load_in_4bit, load_in_8bit)",
    "liger-kernel": "liger kernels (use_liger_kernel)",
    "vllm": "generation by vLLM (use_vllm)",
    "deepspeed": "DeepSpeed, with plugins that leave gradients alone",
    "matplotlib": "plots",
    "torchjd": "weightings of gradients (upgrad, mgda, ...)",
    "tensorboard": "report_to: tensorboard",
    "wandb": "report_to: wandb",
    "trackio": "report_to: trackio",
}


def doctor_command(as_json: bool) -> None:
    """Run `trl-ext doctor`; the exit code is 1 where there is a problem."""
    report = diagnose()
    print(json.dumps(report, indent=2) if as_json else as_text(report))
    if report["problems"]:
        raise typer.Exit(1)


def diagnose() -> dict[str, Any]:
    """Versions, devices, distributions of plugins, what is supported here, and problems, as JSON."""
    from trl_ext.cli.listing import list_plugins

    plugins = list_plugins()
    distributions = {f"{plugin.distribution} {plugin.version}": 0 for plugin in plugins}
    for plugin in plugins:
        distributions[f"{plugin.distribution} {plugin.version}"] += 1
    broken = [f"plugin {plugin}: {plugin.error}" for plugin in plugins if plugin.error]
    return {
        "versions": _versions(),
        "devices": _devices(),
        "plugins": distributions,
        "supported": _supported(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _matters(name)},
        "problems": [*_unmet_requirements(), *broken],
    }


def as_text(report: dict[str, Any]) -> str:
    """The report as text that can be pasted."""
    lines = ["trl-ext doctor"]
    for section, facts in report.items():
        lines += ["", section]
        pairs = facts.items() if isinstance(facts, dict) else [("", fact) for fact in facts]
        lines += [f"  {name}: {value}" if name else f"  {value}" for name, value in pairs] or ["  none"]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    import trl_ext

    own = {"trl-ext": f"{trl_ext.__version__} (plugin API {trl_ext.API_VERSION})"}
    python = {"python": platform.python_version(), "platform": platform.platform()}
    return own | {name: _installed(name) or "not installed" for name in LIBRARIES} | python


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"}
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _supported() -> dict[str, str]:
    import torch
    import torch.distributed as dist

    backends = [name for name in ("gloo", "nccl", "mpi", "xccl") if dist.is_backend_available(name)]
    bf16 = (
        "yes"
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        else "no, for want of a GPU: set use_cpu: true and bf16: false"
    )
    facts = {"bf16": bf16, "several processes": f"{', '.join(backends) or 'no backend'}; DDP and FSDP2"}
    if torch.cuda.device_count() > 1:
        facts["several processes"] += ", one a GPU (--num_processes)"
    for name, what in OPTIONAL.items():
        version = _installed(name)
        facts[what] = f"{name} {version}" if version else f"no: pip install {name}"
    return facts


def _matters(name: str) -> bool:
    return name in ("TRL_EXT_PLUGINS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WORLD_SIZE")


def _unmet_requirements() -> list[str]:
    """Where our distributions ask for other versions than those that are installed."""
    from packaging.requirements import Requirement

    problems = []
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if not name.startswith("trl-ext"):
            continue
        for requirement in map(Requirement, distribution.requires or ()):
            present = _installed(requirement.name)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if present is None or not requirement.specifier.contains(present, prereleases=True):
                problems.append(f"{name} needs {requirement}, and {present or 'none'} is installed")
    return problems


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
