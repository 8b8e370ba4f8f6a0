"""Whether a run samples as the probe did: success rates, and with them routes, are those of one way of sampling."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


def refuse_other_sampling(probed: Mapping[str, Any], probe: str, args: Any) -> None:
    """Refuse a training whose success rates are not those that the probe found; warn where they are lower bounds.

    Args:
        probed: The probe's settings.
        probe: Its folder, for messages.
        args: The trainer's config.

    Raises:
        ValueError: Names the setting.
    """
    groups = probed["num_generations"]
    if args.num_generations != groups:
        raise ValueError(
            f"the probe in {probe} is for num_generations={groups}, this run has {args.num_generations}; "
            "routes depend on it: probe again, or set num_generations to the probe's"
        )
    for name in ("temperature", "top_p", "top_k"):
        given = getattr(args, name)
        if max(given or 0, 0) != max(probed[name] or 0, 0):  # top_k: None, 0 and -1 are one
            raise ValueError(
                f"the probe in {probe} sampled with {name}={probed[name]}, this run has {given}; success "
                f"rates depend on it: probe again, or set {name} to the probe's"
            )
    _compare_lengths(probed["max_completion_length"], probe, args.max_completion_length)


def _compare_lengths(probed: int, probe: str, given: int | None) -> None:
    if given is not None and given < probed:
        raise ValueError(
            f"the probe in {probe} had max_completion_length={probed}, this run has {given}, which cuts off "
            "what the probe found: probe again, or set max_completion_length to the probe's"
        )
    if given != probed:
        logger.warning(
            "reachability: the probe in %s had max_completion_length=%s, this run has %s; longer completions may "
            "succeed more often than the probe found",
            probe,
            probed,
            given,
        )
