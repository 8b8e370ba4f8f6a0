"""`trl-ext probe capability`: against full logits, interrupted and resumed, and as a cache of references."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_ext_objectives.auto import Auto
from trl_ext_objectives.capability import BINS, OBSERVED, Capability, Tally, histogram, recommend
from trl_ext_objectives.capability_probe import measure
from trl_ext_objectives.log_prob_cache import LogProbCache
from trl_ext_objectives.sample_keys import sample_key
from trl_ext_objectives.scoring import CapabilitySettings
from trl_ext_objectives.threshold import Threshold

from trl_ext.records import TokenRecord
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer

FILES = ("capability.json", "capability.md", "examples.csv", "capability.png")


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
        model=save_model(model, tiny_tokenizer(), folder / "model"),
        dataset=str(data),
        columns="question=prompt,answer=completion",
        chunk=8,
        batch_tokens=64,
        log_probs=True,
    )


@pytest.fixture(scope="module")
def measured(settings: CapabilitySettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    list(measure(settings, folder, folder / "log_probs.safetensors"))
    return folder


def response_log_probs(settings: CapabilitySettings) -> list[torch.Tensor]:
    """Log-probabilities of each example's response and EOS, from full logits, one example at a time."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(settings.model),
        AutoTokenizer.from_pretrained(settings.model),
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
    result = Capability.load(measured / "capability.json")
    assert (result.tokens, result.examples) == (len(p), 50)
    assert result.mean_p == pytest.approx(p.mean().item(), rel=1e-5)  # fp32 logits against their fp64 softmax
    assert result.nll == pytest.approx(-torch.cat(expected).mean().item(), rel=1e-5)
    assert result.share_above == pytest.approx((p >= 0.55).double().mean().item())
    # The histogram knows p to 1 / BINS, and interpolates between neighbours.
    for level in (0.1, 0.5, 0.9):
        low, high = np.quantile(p, [level - 0.01, level + 0.01])
        assert low - 1 / BINS <= result.quantile(level) <= high + 1 / BINS
    with (measured / "examples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["example"]) for row in rows] == list(range(50))
    assert [float(row["mean_p"]) for row in rows] == pytest.approx([e.exp().mean().item() for e in expected], abs=2e-6)
    advice = json.loads((measured / "capability.json").read_text())["recommendation"]
    assert advice["objective"] == recommend(result.mean_p).objective
    assert "no cut-offs" in advice["limits"]
    assert "instruction-tuned" in advice["limits"]
    for name in ("mean p", "share with p >= 0.55", "Recommended objective", "Where the evidence ends"):
        assert name in (measured / "capability.md").read_text()
    assert not (measured / "parts").exists()


def test_standard_error_has_examples_as_units() -> None:
    """Copies of each example's tokens add no evidence: the error must not shrink."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 9, 400).astype(float)
    sum_p = tokens * generator.beta(2, 2, 400)
    errors = []
    for copies in (1, 10):
        tally = Tally()
        counts = histogram(torch.tensor([0.5])) * int(copies * tokens.sum())
        tally.add(counts, copies * tokens, copies * sum_p, copies * sum_p)
        errors.append(tally.summarize({}).standard_error)
    assert errors[0] == pytest.approx(errors[1])
    # Against the bootstrap over examples; 2000 draws know a standard error to 2 %.
    draws = generator.integers(0, 400, (2000, 400))
    bootstrap = (sum_p[draws].sum(1) / tokens[draws].sum(1)).std()
    assert errors[0] == pytest.approx(bootstrap, rel=0.1)


@pytest.mark.parametrize("chunks", [0, 1, 6, 7])
def test_interrupted_measurement_resumes_to_the_same_bytes(
    settings: CapabilitySettings, measured: Path, tmp_path: Path, chunks: int
) -> None:
    interrupted = measure(settings, tmp_path, tmp_path / "log_probs.safetensors")
    for _ in range(1 + chunks):
        next(interrupted)
    interrupted.close()
    assert not (tmp_path / "capability.json").exists()
    (tmp_path / "parts" / "00000099.tmp").write_bytes(b"half a part")
    first, *_ = resumed = list(measure(settings, tmp_path, tmp_path / "log_probs.safetensors"))
    assert first == (min(8 * chunks, 50), 50)
    assert resumed[-1] == (50, 50)
    for name in (*FILES, "log_probs.safetensors"):
        assert (tmp_path / name).read_bytes() == (measured / name).read_bytes(), name


def test_other_settings_do_not_mix_with_finished_parts(settings: CapabilitySettings, tmp_path: Path) -> None:
    interrupted = measure(settings, tmp_path)
    next(interrupted)
    next(interrupted)
    interrupted.close()
    with pytest.raises(ValueError, match="holds a measurement with other settings"):
        next(measure(replace(settings, max_length=12), tmp_path))


@pytest.mark.slow
def test_killed_command_resumes_to_the_same_bytes(settings: CapabilitySettings, measured: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-c", "from trl_ext.cli import main; main()", "probe", "capability"),
        *("--model", settings.model, "--dataset", settings.dataset, "--columns", str(settings.columns)),
        *("--chunk", "8", "--batch-tokens", "64", "--output", str(tmp_path)),
        *("--log-probs", str(tmp_path / "log_probs.safetensors")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("parts/*.npz"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "finished before it could be killed"
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for name in (*FILES, "log_probs.safetensors"):
        assert (tmp_path / name).read_bytes() == (measured / name).read_bytes(), name


def test_cache_gives_the_same_log_probs_padded_and_packed(settings: CapabilitySettings, measured: Path) -> None:
    expected = response_log_probs(settings)[:3]
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
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


def test_threshold_by_quantile_of_the_base_model(measured: Path) -> None:
    """q = 0.75 keeps the quarter of tokens that the base model finds likeliest."""
    result = Capability.load(measured / "capability.json")
    cut = result.quantiles[750]
    log_probs = torch.tensor([[cut - 2e-4, cut + 2e-4]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)
    tokens = TokenRecord(log_probs, log_probs, mask, True, torch.tensor(2.0), 1, 0.0)
    objective = Threshold(0.75, quantile_of=str(measured / "capability.json"))
    assert (objective.per_token_loss(tokens) != 0).tolist() == [[False, True]]
    with pytest.raises(ValueError, match="trl-ext probe capability"):
        Capability.load(measured / "absent.json")
    with pytest.raises(ValueError, match=r"no capability\.json"):
        Capability.load(measured / "examples.csv")


def test_auto_takes_the_probes_advice_and_keeps_it() -> None:
    def tokens(p: float, progress: float) -> TokenRecord:
        log_probs = torch.full((1, 4), p, dtype=torch.float64).log().requires_grad_()
        mask = torch.ones(1, 4, dtype=torch.bool)
        return TokenRecord(log_probs, log_probs, mask, True, torch.tensor(4.0), 1, progress)

    strong, weak = Auto(), Auto()
    assert strong.per_token_loss(tokens(0.9, 0.0)).tolist() == [pytest.approx([0.1] * 4)]
    assert weak.per_token_loss(tokens(0.5, 0.0)).tolist() == [pytest.approx([-np.log(0.5)] * 4)]
    assert weak.metrics("train") == {"mean_p": 0.5, "prior_leaning": 0.0}
    # Settled with the first window: what the model becomes later changes nothing.
    for _ in range(5):
        assert weak.per_token_loss(tokens(0.99, 0.5)).tolist() == [pytest.approx([-np.log(0.99)] * 4)]
    resumed = Auto()
    resumed.load_state_dict(strong.state_dict())
    assert resumed.per_token_loss(tokens(0.5, 0.9)).tolist() == [pytest.approx([0.5] * 4)]
