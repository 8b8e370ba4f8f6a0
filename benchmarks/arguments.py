"""What the benchmarks that train take from the command line, and what they write down beside their figures."""

from __future__ import annotations

import argparse
import json
import subprocess
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from measure import hardware, one_thread
from torch import nn
from transformers import logging
from transformers.utils.logging import disable_progress_bar

Shape = dict[str, Any]


def parser(doc: str | None, shapes: Mapping[str, Shape], steps: int, arms: Iterable[str]) -> argparse.ArgumentParser:
    """The options of all of them.

    Args:
        doc: the script's docstring.
        shapes: name to shape, for `cpu`, `cuda` and `tiny`.
        steps: of each arm, unless the caller says otherwise.
        arms: their names.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--size", choices=list(shapes), help="the device's own; `tiny` is to try the script")
    made.add_argument("--steps", type=int, default=steps, help="of each arm, in turn; the first two do not count")
    made.add_argument(
        "--only", nargs="+", metavar="ARM", choices=list(arms), help="beside what others are compared with"
    )
    made.add_argument("--no-memory", action="store_true", help="times only")
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    made.add_argument("--measure-memory", choices=list(arms), help=argparse.SUPPRESS)
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, in a process that is quiet and on CPU has one thread."""
    options = made.parse_args()
    options.size = options.size or options.device
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    disable_progress_bar()
    disable_progress_bars()
    one_thread(options.device)
    return options


def again(options: argparse.Namespace) -> list[str]:
    """The options that a script is started with once more for the memory of one arm."""
    return ["--device", options.device, "--size", options.size]


def parameters(make: Callable[[], nn.Module]) -> int:
    """How many a model has."""
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def fitting(shape: Shape, halve: str, need: Callable[[Shape], float], device: str) -> Shape:
    """The shape, on a GPU with one entry halved until what it needs is in the device's memory.

    Args:
        shape: the largest wanted.
        halve: the entry.
        need: bytes that all arms of a shape take at most.
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        memory = 0.85 * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        while need(shape) > memory and shape[halve] > 1:
            shape = {**shape, halve: shape[halve] // 2}
    return shape


def trained(count: int, arms: int) -> float:
    """Bytes of the weights and moments of so many models in fp32, and of one's gradients."""
    return count * (12.0 * arms + 8)


def report(options: argparse.Namespace, shape: Shape, arms: Mapping[str, Any], **more: Any) -> None:
    """Write the figures of a run to the file that it was asked for."""
    if options.json:
        facts = {"machine": hardware(options.device), "versions": versions(), "commit": commit()}
        asked = {"device": options.device, "size": options.size, "steps": options.steps, "shape": shape}
        options.json.write_text(json.dumps({**facts, **asked, **more, "arms": arms}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {name: version(name) for name in ("torch", "trl", "transformers", "accelerate", "trl-ext")}


def commit() -> str:
    """The checkout's, with a plus sign where files have changed since; empty where there is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True).stdout

    return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "")
