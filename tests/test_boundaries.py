"""The import contracts of pyproject.toml, which `make lint` holds, speak of every distribution that there is."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = {path.name for path in ROOT.glob("plugins/*/src/*") if path.joinpath("__init__.py").is_file()}
METHODS = DISTRIBUTIONS - {"trl_ext_probing"}
"""Those that bring methods; they may measure with the library for it, which knows none of them."""
LINTER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
CONTRACTS = {contract["id"]: contract for contract in LINTER["contracts"]}


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (LINTER["root_packages"], {"trl_ext", *DISTRIBUTIONS}),
        (CONTRACTS["circles"]["ancestors"], {"trl_ext", *DISTRIBUTIONS}),
        (CONTRACTS["distributions"]["modules"], METHODS),
        (CONTRACTS["probing"]["forbidden_modules"], METHODS),
    ],
    ids=["analysed", "circles", "independent", "probing"],
)
def test_every_distribution_is_under_contract(listed, expected):
    assert set(listed) == expected
    assert len(DISTRIBUTIONS) >= 6


def test_imports_for_type_checkers_count():
    assert LINTER["exclude_type_checking_imports"] is False
