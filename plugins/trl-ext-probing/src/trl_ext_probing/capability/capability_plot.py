"""The picture of `capability`: how p is distributed, and where each model stands among the paper's settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trl_ext_probing.capability.continuum import OBSERVED
from trl_ext_probing.capability.positions import Capability
from trl_ext_probing.plots import COLOURS, GREY, MARKERS, figure, save, short_names

FLOOR = 1e-4
"""The smallest p that the axis shows: quantiles are known to this."""


def draw_capability(found: Mapping[str, Capability], path: Path) -> None:
    """Draw the distribution of p on a logarithmic axis, on which weak models do not sit at 0, and the means."""
    whole, (shares, means) = figure(2, size=(11, 4))
    names = short_names(found)
    for i, (name, capability) in enumerate(zip(names, found.values(), strict=True)):
        levels = np.linspace(0, 1, len(capability.quantiles))
        colour = COLOURS[i % len(COLOURS)]
        shares.plot(np.maximum(capability.quantiles, FLOOR), levels, color=colour, label=f"{name}: tokens")
        means_of = np.maximum(capability.example_quantiles, FLOOR)
        shares.plot(means_of, levels, "--", color=colour, label=f"{name}: examples (mean p of each)")
        value, low, high = capability.mean_p.bounds
        bars = [[value - max(low, FLOOR)], [high - value]]
        marker = MARKERS[i % len(MARKERS)]  # small, or it would hide a narrow interval
        means.errorbar([value], [i], xerr=bars, color=colour, marker=marker, markersize=3, linewidth=1, capsize=5)
    shares.set(
        xscale="log",
        xlim=(FLOOR, 1),
        ylim=(0, 1),
        xlabel="p of the response (the smallest and 0 at the left edge)",
        ylabel="share below",
    )
    shares.legend(fontsize=7)
    for region in OBSERVED:
        means.axvspan(region.low, region.high, color=GREY, alpha=0.2, linewidth=0)
        centre = np.sqrt(region.low * region.high)
        means.text(
            centre, 0.02, region.name, transform=means.get_xaxis_transform(), rotation=90, ha="center", fontsize=8
        )
    smallest = min(capability.mean_p.bounds[1] for capability in found.values())
    means.set(
        xscale="log",
        xlim=(min(0.008, max(smallest, FLOOR) / 2), 1),
        ylim=(len(found) - 0.4, -0.6),
        xlabel="mean p of a response token, with interval",
        title="Grey: the settings of arXiv 2510.00526",
    )
    means.set_yticks(range(len(found)), names)
    save(whole, path)
