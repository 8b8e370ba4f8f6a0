"""A process reward model as verifier: against its own forward, one completion at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import checksum_reward, grpo
from transformers import AutoModelForTokenClassification, LlamaConfig, LlamaForTokenClassification
from trl_ext_reachability.step_classifier import StepClassifier

from trl_ext.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module", params=[1, 2])
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with one output or two, whose answers differ from token to token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=request.param,
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("judge")
    LlamaForTokenClassification(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_reward_is_the_probability_where_the_step_ends(judge: str) -> None:
    classifier = StepClassifier(judge, "\n", torch.device("cpu"), batch_size=2)
    prompts = ["2+3=", "a longer question", [{"role": "user", "content": "2+3="}]]
    steps = [["first\n", "second"], ["one step only"], ["a", "b", ""]]
    got = classifier(steps=steps, prompts=prompts, answer=["5"] * 3)
    assert [len(row) for row in got] == [2, 1, 3]
    model = AutoModelForTokenClassification.from_pretrained(judge).eval()
    shown = [prompts[0], prompts[1], "<|im_start|>user\n2+3=<|im_end|>\n<|im_start|>assistant\n"]
    for start, row, rewards in zip(shown, steps, got, strict=True):
        text = str(start)
        for step, reward in zip(row, rewards, strict=True):
            text += step.strip() + "\n"
            with torch.no_grad():
                logits = model(torch.tensor([TOKENIZER(text)["input_ids"]])).logits[0, -1]
            expected = logits[0].sigmoid() if len(logits) == 1 else logits.softmax(-1)[1]
            assert reward == pytest.approx(float(expected), abs=1e-5)  # fp32, other batch shapes


def test_training_takes_its_verdicts(judge: str, tmp_path: Path) -> None:
    plugin = {"name": "process-reward", "verifier": "model", "model": judge, "delimiter": "e", "separator": ";"}
    trainer = grpo(tmp_path, [plugin], reward=checksum_reward, max_steps=1)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["process-reward/reward"] < 1


def test_separator_without_tokens_is_refused(judge: str) -> None:
    with pytest.raises(ValueError, match="separator='' has no token"):
        StepClassifier(judge, "", torch.device("cpu"))
