"""`trl-ext probe passk`: pass@k of models on a data set, sampled in batches, resumed by appending."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from trl_ext.errors import ConfigurationError
from trl_ext_mixing.fingerprints import rows_fingerprint, weights_fingerprint
from trl_ext_mixing.loading import check_template, load_model, load_tokenizer, refuse_bad_options
from trl_ext_mixing.passk_results import Result, print_results, write_results
from trl_ext_mixing.progress import Report
from trl_ext_mixing.reward_functions import Judge, RewardFunction, check_reward, load_reward
from trl_ext_mixing.sample_file import SampleFile


@dataclass(frozen=True)
class PasskSettings:
    """What decides the samples: a file of samples belongs to one of these. `solved_at` alone only judges them."""

    model: str
    dataset: str
    reward: str
    split: str = "train"
    dataset_name: str | None = None
    columns: str | None = None
    limit: int | None = None
    n: int = 32
    temperature: float = 0.6
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 64
    solved_at: float = 1.0
    dtype: str = "auto"
    seed: int = 0


def passk(
    model: Annotated[
        list[str], typer.Option(help="Model: a path, an adapter's path, or a hub id. Several: compared with the first.")
    ],
    dataset: Annotated[
        str, typer.Option(help="Problems: a .jsonl, .json, .csv or .parquet file, or a hub id, with a column `prompt`.")
    ],
    reward: Annotated[
        str, typer.Option(help="Reward function in TRL's form: package.module.function, or one of TRL's by name.")
    ],
    output: Annotated[Path, typer.Option(help="File of the samples; the results go beside it.")] = Path("passk.jsonl"),
    n: Annotated[int, typer.Option(help="Samples per problem.", min=1)] = 32,
    k: Annotated[str, typer.Option(help="Values of k, with commas; none above n.")] = "1,8,32",
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 decodes greedily.", min=0.0)] = 0.6,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.", min=0.0, max=1.0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion in tokens.", min=1)] = 512,
    solved_at: Annotated[float, typer.Option(help="Reward from which a sample counts as correct.")] = 1.0,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    dataset_name: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    columns: Annotated[str | None, typer.Option(help="Renaming of columns: question=prompt.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first problems only.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Completions generated at a time.", min=1)] = 64,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    dtype: Annotated[str, typer.Option(help="Precision of the weights: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
) -> None:
    """pass@k on problems, unbiased, with confidence intervals; run it again to go on where it was interrupted."""
    ks = read_ks(k, n)
    refuse_bad_options(confidence, dtype, device)
    outputs = output_files(output, model)
    first = PasskSettings(
        model[0], dataset, reward, split, dataset_name, columns, limit, n, temperature, top_p, max_new_tokens,
        batch_size, solved_at, dtype, seed,
    )  # fmt: skip
    rows = load_rows(first)
    function = load_reward(reward)
    check_reward(function, reward, rows[0])
    if not isinstance(rows[0]["prompt"], str):
        for name in model:
            check_template(load_tokenizer(name), name, "prompt")
    results = []
    with ExitStack() as stack:
        # Every model and file is looked at before the first model samples, perhaps for hours.
        settings = {name: replace(first, model=name) for name in model}
        files = {name: stack.enter_context(SampleFile(outputs[name], header(settings[name], rows))) for name in model}
        report = stack.enter_context(Report())
        for name in model:
            report.start(name, len(rows) * n)
            for done in sample(settings[name], rows, files[name], reward=function, device=device):
                report.update(done)
            results.append(Result.of(name, files[name], len(rows), ks, solved_at, confidence))
            gc.collect()  # models hold circles of references, and the next one wants the memory
    write_results(output, results)
    print_results(results)


def read_ks(text: str, n: int) -> list[int]:
    """The values of k, ascending.

    Raises:
        ConfigurationError: not whole numbers from 1 to n.
    """
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigurationError(f"--k {text!r} is not a list of whole numbers such as 1,8,32") from None
    if ks[0] < 1 or ks[-1] > n:
        raise ConfigurationError(f"--k {text!r} with --n {n}: every k is in [1, n]; raise --n or lower --k")
    return ks


def output_files(output: Path, models: Sequence[str]) -> dict[str, Path]:
    """The file of samples of each model: `output` of a single one, else p.MODEL.jsonl with `output` p.jsonl.

    Raises:
        ConfigurationError: a model is there twice, or two names give one file.
    """
    if len(models) == 1:
        return {models[0]: output}
    files: dict[str, Path] = {}
    for model in models:
        # The end of a long path tells checkpoints apart.
        name = re.sub(r"[^\w.-]+", "-", model).strip("-.")[-100:]
        file = output.with_name(f"{output.stem}.{name}{output.suffix}")
        if model in files or file in files.values():
            raise ConfigurationError(
                f"--model {model!r}: its samples would go to {file}, as another model's; rename it"
            )
        files[model] = file
    return files


def load_rows(settings: PasskSettings) -> list[dict[str, Any]]:
    """The problems.

    Raises:
        ConfigurationError: none, without a column `prompt`, or with an empty one.
    """
    from trl_ext.data import load_dataset_spec, parse_columns

    spec = {
        "path": settings.dataset,
        "name": settings.dataset_name,
        "split": settings.split,
        "columns": parse_columns(settings.columns, "--columns"),
    }
    data = load_dataset_spec(spec)
    names = data.column_names
    if "prompt" not in names:
        raise ConfigurationError(
            f"{settings.dataset} has no column 'prompt' (there are {', '.join(names)}); "
            f"rename one: --columns {names[0]}=prompt"
        )
    if not len(data):
        raise ConfigurationError(f"{settings.dataset} has no problems")
    rows = list(data.select(range(min(settings.limit or len(data), len(data)))))
    for i, row in enumerate(rows):
        if not row["prompt"] or not isinstance(row["prompt"], str | list):
            raise ConfigurationError(f"{settings.dataset}: the prompt of row {i} is {row['prompt']!r}")
    return rows


def header(settings: PasskSettings, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What samples belong to: the settings, and the content of the rows and weights that they name.

    Raises:
        ConfigurationError: there is no such model.
    """
    return {
        "settings": asdict(settings),
        "data": rows_fingerprint(rows),
        "weights": weights_fingerprint(settings.model),
    }


