"""One json and one table of the parts that `benchmarks/gpu.sh` ran, with what each figure is to reach.

    python benchmarks/joined.py OUTPUT.json FOLDER

FOLDER has `<part>.json` of each benchmark that ended, and `<part>.failed` of each that did not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

WITHIN = 1.01  # of an objective that costs nothing, which is what the ratio of two equal arms is known to


class Target(NamedTuple):
    """What one ratio is to reach."""

    part: str
    arm: str
    over: str
    at_most: float


TARGETS = (
    *(Target("core", arm, "plain", WITHIN) for arm in ("no plugins", "power")),
    *(Target("objectives", arm, "plain", WITHIN) for arm in ("nll", "power", "dft", "threshold", "iw-sft, cached")),
    Target("objectives", "asft, start", "plain", 1.25),
    Target("averaging", "+ ema", "plain", 1.01),
    Target("averaging", "+ ema, device: cpu", "plain", 1.05),
    Target("data_regularization", "two streams", "plain + 2 targets", 1.02),
    Target("data_regularization", "half-space", "two batches", 1.02),
    Target("data_regularization", "layer-wise sketched", "plain + target", 1.10),
    Target("mixing", "parallel averaging", "GRPO + SFT", 1.03),
    Target("mixing", "gradient averaging", "GRPO + SFT", 1.03),
)


def join(folder: Path) -> dict[str, Any]:
    """The parts by name, the facts that they share, and which of them failed."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    shared = {key: part.pop(key) for part in parts.values() for key in ("machine", "versions", "commit", "device")}
    failed = {path.stem: path.read_text().strip() for path in sorted(folder.glob("*.failed"))}
    return {**shared, "failed": failed, "reached": [reached(target, parts) for target in TARGETS], "parts": parts}


def reached(target: Target, parts: dict[str, Any]) -> dict[str, Any]:
    """A target, with the ratio that was measured and its 95 % interval; null where there is none."""
    arm = parts.get(target.part, {}).get("arms", {}).get(target.arm, {})
    return {**target._asdict(), "measured": arm.get("ratios", {}).get(target.over)}


def rows(joined: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    lines = ["| part | arm | over | to reach | measured |", "|---|---|---|---|---|"]
    for row in joined["reached"]:
        found = row["measured"]
        text = "not measured" if found is None else "{median:.3f} [{low:.3f}, {high:.3f}]".format(**found)
        lines.append(f"| {row['part']} | {row['arm']} | {row['over']} | {row['at_most']:.2f} | {text} |")
    return lines


def main() -> None:
    output, folder = Path(sys.argv[1]), Path(sys.argv[2])
    joined = join(folder)
    output.write_text(json.dumps(joined, indent=1) + "\n")
    print(
        "\n".join(
            ["", f"{joined.get('machine', 'no part ended')}; commit {joined.get('commit', '')}", "", *rows(joined)]
        )
    )
    if joined["failed"]:
        sys.exit("; ".join(f"{part} {how}" for part, how in joined["failed"].items()))


if __name__ == "__main__":
    main()
