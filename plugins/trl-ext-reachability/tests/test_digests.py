"""A model's files are told apart by what decides its answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from trl_ext_reachability.digests import digest_files


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("model-00002-of-00002.safetensors", True),
        ("generation_config.json", True),
        ("tokenizer.json", True),
        ("chat_template.jinja", True),
        ("README.md", False),
        ("reachability.json", False),
    ],
)
def test_digest_follows_what_decides_the_answers(tmp_path: Path, name: str, matters: bool) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("before")
    before = digest_files(tmp_path)
    assert digest_files(tmp_path) == before
    (tmp_path / name).write_text("after")
    assert (digest_files(tmp_path) != before) == matters


def test_a_hub_id_has_no_files_here() -> None:
    assert digest_files(Path("owner/model")) == digest_files(Path("owner/other"))
