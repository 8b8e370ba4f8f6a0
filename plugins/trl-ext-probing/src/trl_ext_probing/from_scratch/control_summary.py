"""Scores, shares and gaps of the control at every point, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from trl_ext_probing.from_scratch.conclusions import conclude
from trl_ext_probing.from_scratch.procedure import Procedure
from trl_ext_probing.intervals import Estimate, seed_difference, share


def summarize(procedure: Procedure) -> dict[str, Any]:
    """Scores, shares and gaps at every point. null stands for what is undefined or infinite."""
    run = procedure.run
    runs = {arm: [procedure.measured[arm, procedure.chosen[arm], seed] for seed in run.seeds] for arm in run.arms}
    points = [
        _point(procedure, {arm: [of[i] for of in runs[arm]] for arm in runs}) for i in range(len(runs["scratch"][0]))
    ]
    last = points[-1]["share"]
    return {
        "model": procedure.base.path,
        "seeds": list(run.seeds),
        "arms": {arm: _arm(procedure, arm) for arm in run.arms},
        "sets": {name: _set(procedure, name) for name in procedure.sets},
        "points": points,
        "conclusion": conclude({name: Estimate(**last[name]["scratch"]) for name in procedure.sets}),
    }


def _arm(procedure: Procedure, arm: str) -> dict[str, Any]:
    rates = procedure.run.rates
    chosen = procedure.chosen[arm]
    nlls = {rate: procedure.search_nll(arm, rate) for rate in rates} if len(rates) > 1 else {}
    return {
        "learning_rate": chosen,
        "search": [{"learning_rate": r, "nll": nll if np.isfinite(nll) else None} for r, nll in nlls.items()],
        "at_the_edge": len(rates) > 1 and chosen in (rates[0], rates[-1]),
    }


def _set(procedure: Procedure, name: str) -> dict[str, Any]:
    floor, found = procedure.floors[name], procedure.contaminated[name]
    return {
        "samples": len(procedure.sets[name]),
        "floor": float(np.mean(floor.scores)),
        "floor_is": floor.about,
        "contaminated": len(found),
        "contaminated_rows": list(found),
    }


def _point(procedure: Procedure, lines: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One point, from the lines of every arm's seeds."""
    point: dict[str, Any] = {
        "step": lines["scratch"][0]["step"],
        "tokens": float(np.mean([line["tokens"] for line in lines["scratch"]])),
    }
    point |= {key: {} for key in ("score", "nll", "share", "share_uncontaminated", "nll_gap")}
    confidence = procedure.settings.confidence
    for name, rows in procedure.sets.items():
        clean = np.ones(len(rows), dtype=bool)
        clean[list(procedure.contaminated[name])] = False
        floor = np.array(procedure.floors[name].scores)
        scores = {arm: np.array([line["sets"][name]["scores"] for line in of]) for arm, of in lines.items()}
        nll = {arm: [line["sets"][name]["nll"] for line in of] for arm, of in lines.items()}
        point["score"][name] = {arm: of.mean(1).tolist() for arm, of in scores.items()}
        point["nll"][name] = nll
        for key, chosen in (("share", slice(None)), ("share_uncontaminated", clean)):
            point[key][name] = {
                arm: _share(of[:, chosen], scores["pretrained"][:, chosen], floor[chosen], confidence)
                for arm, of in scores.items()
                if arm != "pretrained"
            }
        point["nll_gap"][name] = {
            arm: asdict(seed_difference(of, nll["pretrained"], confidence))
            for arm, of in nll.items()
            if arm != "pretrained" and None not in [*of, *nll["pretrained"]]
        }
    return point


def _share(control: np.ndarray, pretrained: np.ndarray, floor: np.ndarray, confidence: float) -> dict[str, Any]:
    if floor.size == 0:
        return asdict(Estimate(None, None, None, 0, "no sample is left"))
    return asdict(share(control.mean(1).tolist(), pretrained.mean(1).tolist(), float(floor.mean()), confidence))
