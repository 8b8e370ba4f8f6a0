"""What the engine of the probes gains over plain `generate` in batches in the order of the data set, in one run.

    python benchmarks/probing.py [--device cuda] [--turns 9]

Prompts and completions have many lengths, as those of a data set have: the model is random and has many end tokens.
All arms complete the same prompts in each turn, in an order drawn anew, and other ones in the next: greedily, and with
several samples of fewer prompts. On CPU one thread, and the processor's time (other processes do not count); on CUDA
the wall's. The speed is the median over turns of plain `generate`'s time over the arm's, with its 95 % interval.

Greedy completions must be those of `generate`. At a near tie, another order of the sums in a matrix product may take
the other token, so the share of equal ones is printed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import hardware, one_thread, ratio, seconds_now
from transformers import ContinuousBatchingConfig, GenerationConfig, logging
from trl_ext_probing.engines import engine

from trl_ext.testing import tiny_llama, tiny_tokenizer

PLAIN = "plain generate"
SHAPES = {
    "cpu": {"hidden": 128, "layers": 2, "prompts": 96, "batch": 16, "longest": 64},
    "cuda": {"hidden": 1024, "layers": 16, "prompts": 512, "batch": 128, "longest": 512},
}
SAMPLES = 8
Tokens = list[tuple[int, ...]]


def make_model(shape: dict[str, int], device: str) -> Any:
    """A random model of bytes, with weights so large that greedy completions do not repeat themselves.

    One token in 21 ends a completion, which gives a third of the longest length on average.
    """
    size = {"hidden": shape["hidden"], "layers": shape["layers"], "max_position_embeddings": 4096}
    model = tiny_llama(**size, initializer_range=0.3)
    model.generation_config.eos_token_id = [*range(0, 256, 21), 258]
    return model.to(device).eval()


def make_prompts(count: int, longest: int, seed: int) -> list[str]:
    """Random text of 8 to `longest` letters."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefgh +-=", k=draw.randint(8, longest))) for _ in range(count)]


def sampling(n: int) -> dict[str, Any]:
    """As `generate` calls it: greedy for one completion a prompt, else from the whole distribution."""
    return {"do_sample": True, "top_k": 0} if n > 1 else {"do_sample": False}


def plain_generate(model: Any, prompts: list[str], n: int, shape: dict[str, int]) -> Tokens:
    """The prompts, `n` times each, in batches as they come."""
    tokenizer, ends = tiny_tokenizer(), model.generation_config.eos_token_id
    repeated = [prompt for prompt in prompts for _ in range(n)]
    completions = []
    for start in range(0, len(repeated), shape["batch"]):
        texts = repeated[start : start + shape["batch"]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        output = model.generate(**inputs, max_new_tokens=shape["longest"], **sampling(n))
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            completions.append(tuple(row[:length]))
    return completions


def continuous_batching(model: Any, prompts: list[str], n: int, shape: dict[str, int]) -> Tokens:
    """The same, by transformers' own scheduler over a paged cache, with room for as many tokens."""
    ends = model.generation_config.eos_token_id
    settings = GenerationConfig(max_new_tokens=shape["longest"], eos_token_id=ends, **sampling(n))
    room = {"page_size": 32, "num_blocks": shape["batch"] * shape["longest"] // 16 + 8, "max_batch_tokens": 512}
    cache = ContinuousBatchingConfig(**room, max_requests_per_batch=shape["batch"])
    repeated = [tiny_tokenizer()(prompt)["input_ids"] for prompt in prompts for _ in range(n)]
    outputs = model.generate_batch(repeated, generation_config=settings, continuous_batching_config=cache)
    return [tuple(output.generated_tokens) for output in outputs.values()]


def with_engine(model: Any, prompts: list[str], n: int, shape: dict[str, int]) -> Tokens:
    """The same, by the engine that the probes use."""
    made = engine("transformers", model=model, tokenizer=tiny_tokenizer(), batch_size=shape["batch"])
    drawn = made.generate(prompts, n=n, max_tokens=shape["longest"], temperature=float(n > 1))
    return [c.token_ids or () for c in sorted(drawn, key=lambda c: (c.prompt_index, c.sample_index))]


ARMS: dict[str, Callable[[Any, list[str], int, dict[str, int]], Tokens]] = {
    PLAIN: plain_generate,
    f"{PLAIN}, again": plain_generate,
    "continuous batching of transformers": continuous_batching,
    "engine": with_engine,
}


def measure(model: Any, n: int, shape: dict[str, int], device: str, turns: int) -> dict[str, Any]:
    """Seconds of each arm, (turns,), and the completions of all turns; a first turn does not count."""
    seconds: dict[str, list[float]] = defaultdict(list)
    completions: dict[str, Tokens] = defaultdict(list)
    order = random.Random(0)
    for turn in range(turns + 1):
        prompts = make_prompts(shape["prompts"] // n, shape["longest"], turn)
        for arm in order.sample(list(ARMS), len(ARMS)):
            start = seconds_now(device)
            drawn = ARMS[arm](model, prompts, n, shape)
            if turn:
                seconds[arm].append(seconds_now(device) - start)
                completions[arm] += drawn
    return {"seconds": {arm: np.array(times) for arm, times in seconds.items()}, "completions": completions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=int, default=9, help="that count; at least 6 give an interval")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    one_thread(options.device)
    logging.set_verbosity_error()
    shape = SHAPES[options.device]
    model = make_model(shape, options.device)
    print(f"{hardware(options.device)}; {shape}")
    figures: dict[str, Any] = {"hardware": hardware(options.device), "shape": shape}
    for kind, n in (("greedy", 1), (f"{SAMPLES} samples", SAMPLES)):
        found = measure(model, n, shape, options.device, options.turns)
        plain = found["completions"][PLAIN]
        lengths = [len(tokens) for tokens in plain]
        print(
            f"\n{kind}: {len(plain)} completions of {np.mean(lengths):.0f} tokens on average, {max(lengths)} at most\n"
        )
        print("| arm | completions a second | speed | equal to plain |\n|---|---|---|---|")
        figures[kind] = {}
        for arm in ARMS:
            times, own = found["seconds"][arm], found["completions"][arm]
            row = {
                "completions_per_second": len(own) / times.sum(),
                "speed": str(ratio(found["seconds"][PLAIN], times)),
                "equal": float(np.mean([a == b for a, b in zip(own, plain, strict=True)])),
            }
            figures[kind][arm] = row
            equal = f"{row['equal']:.1%}" if n == 1 else "-"
            print(f"| {arm} | {row['completions_per_second']:.2f} | {row['speed']} | {equal} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
