"""`trl-ext probe capability`: against full logits, interrupted and resumed, and as a cache of references."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from interruption import killed_after, results_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_ext_probing.capability.capability_run import run
from trl_ext_probing.capability.capability_settings import CapabilitySettings
from trl_ext_probing.capability.continuum import OBSERVED, recommend
from trl_ext_probing.capability.log_prob_cache import LogProbCache
from trl_ext_probing.capability.positions import Capability
from trl_ext_probing.capability.sample_keys import sample_key
from trl_ext_probing.scored_data import BINS, Scores

from trl_ext.errors import ConfigurationError
from trl_ext.records import TokenRecord
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> CapabilitySettings:
    """A model with opinions (its weights are enlarged) and 50 examples of 20 to 23 tokens."""
    folder = tmp_path_factory.mktemp("probe")
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    data = folder / "data.jsonl"
    with data.open("w") as file:
        for row in Addition(digits=3).dataset(50):
            file.write(json.dumps({"question": row["prompt"], "answer": row["completion"]}) + "\n")
    return CapabilitySettings(
        model=[save_model(model, tiny_tokenizer(), folder / "model")],
        dataset=str(data),
        columns="question=prompt,answer=completion",
        chunk=8,
        batch_tokens=64,
        device="cpu",
    )


@pytest.fixture(scope="module")
def measured(settings: CapabilitySettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    run(replace(settings, output=folder, log_probs=folder / "log_probs.safetensors"))
    return folder


def response_log_probs(settings: CapabilitySettings) -> list[torch.Tensor]:
    """Log-probabilities of each example's response and EOS, from full logits, one example at a time."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(settings.model[0]),
        AutoTokenizer.from_pretrained(settings.model[0]),
    )
    found = []
    for line in Path(settings.dataset).read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["question"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["answer"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            log_softmax = model(ids).logits.double().log_softmax(-1)[0, :-1]
        found.append(log_softmax.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0])
    return found


def test_numbers_equal_those_of_full_logits(settings: CapabilitySettings, measured: Path) -> None:
    expected = response_log_probs(settings)
    p = torch.cat(expected).exp()
    result = Capability.load(measured, "test")
    assert (result.tokens, result.examples) == (len(p), 50)
    assert result.mean_p.value == pytest.approx(p.mean().item(), rel=1e-5)  # fp32 logits against their fp64 softmax
    assert result.nll.value == pytest.approx(-torch.cat(expected).mean().item(), rel=1e-5)
    assert result.share_above == pytest.approx((p >= 0.55).double().mean().item())
    # The histogram knows p to 1 / BINS, and interpolates between neighbours.
    for level in (0.1, 0.5, 0.9):
        low, high = np.quantile(p, [level - 0.01, level + 0.01])
        assert low - 1 / BINS <= result.quantile(level) <= high + 1 / BINS
    with (measured / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["example"]) for row in rows] == list(range(50))
    assert [float(row["mean_p"]) for row in rows] == pytest.approx([e.exp().mean().item() for e in expected], abs=2e-6)
    advice = json.loads((measured / "results.json").read_text())["models"][0]["recommendation"]
    assert advice["objective"] == recommend(result.mean_p.bounds[0]).objective
    assert "no cut-offs" in advice["limits"]
    assert "instruction-tuned" in advice["limits"]
    for name in ("mean p", "share of tokens with p >= 0.55", "Recommended objective", "Where the evidence ends"):
        assert name in (measured / "table.md").read_text()


