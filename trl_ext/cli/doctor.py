"""`trl-ext doctor`: what a bug report needs of this machine and its installation, as text or JSON."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from importlib import metadata
from typing import Any

import typer

from trl_ext.plugins.discovery import Installation, installed_version

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
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WORLD_SIZE")
"""What of the environment matters, beside the plugins that it names."""


def doctor_command(as_json: bool) -> None:
    """Run `trl-ext doctor`; the exit code is 1 where there is a problem."""
    report = diagnose()
    print(json.dumps(report, indent=2) if as_json else as_text(report))
    if report["problems"]:
        raise typer.Exit(1)


def diagnose() -> dict[str, Any]:
    """Versions, devices, distributions of plugins, what is supported here, and problems, as JSON."""
    from trl_ext.cli.listing import list_plugins

    installed = Installation()
    ours = [found for found in metadata.distributions() if (found.metadata["Name"] or "").startswith("trl-ext")]
    unmet = [f"{found.metadata['Name']}: {what}" for found in ours for what in installed.unmet_requirements(found)]
    named, problem = _plugins_of_environment()
    plugins = list_plugins()
    broken = [f"plugin {plugin}: {plugin.error}" for plugin in plugins if plugin.error]
    return {
        "versions": _versions(),
        "devices": _devices(),
        "plugins": Counter(f"{plugin.distribution} {plugin.version}" for plugin in plugins),
        "supported": _supported(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ} | named,
        "problems": [*unmet, *broken, *problem],
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
    return own | {name: installed_version(name) or "not installed" for name in LIBRARIES} | python


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
        version = installed_version(name)
        facts[what] = f"{name} {version}" if version else f"no: pip install {name}"
    return facts


def _plugins_of_environment() -> tuple[dict[str, str], list[str]]:
    """The plugins that the environment names, secrets masked as each plugin declares them; and why there are none."""
    from trl_ext.errors import ConfigurationError
    from trl_ext.plugins.activation import from_spec
    from trl_ext.specs import PLUGINS_VARIABLE, parse_specs

    if PLUGINS_VARIABLE not in os.environ:
        return {}, []
    try:
        specs = parse_specs(os.environ[PLUGINS_VARIABLE])
        shown = [{**spec, **{k: v for k, v in from_spec(spec).options.items() if k in spec}} for spec in specs]
    except ConfigurationError:  # its message may quote the text
        return {PLUGINS_VARIABLE: "..."}, [
            f"{PLUGINS_VARIABLE} cannot be activated; a run without plugins of its own says why"
        ]
    return {PLUGINS_VARIABLE: json.dumps(shown)}, []