def sample(
    settings: PasskSettings,
    rows: Sequence[dict[str, Any]],
    file: SampleFile,
    *,
    loaded: tuple[Any, Any] | None = None,
    reward: RewardFunction | None = None,
    device: str = "auto",
) -> Iterator[int]:
    """Draw and judge the samples that the file does not hold yet, a batch at a time.

    Each batch has a seed of its own, so an interrupted run ends with the samples of an uninterrupted one (on the same
    kind of device).

    Args:
        settings: what to sample.
        rows: the problems; the reward function receives their columns.
        file: where the samples go.
        loaded: model and tokenizer, where they are at hand.
        reward: the function, where it is at hand.
        device: where to put the model.

    Yields:
        Number of samples in the file.

    Raises:
        ConfigurationError: the model or the reward function cannot be used.
    """
    from trl_ext_mixing.sampling import batch_seed, batches, complete, end_ids

    held = file.samples
    yield len(held)
    if len(held) == len(rows) * settings.n:
        return
    with Judge(reward or load_reward(settings.reward), settings.reward, rows[0]) as judge:
        model, tokenizer = loaded or load_model(settings.model, settings.dtype, device)
        ends = end_ids(model, tokenizer)
        for number, pairs in batches(len(rows), settings.n, settings.batch_size):
            if all(pair in held for pair in pairs):
                continue
            completions = complete(
                model,
                tokenizer,
                [rows[i]["prompt"] for i, _ in pairs],
                seed=batch_seed(settings.seed, number),
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_new_tokens=settings.max_new_tokens,
            )
            rewards = judge([rows[i] for i, _ in pairs], completions, [i for i, _ in pairs])
            file.append(
                {"problem": i, "sample": j, "reward": value, "tokens": len(ids), "cut": not ids or ids[-1] not in ends}
                | {"completion": completion}
                for (i, j), (completion, ids), value in zip(pairs, completions, rewards, strict=True)
                if (i, j) not in held
            )
            yield len(held)
