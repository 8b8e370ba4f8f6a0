"""Releases that were not reviewed: warned of once, refused where that is asked for, with the seams that they move."""

from __future__ import annotations

import json
import logging
from importlib.metadata import version

import moved_seams
import pytest

from trl_ext import seams
from trl_ext.errors import ConfigurationError
from trl_ext.startup import versions
from trl_ext.testing.runs import make_sft

MOVED = f"{seams.HF}._get_grad_norm"


@pytest.fixture
def older(tmp_path, monkeypatch):
    """A record in which transformers was reviewed long ago, and one seam was another one then."""
    record = seams.recorded()
    then = record["transformers"][version("transformers")]
    record["transformers"] = {"5.9.0": {}, "5.10.0": {**then, MOVED: "0" * 16}}
    path = tmp_path / "seams.json"
    path.write_text(json.dumps(record))
    monkeypatch.setattr(seams, "RECORD", path)
    versions._warn_once.cache_clear()


def test_a_release_that_was_not_reviewed_is_warned_of_once_and_named_with_what_moved(older, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        for run in ("a", "b"):
            make_sft(tmp_path / run)
    (text,) = [r.getMessage() for r in caplog.records if "was not reviewed" in r.getMessage()]
    assert f"with transformers {version('transformers')} (but with 5.9.0, 5.10.0)" in text
    assert f"1 changed since 5.10.0: {MOVED}." in text


def test_strict_versions_refuses_it(older, tmp_path):
    with pytest.raises(ConfigurationError, match=r"^strict_versions: .*_get_grad_norm"):
        make_sft(tmp_path, strict_versions=True)


def test_reviewed_releases_pass_without_a_word(tmp_path, caplog):
    assert versions.unreviewed() == []
    with caplog.at_level(logging.WARNING):
        make_sft(tmp_path, strict_versions=True)
    assert "reviewed" not in caplog.text


def test_a_seam_that_is_gone_has_moved(older, monkeypatch):
    gone = "transformers.trainer:Trainer.no_such_method"
    monkeypatch.setitem(seams.READ, gone, "was there once")
    (text,) = versions.unreviewed()
    assert gone in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "before", "after", "moved"),
    [
        # TRL 1.16 is the first whose fused head runs without Triton.
        ("trl", "1.15.0", "1.16.0", {"trl.trainer.utils:add_fused_lm_head"}),
        ("accelerate", "1.14.0", "1.15.0", {"accelerate.commands.launch:launch_command_parser"}),
    ],
)
def test_the_seams_that_a_release_moved_are_shown_with_their_difference(library, before, after, moved):
    """Downloads four wheels."""
    found = moved_seams.differences(library, before, after)
    assert moved <= set(found) < {seam for seam in moved_seams.SEAMS if seams.library(seam) == library}
    for seam in moved:
        assert found[seam].startswith(f"--- {before}\n+++ {after}\n@@")
    assert "in neither release" not in found.values()
