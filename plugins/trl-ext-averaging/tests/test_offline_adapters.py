"""Averages of LoRA adapters against dense arithmetic on what the adapters add to the weights."""

from __future__ import annotations

import pytest
import torch
from on_disk import average, edit_json, save_adapter, weights
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from trl_ext.errors import CheckpointError, ConfigurationError
from trl_ext.testing import tiny_llama

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # fp32 factors of size 1 with products of size 10


def deltas(folder) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, by PEFT itself, merged in fp64 into a base of zeros."""
    base = tiny_llama(hidden=16).double()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
    merged = PeftModel.from_pretrained(base, folder).double().merge_and_unload()
    return {name: tensor for name, tensor in merged.state_dict().items() if tensor.any()}


def check(folder, expected: dict[str, torch.Tensor]) -> None:
    found = deltas(folder)
    assert found.keys() == expected.keys()
    assert found
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **ROUNDING)


def combined(coefficients, folders) -> dict[str, torch.Tensor]:
    parts = [deltas(folder) for folder in folders]
    return {name: sum(c * part[name] for c, part in zip(coefficients, parts, strict=True)) for name in parts[0]}


def test_products_are_averaged_across_runs(tmp_path):
    folders = [save_adapter(tmp_path / str(seed), seed) for seed in range(3)]
    text = average(*folders, "-o", tmp_path / "mean")
    assert "by product" in text
    check(tmp_path / "mean", combined([1 / 3] * 3, folders))


def test_products_of_different_ranks_and_scales(tmp_path):
    folders = [
        save_adapter(tmp_path / "a", 0, r=2, lora_alpha=4),
        save_adapter(tmp_path / "b", 1, r=3, lora_alpha=5, use_rslora=True),
        save_adapter(tmp_path / "c", 2, r=1, lora_alpha=1, rank_pattern={"up_proj": 4}, alpha_pattern={"up_proj": 7}),
    ]
    average(*folders, "-o", tmp_path / "out", "-m", "weighted", "--weights", "0.2,0.5,0.3")
    check(tmp_path / "out", combined([0.2, 0.5, 0.3], folders))


def test_wise_ft_of_an_adapter_scales_it_towards_its_base(tmp_path):
    folder = save_adapter(tmp_path / "a")
    average(folder, "-o", tmp_path / "out", "-m", "wise-ft", "--alpha", "0.3")
    check(tmp_path / "out", combined([0.3], [folder]))
    assert weights(tmp_path / "out").keys() == weights(folder).keys()


def test_a_rank_gives_the_best_approximation_of_that_rank(tmp_path):
    folders = [save_adapter(tmp_path / str(seed), seed) for seed in range(3)]
    text = average(*folders, "-o", tmp_path / "out", "--lora", "product", "--rank", "2")
    assert "relative error of the worst module" in text
    expected, errors = {}, []
    for name, dense in combined([1 / 3] * 3, folders).items():
        u, s, v = torch.linalg.svd(dense)
        expected[name] = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
        errors.append(float(s[2:].norm() / s.norm()))
    check(tmp_path / "out", expected)
    assert f"{max(errors):.2e}" in text


def test_a_rank_above_the_stacked_one_is_exact(tmp_path):
    folders = [save_adapter(tmp_path / str(seed), seed) for seed in range(2)]
    average(*folders, "-o", tmp_path / "out", "--lora", "product", "--rank", "6")
    check(tmp_path / "out", combined([0.5, 0.5], folders))


def test_factors_are_averaged_along_one_run(tmp_path):
    folders = [save_adapter(tmp_path / f"checkpoint-{step}", step, step) for step in (1, 2, 3)]
    text = average(tmp_path, "-o", tmp_path / "out", "-m", "lawa", "--last", "2")
    assert "A and B each" in text
    one, other, found = (weights(folder) for folder in (*folders[1:], tmp_path / "out"))
    for name in found:
        torch.testing.assert_close(found[name], (one[name] + other[name]) / 2)
    average(tmp_path, "-o", tmp_path / "exact", "-m", "lawa", "--last", "2", "--lora", "product")
    check(tmp_path / "exact", combined([0.5, 0.5], folders[1:]))
    assert not torch.allclose(*(next(iter(deltas(tmp_path / kind).values())) for kind in ("out", "exact")), atol=0.1)


def test_trained_modules_are_averaged_as_they_are(tmp_path):
    folders = [save_adapter(tmp_path / str(seed), seed, modules_to_save=["lm_head"]) for seed in range(2)]
    average(*folders, "-o", tmp_path / "out")
    check(tmp_path / "out", combined([0.5, 0.5], folders))
    name = "base_model.model.lm_head.weight"
    torch.testing.assert_close(
        weights(tmp_path / "out")[name], (weights(folders[0])[name] + weights(folders[1])[name]) / 2
    )
    with pytest.raises(CheckpointError, match="no factors to scale"):
        average(folders[0], "-o", tmp_path / "wise", "-m", "wise-ft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "another"}, "base_model_name_or_path"),
        ({"use_dora": True}, "use_dora|DoRA"),
        ({"peft_type": "IA3"}, "peft_type"),
    ],
)
def test_adapters_that_do_not_belong_together_are_refused(tmp_path, changes, message):
    folders = [save_adapter(tmp_path / str(seed), seed) for seed in range(2)]
    edit_json(folders[1] / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        average(*folders, "-o", tmp_path / "out")


def test_what_products_cannot_do_is_refused(tmp_path):
    folders = [save_adapter(tmp_path / str(seed), seed) for seed in range(2)]
    dora = save_adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(CheckpointError, match="DoRA"):
        average(dora, "-o", tmp_path / "out", "-m", "wise-ft")
    with pytest.raises(ConfigurationError, match="slerp has no meaning for products"):
        average(*folders, "-o", tmp_path / "out", "-m", "slerp")
    with pytest.raises(ConfigurationError, match="--rank 2 needs --lora product"):
        average(*folders, "-o", tmp_path / "out", "--lora", "factors", "--rank", "2")
    other = save_adapter(tmp_path / "other", lora_alpha=8)
    with pytest.raises(CheckpointError, match="differ in their configs: lora_alpha"):
        average(folders[0], other, "-o", tmp_path / "out", "--lora", "factors")


def test_an_average_of_adapters_loads_in_transformers_and_merges_by_peft(tmp_path):
    base = tiny_llama(hidden=16)
    base.save_pretrained(tmp_path / "base")
    folders = [save_adapter(tmp_path / str(seed), seed) for seed in range(2)]
    for folder in folders:
        edit_json(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    average(*folders, "-o", tmp_path / "mean")
    with torch.no_grad():
        for name, delta in combined([0.5, 0.5], folders).items():
            base.get_parameter(name).add_(delta.float())
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mean").merge_and_unload().save_pretrained(tmp_path / "merged")
    tokens = torch.arange(8)[None]
    for loaded in ("mean", "merged"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / loaded)
        torch.testing.assert_close(model(tokens).logits, base(tokens).logits, **ROUNDING)
