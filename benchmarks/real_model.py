"""Every probe once on a real model and real problems, with pictures to look at; about twelve minutes of processor time.

    python benchmarks/real_model.py MODEL GSM8K OUTPUT

MODEL is the folder of a small chat model, GSM8K that of train.jsonl and test.jsonl of
github.com/openai/grade-school-math. A model is fine-tuned for 16 steps and compared with the one that it comes from;
general text is Python's own documentation of its language. Started again, it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples" / "data"
TRAINING = {
    "model_name_or_path": "base",
    "datasets": [{"path": "json", "data_files": "train.jsonl"}],
    "per_device_train_batch_size": 1,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
}
EXCURSIONS = {
    "checkpoints": ["base", "sft"],
    "recipes": {"SFT": {"sft": "short.yaml"}},
    "passk": {
        "dataset": "test.jsonl", "reward": "trl_ext_probing.answers:exact_answer", "limit": 8, "n": 2, "k": "1,2",
        "max_completion_length": 96, "batch_size": 16,
    },
    "drift": {"dataset": "general.jsonl", "limit": 12, "max_length": 128},
}  # fmt: skip
JUDGED = "--reward trl_ext_probing.answers:exact_answer --max-completion-length"
COMMANDS = (
    "probe capability --model base --model sft --dataset test.jsonl --limit 24 --batch-tokens 2048",
    "probe passk --model base --model sft --dataset test.jsonl --limit 16 --n 4 --k 1,2,4 "
    f"{JUDGED} 160 --batch-size 32",
    "probe drift --base base --model sft --dataset general.jsonl --limit 40 --max-length 256 --batch-tokens 2048",
    "probe reachability --model sft --dataset test.jsonl --limit 10 --n 2 --max-rollouts 4 --epochs 2 "
    f"{JUDGED} 128 --batch-size 20",
    "probe excursions --config excursions.yaml",
    f"probe from-scratch --config scratch.yaml --eval-in in.jsonl --eval-out out.jsonl --floor 0 {JUDGED} 32 "
    "--learning-rates 2e-4 --points 1",
)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversation(problem: dict[str, str]) -> dict[str, Any]:
    """A problem as a question to a chat model, with its solution."""
    answer = problem["answer"]
    question = {"role": "user", "content": problem["question"]}
    return {"prompt": [question], "completion": [{"role": "assistant", "content": answer}], "answer": answer}


def prepare(model: Path, data: Path, folder: Path) -> None:
    """The data sets, the configurations and the model under the names that the commands have."""
    if not (folder / "base").exists():
        (folder / "base").symlink_to(model.resolve())
    problems = {
        part: [conversation(json.loads(line)) for line in (data / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "test")
    }
    write(folder / "train.jsonl", problems["train"][:640])
    write(folder / "test.jsonl", problems["test"])
    write(folder / "in.jsonl", problems["test"][:2])
    write(folder / "general.jsonl", [{"text": text} for _, text in sorted(topics.items())])
    sums = [json.loads(line) for line in (EXAMPLES / "test.jsonl").read_text().splitlines()[:2]]
    write(folder / "out.jsonl", [conversation({"question": s["prompt"], "answer": s["completion"]}) for s in sums])
    for name, changed in {
        "sft.yaml": {**TRAINING, "max_length": 192, "max_steps": 16, "output_dir": "sft"},
        "short.yaml": {**TRAINING, "max_length": 128, "max_steps": 6, "output_dir": "unused"},
        "scratch.yaml": {**TRAINING, "max_length": 96, "max_steps": 3, "output_dir": "unused"},
        "excursions.yaml": EXCURSIONS,
    }.items():
        (folder / name).write_text(json.dumps(changed, indent=1))  # which is YAML too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "gsm8k", "output"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    prepare(options.model, options.gsm8k, options.output)
    trained = (options.output / "sft" / "config.json").exists()
    for command in (*([] if trained else ["sft --config sft.yaml"]), *COMMANDS):
        print(f"\n$ trl-ext {command}", flush=True)
        subprocess.run([sys.executable, "-m", "trl_ext", *shlex.split(command)], cwd=options.output, check=True)


if __name__ == "__main__":
    main()
