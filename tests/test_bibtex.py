"""Citations as BibTeX, against entries written by hand."""

import re
from importlib import metadata

import pytest

from trl_ext.cli.bibtex import bibtex

WITH_AUTHORS = """\
@misc{data-regularization,
  author = {Hu and Liu and Mao and Ma},
  title = {Dr. Post-Training},
  year = {2026},
  eprint = {2605.07063},
  archivePrefix = {arXiv},
}"""
TWO_WORKS = """\
@misc{focal,
  title = {Focal Loss for Dense Object Detection},
  year = {2017},
  eprint = {1708.02002},
  archivePrefix = {arXiv},
}

@misc{focal-2,
  year = {2025},
  eprint = {2510.00526},
  archivePrefix = {arXiv},
}"""
BEFORE_ARXIV = """\
@misc{ema,
  author = {Polyak and Juditsky},
  title = {Acceleration of stochastic approximation by averaging},
  year = {1992},
}"""
AND_OTHERS = """\
@misc{hpt,
  author = {Lv and others},
  title = {Towards a Unified View (HPT)},
  year = {2025},
  eprint = {2509.04419},
  archivePrefix = {arXiv},
}"""


@pytest.mark.parametrize(
    ("name", "citation", "expected"),
    [
        ("data-regularization", "Hu, Liu, Mao and Ma, Dr. Post-Training, arXiv:2605.07063 (IIF)", WITH_AUTHORS),
        (
            "focal",
            "Focal Loss for Dense Object Detection, arXiv 1708.02002; baseline of arXiv 2510.00526",
            TWO_WORKS,
        ),
        ("ema", "Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992", BEFORE_ARXIV),
        ("hpt", "Lv et al., Towards a Unified View (HPT), arXiv:2509.04419", AND_OTHERS),
    ],
)
def test_entries(name: str, citation: str, expected: str) -> None:
    assert bibtex(name, citation) == expected


def test_every_installed_citation_gives_a_year_and_names_its_paper() -> None:
    for point in metadata.entry_points(group="trl_ext"):
        citation = point.load().citation
        entries = bibtex(point.name, citation)
        assert "year = {" in entries
        for paper in re.findall(r"\d{4}\.\d{5}", citation):
            assert f"eprint = {{{paper}}}" in entries
