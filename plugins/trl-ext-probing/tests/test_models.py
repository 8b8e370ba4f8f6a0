"""Models, adapters and what tells their weights apart."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from trl_ext_probing import fingerprints
from trl_ext_probing.fingerprints import rows_fingerprint, weights_fingerprint
from trl_ext_probing.models import check_template, find_device, load_model

from trl_ext.errors import ConfigurationError
from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

IDS = torch.arange(20)[None]


@pytest.fixture
def base(tmp_path: Path) -> str:
    return save_model(tiny_llama(hidden=16), tiny_tokenizer(), tmp_path / "base")


def adapter(base: str, path: Path, seed: int = 0, **config: Any) -> Any:
    """A LoRA adapter with all its parameters at random, saved without a tokenizer; the model with it is returned."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(hidden=16), peft.LoraConfig(target_modules=["q_proj"], r=2, **config))
    model.peft_config["default"].base_model_name_or_path = base
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    model.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"task_type": "CAUSAL_LM"}], ids=["lora", "dora", "task"])
def test_an_adapter_is_loaded_as_it_was_saved(base: str, tmp_path: Path, config: dict[str, Any]) -> None:
    saved = adapter(base, tmp_path / "adapter", **config)
    loaded, tokenizer = load_model(str(tmp_path / "adapter"))
    plain, _ = load_model(base)
    with torch.no_grad():
        expected, found, without = (m(IDS).logits for m in (saved, loaded, plain))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(without, expected, atol=1e-3)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab(), "the base's"
    assert not loaded.training


def test_an_adapter_without_peft_is_refused(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(base, tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigurationError, match="PEFT is not installed"):
        load_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize("name", ["./nowhere", "no-such-model-of-anyone", "/nowhere/at/all"])
def test_a_model_that_is_not_there_is_refused(name: str) -> None:
    for attempt in (load_model, weights_fingerprint):
        with pytest.raises(ConfigurationError, match=f"model {name!r}: there is no such folder"):
            attempt(name)


def test_a_folder_or_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"neither config\.json nor adapter_config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="is a file"):
        load_model(str(tmp_path / "model.safetensors"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="names no base_model_name_or_path"):
        load_model(str(tmp_path))


def test_options_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"--dtype 'bf16' is not one of auto, float32, bfloat16"):
        load_model("any", "bf16")
    for device in ("gpu", "cuda:77"):
        with pytest.raises(ConfigurationError, match=f"--device '{device}' cannot be used"):
            find_device(device)
    assert find_device("cpu").type == "cpu"
    with pytest.raises(ConfigurationError, match="has no chat template"):
        check_template(object(), "m", "prompt")


def test_processes_of_a_launcher_take_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` stands for an accelerator: every machine has as many of it as are asked for."""
    assert find_device("meta") == torch.device("meta:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("meta") == torch.device("meta:1")
    assert find_device("meta:3") == torch.device("meta:3"), "a number is the user's choice"
    assert find_device("cpu") == torch.device("cpu")


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_other_weights_or_another_tokenizer_in_the_same_folder_are_told_apart(base: str) -> None:
    first = weights_fingerprint(base)
    assert weights_fingerprint(base) == first
    Path(base, "trainer_state.json").write_text("{}")  # decides nothing
    os.utime(Path(base, "model.safetensors"), (0, 0))  # a copy is the same model
    assert weights_fingerprint(base) == first
    seen = [first]
    tiny_llama(hidden=16, seed=1).save_pretrained(base)
    seen.append(weights_fingerprint(base))
    config = json.loads(Path(base, "tokenizer_config.json").read_text())
    Path(base, "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    seen.append(weights_fingerprint(base))
    assert len({json.dumps(s) for s in seen}) == 3


def test_an_adapter_has_its_base_s_fingerprint_as_well(base: str, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    first = weights_fingerprint(str(tmp_path / "adapter"))
    assert first["base model"] == weights_fingerprint(base)["model"]
    adapter(base, tmp_path / "adapter", seed=1)
    second = weights_fingerprint(str(tmp_path / "adapter"))
    assert second["base model"] == first["base model"]
    assert second["model"] != first["model"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_large_file_is_told_apart_without_being_read_whole(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training that moves one small tensor only, such as the weight of a norm, in a file beyond the limit."""
    monkeypatch.setattr(fingerprints, "_WHOLE", 1000)
    (tmp_path / "config.json").write_text("{}")
    tensors = {"large": torch.zeros(3 * 2**20), "norm": torch.ones(64)}
    save_file(tensors, tmp_path / name)
    first = weights_fingerprint(str(tmp_path))
    read = sum(map(len, fingerprints._content(tmp_path / name)))
    assert read < (200_000 if name == "model.safetensors" else 17 * 2**20)
    save_file(tensors | {"norm": torch.ones(64) * 1.001}, tmp_path / name)
    norm_moved = weights_fingerprint(str(tmp_path))
    save_file(tensors | {"large": torch.zeros(3 * 2**20) + 1e-3}, tmp_path / name)
    assert len({first["model"], norm_moved["model"], weights_fingerprint(str(tmp_path))["model"]}) == 3


def test_a_hub_id_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils

    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(transformers.utils, "cached_file", lambda model, name: str(snapshot / name))
    assert weights_fingerprint("someone/something") == {"model": "commit 0123abc"}


def test_rows_are_told_apart_by_every_column_and_their_order() -> None:
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]
    others = [rows[::-1], rows[:1], [rows[0], rows[1] | {"answer": "4"}], [r | {"level": 1} for r in rows]]
    digests = [rows_fingerprint(r)["digest"] for r in (rows, *others)]
    assert len(set(digests)) == 5
    assert rows_fingerprint([dict(reversed(r.items())) for r in rows]) == rows_fingerprint(rows)
    assert rows_fingerprint(rows)["columns"] == ["answer", "prompt"]
