"""The demo, small: it runs, its numbers are those of the models it leaves, and they repeat."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("matplotlib", reason="the demo draws its plot with matplotlib")
pytest.importorskip("trl_ext_objectives", reason="the demo uses the plugin power")
pytest.importorskip("trl_ext_averaging", reason="the demo uses the plugin ema")

import trl_ext.demo
from trl_ext.demo.settings import RUNS, Settings
from trl_ext.errors import ConfigurationError
from trl_ext.testing import ModularChain, exact_match

SMALL = Settings(
    seeds=2,
    chain_steps=1,
    hidden=32,
    base_rows=512,
    base_steps=60,
    base_batch_size=64,
    base_learning_rate=1e-2,
    demonstrations=16,
    epochs=2,
    batch_size=8,
    eval_steps=2,
    held_out=15,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_ext.demo, "QUICK", SMALL)
        return folder, trl_ext.demo.main(folder, quick=True)


def test_scores_are_those_of_the_saved_models(demo: tuple[Path, dict]) -> None:
    folder, results = demo
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    held_out = ModularChain(steps=SMALL.chain_steps).dataset(SMALL.held_out, split="held_out")

    def score(run: str) -> float:
        return exact_match(AutoModelForCausalLM.from_pretrained(folder / run), tokenizer, held_out)

    assert results["base"] == score("base") > 0
    for name, run in results["runs"].items():
        folders = [f"{name.replace(' + ', '-')}-seed{seed}" for seed in range(SMALL.seeds)]
        assert run["exact_match"] == [score(f) for f in folders]


def test_plugins_ran_and_left_their_facts(demo: tuple[Path, dict]) -> None:
    folder, results = demo
    for name, plugins in RUNS.items():
        run_file = folder / f"{name.replace(' + ', '-')}-seed0" / "trl_ext_run.json"
        if plugins:
            facts = json.loads(run_file.read_text())["plugins"]
            assert [plugin["name"] for plugin in facts] == [spec.split(":")[0] for spec in plugins]
        assert list(results["runs"][name]["held_out_nll"]) == ["2", "4"]


def test_held_out_nll_is_that_of_the_saved_model(demo: tuple[Path, dict]) -> None:
    """So the curves of runs with and without `ema` part, and end where the saved weights are."""
    folder, results = demo
    for name, run in results["runs"].items():
        expected = [_held_out_nll(folder / f"{name.replace(' + ', '-')}-seed{seed}") for seed in range(SMALL.seeds)]
        assert run["held_out_nll"]["4"] == pytest.approx(expected, rel=1e-4)  # fp32 sums of some hundred terms


def _held_out_nll(folder: Path) -> float:
    """Mean NLL of the completions' tokens, EOS included, one row at a time and by logits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, tokens = 0.0, 0
    for row in ModularChain(steps=SMALL.chain_steps).dataset(SMALL.held_out, split="held_out"):
        prompt, completion = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["completion"]))
        labels = torch.tensor([*completion, tokenizer.eos_token_id])
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *labels]])).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += len(labels)
    return total / tokens


def test_writes_results_and_plot_and_repeats(
    demo: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = demo[1]
    monkeypatch.setattr(trl_ext.demo, "QUICK", SMALL)
    again = trl_ext.demo.main(tmp_path, quick=True)
    assert again == results
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for run in results["runs"].values():
        scores = [100 * score for score in run["exact_match"]]
        assert f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}" in shown
    assert "numbers mean nothing" in shown


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_ext.demo, "_NEEDED", {"no_such_module_here": "trl-ext-nowhere"})
    with pytest.raises(ConfigurationError, match="pip install trl-ext-nowhere"):
        trl_ext.demo.main(tmp_path)
    assert not list(tmp_path.iterdir())
