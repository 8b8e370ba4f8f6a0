"""`trl-ext probe from-scratch` on tiny runs: equal arms, the data they see, interruption, and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from interruption import Killed, killed_after, results_of
from safetensors.torch import load_file
from scratch_runs import SEED, prepare, write
from transformers import AutoModelForCausalLM
from trl_ext_probing.from_scratch.arms import Base
from trl_ext_probing.from_scratch.control import run
from trl_ext_probing.from_scratch.control_settings import EXACT, FromScratchSettings
from trl_ext_probing.from_scratch.evaluating import Evaluator, load_set
from trl_ext_probing.from_scratch.procedure import Procedure
from trl_ext_probing.from_scratch.watched_training import points_of, train
from trl_ext_probing.journal import Journal

from trl_ext import SFTTrainer
from trl_ext.errors import ConfigurationError
from trl_ext.jobs import Job, Pool
from trl_ext.jobs.job import LOG
from trl_ext.testing import Addition, exact_match, save_model, tiny_llama, tiny_tokenizer

SLOW = partial(pytest.param, marks=pytest.mark.slow)
FILES = ("contamination.jsonl", "table.md", "plot.png", "results.json", "rows.csv", "journal.jsonl")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> FromScratchSettings:
    return prepare(tmp_path_factory.mktemp("data"))


@contextmanager
def trainings() -> Iterator[list[str]]:
    """A context that notes the folder of every training that begins."""
    begun, begin = [], Job.begin

    def noting(self: Job, *arguments: Any) -> Path:
        begun.append(self.folder.name)
        return begin(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "begin", noting)
        yield begun


@pytest.fixture(scope="module")
def begun() -> list[str]:
    """The trainings of `measured`."""
    return []


@pytest.fixture(scope="module")
def measured(settings: FromScratchSettings, begun: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    with trainings() as every:
        run(replace(settings, output=folder))
    begun += every
    return folder


def lines(folder: Path, part: str) -> list[dict[str, Any]]:
    every = map(json.loads, (folder / "journal.jsonl").read_text().splitlines()[1:])
    return [line for line in every if line["part"] == part]


# -- what is measured ------------------------------------------------------------------------------------------------


def test_s_of_two_equal_arms_is_one_within_its_interval(measured: Path) -> None:
    """The base model is the random initialisation of the first seed: there both arms are the same run, bit for bit."""
    summary = json.loads((measured / "results.json").read_text())
    assert summary["arms"]["pretrained"] == summary["arms"]["scratch"]
    for key in ("sets", "batches", "tokens"):
        of = {
            arm: [line[key] for line in lines(measured, "point") if (line["arm"], line["seed"]) == (arm, SEED)]
            for arm in ("pretrained", "scratch")
        }
        assert of["pretrained"] == of["scratch"]
    others = [[line["sets"] for line in lines(measured, "point") if line["seed"] == seed] for seed in (SEED, SEED + 1)]
    assert others[0][2:] != others[1][2:]  # other seeds start elsewhere
    last = summary["points"][-1]
    for name in ("in", "out"):
        found = last["share"][name]["scratch"]
        assert found["low"] < 1 < found["high"]
        assert found["high"] - found["low"] < 1.5  # it says something
        gap = last["nll_gap"][name]["scratch"]
        assert gap["low"] < 0 < gap["high"]


def test_arms_see_the_same_batches_and_seeds_do_not(measured: Path) -> None:
    """By the digests, which the next test but one holds to the batches."""
    seen = {(line["arm"], line["seed"]): line["batches"] for line in lines(measured, "point") if line["step"] == 8}
    for seed in range(SEED, SEED + 3):
        assert seen["scratch", seed] == seen["pretrained", seed]
    assert len(set(seen.values())) == 3


def test_the_search_is_reused_and_its_best_is_taken(measured: Path, begun: list[str]) -> None:
    summary = json.loads((measured / "results.json").read_text())
    for arm, facts in summary["arms"].items():
        best = min(facts["search"], key=lambda entry: entry["nll"])
        assert facts["learning_rate"] == best["learning_rate"]
        assert facts["at_the_edge"]
        assert f"{arm}" in (measured / "table.md").read_text()
    # 2 arms x (2 rates on the first seed + 2 more seeds): no run is made twice.
    assert len(begun) == len(set(begun)) == 8
    assert not (measured / "runs").exists()


def test_different_batches_are_not_compared(measured: Path, settings: FromScratchSettings, tmp_path: Path) -> None:
    done = [json.loads(line) for line in (measured / "journal.jsonl").read_text().splitlines()]
    first = next(line for line in done if line.get("part") == "point")
    first["batches"] = "0" * 64
    kept = [line for line in done if line.get("arm") != "scratch" or line["part"] == "search"]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    with pytest.raises(RuntimeError, match="saw different batches up to step 4: they are not comparable"):
        run(replace(settings, output=tmp_path))


@pytest.mark.parametrize("plugin", ["", "ema:decay=0.5"])
def test_the_run_is_the_one_of_the_sft_command(
    settings: FromScratchSettings, tmp_path: Path, plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with the weights that a plugin deploys; the digest of the batches is that of what it trains on."""
    from trl_ext.cli.train import train as sft

    if plugin:
        pytest.importorskip("trl_ext_averaging")
    config = tmp_path / "sft.yaml"
    config.write_text(f"{Path(settings.config).read_text()}plugins: [{plugin}]\n")
    flags = {"output_dir": tmp_path / "theirs", "learning_rate": 0.003, "seed": 7, "save_strategy": "no"}
    sft("sft", ["--config", str(config), *(text for k, v in flags.items() for text in (f"--{k}", str(v)))])
    start = str(Path(settings.config).parent / "base")
    total, step = "", SFTTrainer.training_step

    def recording(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        nonlocal total
        content = b"".join(inputs[name].numpy().tobytes() for name in ("input_ids", "labels"))
        total = hashlib.sha256(total.encode() + content).hexdigest()
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(SFTTrainer, "training_step", recording)
    monkeypatch.setattr(trl, "SFTTrainer", trl.SFTTrainer)  # `train` takes its place
    assert train(str(config), str(tmp_path / "ours"), start, rate=0.003, seed=7, points=3) == ""
    points = points_of(tmp_path / "ours")
    assert [(point.step, point.last) for point in points] == [(3, False), (5, False), (8, True)]
    assert points[-1].batches == total
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = load_file(points[-1].folder / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (points[-1].folder / "raw").is_dir() == bool(plugin)


def test_scores_are_those_of_greedy_decoding_and_nll_that_of_the_model(
    settings: FromScratchSettings, tmp_path: Path
) -> None:
    """On a model that has learned something, against the testing kit's generation and a plain forward pass."""
    torch.manual_seed(0)
    model, tokenizer = tiny_llama(hidden=16), tiny_tokenizer()
    rows = [{"prompt": f"{i}:", "completion": str(i % 3), "answer": str(i % 3)} for i in range(9)]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    encoded = [tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"] for row in rows]
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(input_ids=torch.tensor(encoded), labels=torch.tensor(encoded)).loss
        loss.backward()
        optimizer.step()
    path = save_model(model.eval(), tokenizer, tmp_path / "model")
    plain = replace(settings, reward=[EXACT], batch_size=4, n=1, temperature=0.0)
    evaluator = Evaluator(plain, {"in": rows, "out": [{"prompt": "1:", "answer": "1"}]}, rows)
    found = evaluator.evaluate(Path(path))
    greedy = [exact_match(model, tokenizer, [row]) for row in rows]
    assert found["in"]["scores"] == greedy
    assert sum(greedy) > 0
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor(encoded)).logits.log_softmax(-1)
    expected = -sum(log_probs[i, t - 1, ids[t]] for i, ids in enumerate(encoded) for t in (2, 3)) / 18
    assert found["in"]["nll"] == pytest.approx(float(expected), rel=1e-5)
    assert evaluator.validation_nll(Path(path)) == pytest.approx(found["in"]["nll"])
    assert found["out"]["nll"] is None
    sampled = Evaluator(replace(plain, n=200, temperature=2.0), {"in": rows[:1]}, [])
    with torch.no_grad():
        probability = (model(input_ids=torch.tensor([encoded[0][:2]])).logits[0, -1] / 2).softmax(-1)
        end = (model(input_ids=torch.tensor([encoded[0][:3]])).logits[0, -1] / 2).softmax(-1)
    right = float(probability[encoded[0][2]] * end[encoded[0][3]])  # or with more text: a little more often
    share = sampled.evaluate(Path(path))["in"]["scores"][0]
    assert right - 0.1 < share < right + 0.2
    assert share * 200 == pytest.approx(round(share * 200))
    assert share != found["in"]["scores"][0]


def test_conversations_are_evaluated_as_the_chat_template_renders_them(
    settings: FromScratchSettings, tmp_path: Path
) -> None:
    plain = replace(settings, reward=[EXACT], n=1, temperature=0.0)
    path = save_model(tiny_llama(hidden=16), tiny_tokenizer(), tmp_path / "model")
    pairs = Addition(digits=1).dataset(3, conversational=True).to_list()
    forms = {
        "pairs": [{key: row[key] for key in ("prompt", "completion")} for row in pairs],
        "messages": [{"messages": row["prompt"] + row["completion"]} for row in pairs],
    }
    found = {}
    for name, rows in forms.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        loaded = load_set(plain, "--eval-in", str(tmp_path / f"{name}.jsonl"))
        assert [row["answer"] for row in loaded] == [row["answer"] for row in pairs]
        found[name] = Evaluator(plain, {"in": loaded}, loaded).evaluate(Path(path))
    assert found["pairs"] == found["messages"]
    assert found["pairs"]["in"]["nll"] == pytest.approx(5.55, abs=0.2)  # log 259, untrained


def test_embeddings_are_the_pretrained_ones_and_nothing_else_is(settings: FromScratchSettings, tmp_path: Path) -> None:
    torch.manual_seed(0)
    known = save_model(tiny_llama(hidden=16, layers=1, seed=3), tiny_tokenizer(), tmp_path / "known")
    base = Base(type("ModelConfig", (), {"model_name_or_path": known, "model_revision": "main"}))
    arms = {arm: base.start(arm, 1, tmp_path / arm) for arm in ("pretrained", "scratch", "embeddings")}
    assert arms["pretrained"] == known
    weights = {arm: dict(AutoModelForCausalLM.from_pretrained(path).named_parameters()) for arm, path in arms.items()}
    for name, weight in weights["embeddings"].items():
        from_known = torch.equal(weight, weights["pretrained"][name])
        constant = bool((weight == 1).all())  # norms start at one in every arm
        assert from_known == (name == "model.embed_tokens.weight" or constant)
        assert from_known or torch.equal(weight, weights["scratch"][name])
    other = load_file(Path(base.start("scratch", 2, tmp_path / "other")) / "model.safetensors")
    assert not torch.equal(other["lm_head.weight"], weights["scratch"]["lm_head.weight"])


def test_third_arm_short_search_and_contamination_reach_the_files(
    settings: FromScratchSettings, tmp_path: Path
) -> None:
    training = Addition(digits=2).dataset(80)
    clean = Addition(digits=2).dataset(6, split="held_out")
    mixed = write(tmp_path / "mixed.jsonl", [clean[0], training[7], clean[1], clean[2], training[3]])
    chosen = replace(settings, eval_in=mixed, eval_out=None, embeddings=True, search_share=0.25, points=1)
    run(replace(chosen, output=tmp_path / "out"))
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert summary["sets"]["in"]["contaminated_rows"] == [1, 4]
    found = [json.loads(line) for line in (tmp_path / "out" / "contamination.jsonl").read_text().splitlines()]
    assert [(line["row"], line["training_row"]) for line in found] == [(1, 7), (4, 3)]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| in distribution | 5 | 0.0000 | 0, as given | 2 (40.0%) |" in text
    assert "1 seed(s), 25% of the training" in text
    last = summary["points"][-1]
    assert set(last["share"]["in"]) == set(last["nll_gap"]["in"]) == {"scratch", "embeddings"}
    # S without the contaminated samples, from the journal's scores of each prompt.
    means = {
        arm: torch.tensor([line["sets"]["in"]["scores"] for line in lines(tmp_path / "out", "point")
                           if line["arm"] == arm])[:, [0, 2, 3]].mean()
        for arm in ("pretrained", "scratch")
    }  # fmt: skip
    value = last["share_uncontaminated"]["in"]["scratch"]["value"]
    assert value is None or value == pytest.approx(float(means["scratch"] / means["pretrained"]), rel=1e-5)


# -- interruption ----------------------------------------------------------------------------------------------------


def same_files(folder: Path, measured: Path) -> None:
    assert results_of(folder) == results_of(measured)
    for name in ("contamination.jsonl", "plot.png", "rows.csv", "journal.jsonl"):
        assert (folder / name).read_bytes() == (measured / name).read_bytes(), name
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("writes", [4, SLOW(8)])
def test_interrupted_between_trainings(
    settings: FromScratchSettings, measured: Path, tmp_path: Path, writes: int
) -> None:
    with killed_after(writes):
        run(replace(settings, output=tmp_path))
    assert not (tmp_path / "results.json").exists()
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"part": "poi')
    run(replace(settings, output=tmp_path))
    same_files(tmp_path, measured)


def test_interrupted_while_it_evaluates(
    settings: FromScratchSettings, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the sixth of twelve evaluations: five trainings are done, one of them with a point still to evaluate."""
    original, calls = Evaluator.evaluate, []

    def failing(self: Any, *arguments: Any) -> Any:
        calls.append(self)
        if len(calls) == 6:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", failing)
        with pytest.raises(Killed):
            run(replace(settings, output=tmp_path))
    with trainings() as begun:
        run(replace(settings, output=tmp_path))
    same_files(tmp_path, measured)
    assert len(begun) == 3


@pytest.mark.parametrize("where", ["checkpoint-4/trainer_state.json", SLOW("points/.step-*"), SLOW("checkpoint-4")])
def test_a_training_that_is_killed_goes_on_from_its_checkpoint(
    settings: FromScratchSettings, measured: Path, tmp_path: Path, where: str
) -> None:
    """Killed with -9 once it is past its checkpoint, while it saves a point, or while it saves the checkpoint."""
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            for found in tmp_path.glob(f"runs/*/{where}"):
                folder = tmp_path / "runs" / found.relative_to(tmp_path / "runs").parts[0]
                killed.extend(kill_those_of(folder))  # none, where it has ended meanwhile: then the next one
            time.sleep(0.001)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="was killed by signal 9"):
            run(replace(settings, output=tmp_path))
    finally:
        killed.append(0)
        thread.join()
    before = {path: path.stat().st_ino for path in tmp_path.glob("runs/*/points/step-00000004")}
    after: dict[Path, int] = {}
    rmtree = shutil.rmtree

    def noting(folder: Any, **options: Any) -> None:
        after.update({path: path.stat().st_ino for path in Path(folder).glob("points/step-00000004")})
        rmtree(folder, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", noting)
        run(replace(settings, output=tmp_path))
    same_files(tmp_path, measured)
    if where == "checkpoint-4/trainer_state.json":
        assert before
        assert all(after[path] == inode for path, inode in before.items()), "what was saved was trained again"


def kill_those_of(folder: Path) -> Iterator[int]:
    """Kill the processes whose output is this training's log."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "fd" / "1") == str(folder / LOG):
                os.kill(int(process.name), signal.SIGKILL)
                yield int(process.name)
        except OSError:
            continue


def test_changed_settings_are_refused_by_name(settings: FromScratchSettings, tmp_path: Path) -> None:
    chosen = replace(settings, output=tmp_path / "out")
    with killed_after(1):
        run(chosen)
    with pytest.raises(ConfigurationError, match=r"points \(2 there, 3 here\), ngram \(13 there, 5 here\)"):
        run(replace(chosen, points=3, ngram=5))
    config = Path(settings.config).with_name("other.yaml")
    config.write_text(Path(settings.config).read_text().replace("max_steps: 8", "max_steps: 9"))
    with pytest.raises(ConfigurationError, match=r"the run: max_steps \(8 there, 9 here\)"):
        run(replace(chosen, config=str(config)))
    shorter = write(tmp_path / "shorter.jsonl", Addition(digits=4).dataset(11, split="held_out"))
    with pytest.raises(ConfigurationError, match=r"eval_out \(.*data: --eval-out"):
        run(replace(chosen, eval_out=shorter))


@pytest.mark.slow
def test_killed_command_resumes_to_the_same_files(
    settings: FromScratchSettings, measured: Path, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, "-c", "from trl_ext.cli import main; main()", "probe", "from-scratch"),
        *("--config", settings.config, "--eval-in", str(settings.eval_in), "--eval-out", str(settings.eval_out)),
        *("--reward", *settings.reward, "--floor", "0", "--learning-rates", str(settings.learning_rates)),
        *(
            "--points",
            "2",
            "--n",
            "4",
            "--temperature",
            "1.0",
            "--max-completion-length",
            "3",
            "--output",
            str(tmp_path),
        ),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    for done in (1, 5):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        journal = tmp_path / "journal.jsonl"
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > done):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "finished before it could be killed"
    assert not (tmp_path / "results.json").exists()
    finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "S in distribution" in finished.stdout
    same_files(tmp_path, measured)


def test_rates_that_diverge_are_not_chosen(
    settings: FromScratchSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    procedure = Procedure(replace(settings, learning_rates="0.01,1e30", output=tmp_path))
    with Journal(tmp_path / "journal.jsonl", procedure.about()) as journal, Pool() as pool:
        steps = procedure.steps(journal, pool)
        for _ in range(4):
            next(steps)
        steps.close()
    assert procedure.chosen == {"pretrained": 0.01, "scratch": 0.01}
    assert [line["nll"] for line in lines(tmp_path, "search")][1::2] == [None, None]


@pytest.mark.slow
def test_the_example_runs_with_few_steps(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "examples" / "from_scratch.py"
    command = [sys.executable, str(script), "--quick", "--embeddings", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    summary = json.loads((tmp_path / "quick" / "control" / "results.json").read_text())
    assert list(summary["arms"]) == ["pretrained", "scratch", "embeddings"]
    assert {name: facts["contaminated"] for name, facts in summary["sets"].items()} == {"in": 0, "out": 0}
    assert summary["conclusion"][0] in done.stdout
