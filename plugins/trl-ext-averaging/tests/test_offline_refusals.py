"""Checkpoints that must not be averaged, and outputs that are whole or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_disk import average, edit_json, save, save_adapter, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl_ext_averaging.offline import average as average_module
from trl_ext_averaging.offline.methods import Request
from trl_ext_averaging.offline.tensorfile import TensorFileWriter, read_header

from trl_ext.errors import CheckpointError, ConfigurationError
from trl_ext.testing import tiny_llama, tiny_qwen2, tiny_tokenizer


@pytest.fixture
def pair(tmp_path):
    return [save(tmp_path / name, seed) for seed, name in enumerate("ab")]


def refused(pair, tmp_path, message, *options, error=CheckpointError):
    """One line that the command ends with: no cause whose traceback would be shown."""
    with pytest.raises(error, match=message) as caught:
        average(*pair, "-o", tmp_path / "out", *options)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError | None)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def rewrite(folder, change) -> None:
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# Inputs.


def test_other_architectures(pair, tmp_path):
    tiny_qwen2(hidden=16).save_pretrained(pair[1])
    refused(pair, tmp_path, "differ in their configs: architectures")


def test_other_sizes(pair, tmp_path):
    tiny_llama(hidden=24).save_pretrained(pair[1])
    refused(pair, tmp_path, "hidden_size \\(16 and 24\\)")


def test_a_config_that_changes_the_function(pair, tmp_path):
    edit_json(pair[1] / "config.json", rms_norm_eps=0.1)
    refused(pair, tmp_path, "rms_norm_eps")


def test_configs_that_only_say_it_differently_are_accepted(pair, tmp_path):
    config = json.loads((pair[1] / "config.json").read_text())
    del config["attention_bias"]  # False is the default
    config |= {"transformers_version": "4.0.0", "use_cache": False, "pad_token_id": 5, "_name_or_path": "x"}
    (pair[1] / "config.json").write_text(json.dumps(config))
    average(*pair, "-o", tmp_path / "out")


def test_other_tensors_and_shapes(pair, tmp_path):
    rewrite(pair[1], lambda tensors: tensors.pop("model.norm.weight"))
    refused(pair, tmp_path, "model.norm.weight in only one")
    rewrite(pair[1], lambda tensors: tensors.update({"model.norm.weight": torch.ones(8)}))
    refused(pair, tmp_path, r"model.norm.weight has shapes \(16,\) and \(8,\)")


def test_other_dtypes_need_a_choice(pair, tmp_path):
    save(pair[1], 1, dtype=torch.bfloat16)
    refused(pair, tmp_path, "is float32 and bfloat16; choose one with --dtype")
    average(*pair, "-o", tmp_path / "out", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_integers_are_kept_if_equal_and_refused_if_not(pair, tmp_path):
    for value, folder in enumerate(pair):
        rewrite(folder, lambda tensors, value=value: tensors.update(steps=torch.tensor([value // 2, 3])))
    average(*pair, "-o", tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")["steps"], torch.tensor([0, 3]))
    rewrite(pair[1], lambda tensors: tensors.update(steps=torch.tensor([4, 4])))
    with pytest.raises(CheckpointError, match="steps holds integers"):
        average(*pair, "-o", tmp_path / "other")


def test_a_tie_that_the_file_breaks(tmp_path):
    pair = [save(tmp_path / name, seed, tie=True) for seed, name in enumerate("ab")]
    rewrite(pair[1], lambda tensors: tensors.update({"lm_head.weight": torch.ones(259, 16)}))
    refused(pair, tmp_path, "ties lm_head.weight to model.embed_tokens.weight, but the two differ")


def test_other_vocabularies(pair, tmp_path):
    tokenizer = json.loads((pair[1] / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"max_length": 7, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    (pair[1] / "tokenizer.json").write_text(json.dumps(tokenizer))  # a setting that trainers leave behind
    average(*pair, "-o", tmp_path / "same")
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    other.save_pretrained(pair[1])
    refused(pair, tmp_path, "different vocabularies")


def test_models_and_adapters_do_not_mix(pair, tmp_path):
    refused([pair[0], save_adapter(tmp_path / "adapter")], tmp_path, "one is a model, the other a adapter")


def test_broken_and_pickled_inputs(pair, tmp_path):
    file = pair[1] / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    refused(pair, tmp_path, "is cut off")
    file.write_bytes(b"\xff" * 100)
    refused(pair, tmp_path, "is not a safetensors file")
    file.rename(pair[1] / "pytorch_model.bin")
    refused(pair, tmp_path, "pickled weights")
    refused([pair[0], tmp_path / "nowhere"], tmp_path, "is not a folder")
    file.write_bytes(whole)
    edit_json(pair[1] / "config.json")
    (pair[1] / "config.json").write_text("{")
    refused(pair, tmp_path, "config.json is not JSON")


def test_a_missing_shard(tmp_path):
    pair = [save(tmp_path / name, seed, "20KB") for seed, name in enumerate("ab")]
    next(pair[1].glob("model-00002-*")).unlink()
    refused(pair, tmp_path, "model-00002-of-.* is missing")


def test_quantised_weights(pair, tmp_path):
    rewrite(pair[1], lambda tensors: tensors.update(scale=torch.ones(4).to(torch.float8_e4m3fn)))
    refused(pair, tmp_path, "scale has dtype F8_E4M3")


def text_in(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def header(content: object, data: bytes = b""):
    text = json.dumps(content).encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor(**fields: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (text_in("config.json", "[]"), "config.json holds a JSON list instead of a mapping"),
        (text_in("config.json", "[" * 100_000), "config.json is not JSON"),
        (text_in("config.json", '{"model_type": []}'), "differ in their configs"),
        (text_in("config.json", '{"model_type": "llama", "hidden_size": "many"}'), "cannot read its config"),
        (text_in("model.safetensors.index.json", "{}"), "has no weight_map"),
        (text_in("model.safetensors.index.json", '{"weight_map": {"w": 3}}'), "has no weight_map"),
        (text_in("model.safetensors.index.json", '{"weight_map": {}}'), "holds no tensors"),
        (text_in("trainer_state.json", "{"), "trainer_state.json is not JSON"),
        (text_in("trainer_state.json", '{"global_step": "six"}'), "global_step 'six' is not a number of steps"),
        (text_in("tokenizer.json", "[]"), "tokenizer.json holds a JSON list"),
        (text_in("tokenizer.json", '{"added_tokens": [{}]}'), "tokenizer.json does not describe a tokenizer"),
        (text_in("model.safetensors", ""), "is not a safetensors file"),
        (header([]), "is not a safetensors file"),
        (header({}), "holds no tensors"),
        (header({"w": {}}), "is not a safetensors file"),
        (header(tensor(shape=[2]), bytes(4)), r"w of shape \[2\] does not fill its 4 bytes"),
        (header(tensor(shape="ab"), bytes(4)), "is not a safetensors file"),
        (header(tensor(dtype=[]), bytes(4)), "is not a safetensors file"),
        (header(tensor(data_offsets=[-4, 0]), bytes(4)), "does not fill"),
        (header(tensor(data_offsets=[4]), bytes(4)), "is not a safetensors file"),
    ],
)
def test_damaged_files(pair, tmp_path, damage, message):
    damage(pair[1])
    refused(pair, tmp_path, message)


def test_a_tensor_of_another_shape_beside_products(tmp_path):
    pair = [save_adapter(tmp_path / name, i, modules_to_save=["lm_head"]) for i, name in enumerate("ab")]
    file = pair[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.lm_head.weight"
    save_file({**tensors, name: torch.ones(3, 16)}, file)
    refused(pair, tmp_path, r"lm_head.weight has shapes \(259, 16\) and \(3, 16\)")
    factor = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, factor: torch.ones(2, 5)}, file)
    refused(pair, tmp_path, r"lora_A.weight has shapes \(2, 16\) and \(2, 5\)")
    save_file({**tensors, factor: torch.ones(3, 16)}, file)
    refused(pair, tmp_path, "have no common rank")
    save_file({**tensors, factor: torch.full((2, 16), torch.nan)}, file)
    refused(pair, tmp_path, "they hold NaN or infinity", "--rank", "2")


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": None}, {"alpha_pattern": {"(": 3}}, {"alpha_pattern": [1]}, {"lora_alpha": "much"}]
)
def test_adapters_without_a_scale(tmp_path, changes):
    adapter = save_adapter(tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", **changes)
    refused([adapter], tmp_path, "gives .* no lora_alpha", "-m", "wise-ft")


def test_values_too_large_for_the_dtype(pair, tmp_path):
    for folder in pair:
        rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    refused(
        pair, tmp_path, r"model.norm.weight has a value of 1e\+06, too large for torch.float16", "--dtype", "float16"
    )
    average(*pair, "-o", tmp_path / "fits", "--dtype", "bfloat16")


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-m", "median"], "--method 'median' is not one of mean, weighted"),
        (["-m", "weighted"], "needs --weights with 2 numbers"),
        (["-m", "weighted", "--weights", "0.5,0.6"], "sum to 1.1"),
        (["-m", "weighted", "--weights", "half"], "--weights 'half'"),
        (["-m", "wise-ft", "--alpha", "1.5"], "--alpha 1.5"),
        (["-m", "ema", "--decay", "1"], "--decay 1.0"),
        (["-m", "lawa", "--last", "3"], "--last 3: there are only 2"),
        (["-m", "online"], "takes 1 checkpoint"),
        (["-m", "soup"], "need --metric"),
        (["--sweep", "0,1", "--metric", "math:fsum"], "mean has nothing to sweep"),
        (["-m", "soup", "--metric", "best"], "--metric 'best' is not loss"),
        (["-m", "soup", "--metric", "loss"], "needs --data"),
        (["-m", "soup", "--metric", "nowhere:f"], "cannot be loaded"),
        (["--lora", "factors"], "these are models"),
        (["--lora", "both"], "--lora 'both'"),
        (["--dtype", "int8"], "--dtype 'int8'"),
        (["--max-shard-size", "big"], "--max-shard-size 'big'"),
        (["-m", "mergekit:linear", "--parameters", "{"], "is not JSON"),
        (["-m", "mergekit:linear", "--parameters", "[]"], "is no mapping"),
        (["-m", "mergekit:linear", "--weights", "1"], "--weights gives 1 numbers for 2 inputs"),
        (["-m", "weighted", "--weights", "nan,1"], "--weights 'nan,1' is not a list of numbers"),
        (["-m", "weighted", "--weights", ""], "--weights '' is not a list of numbers"),
        (["-m", "lawa", "--sweep", "0,1", "--metric", "math:fsum"], "--sweep 0: lawa takes a whole number"),
        (["-m", "lawa", "--sweep", "1.5", "--metric", "math:fsum"], "--sweep 1.5: lawa takes a whole number"),
        (["-m", "lawa", "--sweep", "", "--metric", "math:fsum"], "--sweep '' is not a list"),
        (["--max-shard-size", "nan"], "--max-shard-size 'nan'"),
        (["--max-shard-size", "inf"], "--max-shard-size 'inf'"),
        (["-m", "soup", "--metric", "math:pi"], "is a float and no function"),
        (["-m", "soup", "--metric", "math:fsum"], "--metric 'math:fsum' failed on .*TypeError"),
        (["-m", "soup", "--metric", "loss", "--data", "nowhere.jsonl"], "--data: there is no file 'nowhere.jsonl'"),
        (["--alpha", "0.3"], "--alpha does nothing with --method mean; it is for wise-ft, slerp"),
        (["-m", "slerp", "--weights", "0.5,0.5"], "--weights does nothing with --method slerp"),
        (["-m", "mergekit:linear", "--decay", "0.5"], "--decay does nothing with --method mergekit:linear"),
        (["-m", "slerp", "--alpha", "0.5", "--sweep", "0,1", "--metric", "math:fsum"], "--sweep tries values of alpha"),
        (["--metric", "math:fsum"], "--metric does nothing without --sweep or --method soup"),
        (["--no-maximize"], "do nothing without --metric"),
        (["-m", "soup", "--metric", "math:fsum", "--data", "x"], "--data does nothing without --metric loss"),
    ],
)
def test_options_that_cannot_work(pair, tmp_path, options, message):
    refused(pair, tmp_path, message, *options, error=ConfigurationError)


def test_the_number_of_inputs(pair, tmp_path):
    refused(pair[:1], tmp_path, "takes 2 or more inputs, not 1", error=ConfigurationError)
    refused([*pair, pair[0]], tmp_path, "takes 2 inputs, not 3", "-m", "slerp", error=ConfigurationError)
    refused(pair[:1], tmp_path, "only an adapter may come alone", "-m", "wise-ft", error=ConfigurationError)


def test_what_the_file_system_refuses(pair, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"file/.*Not a directory") as caught:
        average(*pair, "-o", tmp_path / "file/out")
    assert caught.value.__cause__ is None


def test_the_command_line_ends_with_one_line_and_exit_code_2(pair, tmp_path):
    command = [Path(sys.executable).with_name("trl-ext"), "average", pair[0], "nowhere", "-o", tmp_path / "out"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "trl-ext: nowhere is not a folder; download a model first: hf download <id> --local-dir <folder>\n"
    )


# Outputs.


def test_a_failure_half_way_leaves_nothing(pair, tmp_path):
    seen = []

    def fail(nbytes):
        seen.append(nbytes)
        if len(seen) == 5:
            raise KeyboardInterrupt

    plan = Request("mean", tuple(pair)).plan()
    with pytest.raises(KeyboardInterrupt):
        average_module(plan, tmp_path / "out", advance=fail)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


KILLED = """
import sys, time
from pathlib import Path
from trl_ext_averaging.offline import average
from trl_ext_averaging.offline.methods import Request

