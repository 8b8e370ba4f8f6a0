"""The gallery of plugins says what the plugins say, and takes those of others."""

import sys
from pathlib import Path

import pytest
import yaml

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def gallery(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import gallery

    yield gallery
    for module in ("gallery", "conformance", "generated"):
        sys.modules.pop(module, None)


def test_the_gallery_is_up_to_date(gallery):
    assert gallery.PAGE.read_text() == gallery.page(), "run `python docs/gallery.py`"


def test_the_entry_that_the_page_shows_becomes_a_row(gallery, tmp_path, monkeypatch):
    _, _, shown = gallery.page().partition("```{code-block} yaml\n")
    (tmp_path / "third_party.yaml").write_text(shown.partition("```")[0])
    monkeypatch.setattr(gallery, "THIRD_PARTY", tmp_path / "third_party.yaml")
    row = next(line for line in gallery.page().splitlines() if line.startswith("| `my-loss`"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("`my-loss`", "objective", "Weighs tokens by their probability."),
        *("[1708.02002](https://arxiv.org/abs/1708.02002)", "SFT", "none that can be measured", "", "SFT 20 of 20"),
        "[trl-ext-my-loss](https://pypi.org/project/trl-ext-my-loss)",
    ]


def test_the_record_of_the_kit_is_of_plugins_that_there_are_and_of_no_failure(gallery):
    import conformance

    recorded = conformance.read()
    assert set(recorded) <= set(gallery.plugins())
    assert not [name for name, results in recorded.items() for found in results.values() if "FAILED" in found]


def test_a_row_counts_cases(gallery):
    from conformance import in_words, summary

    outcomes = [
        ("sft", "resume", "passed", ""),
        ("sft", "packing", "unsupported", "It packs."),
        ("grpo", "fsdp2", "skipped", "No."),
    ]
    results = summary(outcomes)
    assert results["sft"] == {"passed": 1, "unsupported": {"packing": "It packs."}}
    assert in_words(results) == "SFT 1 of 2, GRPO 0 of 1"


def test_the_list_of_others_is_yaml_with_what_a_row_needs(gallery):
    for plugin in yaml.safe_load(gallery.THIRD_PARTY.read_text()) or ():
        assert {"name", "kind", "summary", "distribution", "url"} <= set(plugin)


def test_the_page_of_compatibility_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import compatibility

    assert compatibility.PAGE.read_text() == compatibility.page(), "run `python docs/compatibility.py`"


def test_a_session_s_row_counts_what_pytest_reports(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(DOCS)
    import compatibility

    def report(name, *cases):
        path = tmp_path / f"{name}.xml"
        opening = f'<testsuites><testsuite tests="{len(cases)}" skipped="{sum("skipped" in case for case in cases)}">'
        path.write_text(f"{opening}{''.join(cases)}</testsuite></testsuites>")
        return path

    case = '<testcase classname="{}" name="{}">{}</testcase>'.format
    fails, errs = case("tests.test_a", "x[1]", "<failure/>"), case("tests.test_b.TestKit", "y", "<error/>")
    whole = report("whole", fails, errs, case("tests.test_c", "z", ""), case("tests.test_c", "w", "<skipped/>"))
    assert compatibility.outcome(whole) == {
        "passed": 1,
        "skipped": 1,
        "failed": ["TestKit::y", "test_a::x[1]"],
        "passed alone": [],
    }
    assert compatibility.node_ids(whole) == ["tests/test_a.py::x[1]", "tests/test_b.py::TestKit::y"]
    alone = report("alone", case("tests.test_a", "x[1]", ""), errs)
    assert compatibility.outcome(whole, alone) == {
        "passed": 2,
        "skipped": 1,
        "failed": ["TestKit::y"],
        "passed alone": ["test_a::x[1]"],
    }