def test_the_interval_has_examples_as_units() -> None:
    """Copies of each example's tokens add no evidence: the interval must not shrink."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 9, 400)
    sum_p = tokens * generator.beta(2, 2, 400)
    widths = []
    for copies in (1, 10):
        scores = Scores("m", {})
        scores.add(
            {"tokens": (copies * tokens).tolist(), "sum_p": (copies * sum_p).tolist(), "hits": [0] * 400,
             "sum_nll": [0.0] * 400, "bins": [5000], "counts": [int(copies * tokens.sum())]}
        )  # fmt: skip
        _, low, high = Capability.of(scores).mean_p.bounds
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1])
    # Against the bootstrap over examples; 2000 draws know a standard error to 2 %.
    draws = generator.integers(0, 400, (2000, 400))
    bootstrap = (sum_p[draws].sum(1) / tokens[draws].sum(1)).std()
    assert widths[0] == pytest.approx(2 * 1.96 * bootstrap, rel=0.1)


@pytest.mark.parametrize("chunks", [0, 1, 6])
def test_an_interrupted_measurement_goes_on_to_the_same_results(
    settings: CapabilitySettings, measured: Path, tmp_path: Path, chunks: int
) -> None:
    chosen = replace(settings, output=tmp_path, log_probs=tmp_path / "log_probs.safetensors")
    with killed_after(chunks):
        run(chosen)
    assert not (tmp_path / "results.json").exists()
    run(replace(chosen, batch_tokens=64))
    content = [results_of(folder) for folder in (tmp_path, measured)]
    for of_folder in content:
        del of_folder["settings"]["log_probs"]
    assert content[0] == content[1]
    for name in ("rows.csv", "plot.png", "log_probs.safetensors"):
        assert (tmp_path / name).read_bytes() == (measured / name).read_bytes(), name


def test_a_corrected_command_is_not_blocked_by_a_failed_one(settings: CapabilitySettings, tmp_path: Path) -> None:
    """A typo in --columns, and then the right command."""
    with pytest.raises(ConfigurationError, match="no column 'quesiton'"):
        run(replace(settings, output=tmp_path, columns="quesiton=prompt"))
    run(replace(settings, output=tmp_path, limit=4))
    with pytest.raises(ConfigurationError, match=r"limit \(4 there, None here\), data: rows.*--overwrite"):
        run(replace(settings, output=tmp_path))
    (result,) = run(replace(settings, output=tmp_path, limit=5, overwrite=True))
    assert result.examples == 5


def test_several_models_are_compared_in_pairs(settings: CapabilitySettings, tmp_path: Path) -> None:
    other = save_model(tiny_llama(layers=1, seed=1), tiny_tokenizer(), tmp_path / "other")
    first, second = run(replace(settings, model=[*settings.model, other], output=tmp_path / "out"))
    models = results_of(tmp_path / "out")["models"]
    for name in ("mean_p", "nll"):
        difference = models[1]["difference_from_first"][name]
        expected = getattr(second, name).value - getattr(first, name).value
        assert difference["value"] == pytest.approx(expected)
        assert difference["low"] < expected < difference["high"]
    assert "| minus the first |" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(ConfigurationError, match="name one --model"):
        replace(settings, model=[*settings.model, other], log_probs=tmp_path / "lp")
    with pytest.raises(ConfigurationError, match="is of 2 models; probe one of them alone"):
        Capability.load(tmp_path / "out", "auto: probe")


def test_cache_gives_the_same_log_probs_padded_and_packed(settings: CapabilitySettings, measured: Path) -> None:
    expected = response_log_probs(settings)[:3]
    tokenizer = AutoTokenizer.from_pretrained(settings.model[0])
    ids, labels = [], []
    for line in Path(settings.dataset).read_text().splitlines()[:3]:
        row = json.loads(line)
        prompt = tokenizer(row["question"])["input_ids"]
        whole = prompt + tokenizer(row["answer"])["input_ids"] + [tokenizer.eos_token_id]
        ids.append(torch.tensor(whole))
        labels.append(torch.tensor([-100] * len(prompt) + whole[len(prompt) :]))
    pad = torch.nn.utils.rnn.pad_sequence
    padded = {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
    }
    packed = {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(i)) for i in ids])[None],
    }
    cache = LogProbCache(measured / "log_probs.safetensors")
    for inputs in (padded, packed):
        mask = inputs["labels"][:, 1:] != -100
        none = torch.zeros(mask.shape)
        found = cache.log_probs(TokenRecord(none, none, mask, True, none, 1, 0.0, inputs=inputs))
        assert (found[~mask] == 0).all()
        torch.testing.assert_close(found[mask].double(), torch.cat(expected), rtol=1e-4, atol=1e-5)
    padded["input_ids"][1, 0] += 1
    with pytest.raises(ValueError, match=r"a sample of \d+ tokens is not in .*max_length"):
        cache.log_probs(TokenRecord(none, none, mask, True, none, 1, 0.0, inputs=padded))


def test_cache_of_another_vocabulary_or_kind_is_refused(measured: Path, tmp_path: Path) -> None:
    cache = LogProbCache(measured / "log_probs.safetensors")
    tokenizer = tiny_tokenizer()
    cache.check_vocabulary(tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"written with the vocabulary of .* not this model's"):
        cache.check_vocabulary(tokenizer)
    with pytest.raises(ValueError, match="there is no file"):
        LogProbCache(tmp_path / "absent")


def test_sample_key_sees_tokens_order_and_labels() -> None:
    ids, labels = np.array([1, 2, 3]), np.array([-100, 2, 3])
    keys = {
        sample_key(ids, labels),
        sample_key(np.array([1, 3, 2]), labels),
        sample_key(ids, np.array([-100, -100, 3])),
        sample_key(np.array([1, 2, 3, 0]), np.array([-100, 2, 3, -100])),
    }
    assert len(keys) == 4
    assert sample_key(ids, labels) == sample_key(
        ids.astype(np.int32), np.array([1, 2, 3])
    )  # the first is never a label


def test_recommendation_says_where_the_evidence_ends() -> None:
    strong, middle, weak = recommend(0.78), recommend(0.55), recommend(0.03)
    assert (strong.objective, middle.objective, weak.objective) == ("power:alpha=1", "nll", "nll")
    assert [r.region for r in (strong, middle, weak)] == ["strong", "intermediate", "weak"]
    for outside in (0.0, 0.2, 0.65, 0.95):
        advice = recommend(outside)
        assert advice.region not in {region.name for region in OBSERVED}
        assert "no setting" in advice.reason or "beyond the evidence" in advice.reason
    assert recommend(0.65).objective == "nll"
    assert recommend(0.95).objective == "power:alpha=1"


def test_what_is_no_measurement_is_refused(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"auto: probe: .*absent. holds no finished measurement"):
        Capability.load(tmp_path / "absent", "auto: probe")
    (tmp_path / "results.json").write_text('{"schema": 1, "probe": "passk"}')
    with pytest.raises(ConfigurationError, match="is not of `trl-ext probe capability`"):
        Capability.load(tmp_path, "auto: probe")