def slowly(nbytes):
    print(nbytes, flush=True)
    time.sleep(0.2)

inputs = tuple(map(Path, sys.argv[1:3]))
average(Request("mean", inputs, shared={"max_shard_bytes": 20_000}).plan(), Path(sys.argv[3]), advance=slowly)
"""


def test_a_killed_process_leaves_nothing_that_loads(pair, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, *map(str, pair), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(12):  # into the second or third of five shards
        assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    (left,) = tmp_path.glob(".out*")
    assert any(left.glob("*.safetensors"))
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(left)
    average(*pair, "-o", output)  # and is cleaned up by the next run
    assert not list(tmp_path.glob(".out*"))
    AutoModelForCausalLM.from_pretrained(output)


# Files.


def test_files_are_read_as_the_library_wrote_them_and_the_other_way_round(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "bf16": torch.randn(3, 5).to(torch.bfloat16),
        "ints": torch.arange(7, dtype=torch.int16),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "library.safetensors")
    header = read_header(tmp_path / "library.safetensors")
    assert header.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(header[name].tensor(), tensor)
    assert torch.equal(header["ints"].read(2, 5), tensors["ints"][2:5])
    ours = tmp_path / "ours.safetensors"
    with TensorFileWriter(
        ours, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    ) as file:
        for tensor in tensors.values():
            for piece in tensor.flatten().split(2):
                file.write(piece)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(ours).items())


def test_a_file_that_is_not_filled_is_an_error(tmp_path):
    with (
        pytest.raises(CheckpointError, match="4 bytes of its tensors were not written"),
        TensorFileWriter(tmp_path / "x", {"a": (torch.float32, (2,))}) as file,
    ):
        file.write(torch.ones(1))
