"""Tapped and untapped passes of tiny models, and per-sample gradients by plain autograd."""

from types import SimpleNamespace

import torch
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head
from trl_ext_data_regularization.layers import Batch, find_layers
from trl_ext_data_regularization.taps import Taps

from trl_ext.testing import tiny_llama, tiny_qwen2

VOCAB = 40


def lora(model):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return wrapped


def model_of(kind: str):
    """A tiny model with TRL's fused head: full, tied (with biases), or LoRA."""
    torch.manual_seed(0)
    model = (tiny_qwen2 if kind == "tied" else tiny_llama)(VOCAB, hidden=16, layers=2)
    if kind == "tied":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    # At initialisation all gradients are small and alike; sharper weights tell samples apart.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return lora(model) if kind == "lora" else model


def batch_of(rows: int, width: int, seed: int, padding: bool = True) -> dict[str, Tensor]:
    """Random tokens, labels after a prompt, and padding on the right of all rows but the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, width), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :2] = -100
    for row in range(1, rows if padding else 1):
        labels[row, width - row :] = -100
        mask[row, width - row :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses_of(model, batch) -> Tensor:
    """(B, T) negative log-probabilities, through TRL's fused head."""
    return -model(**batch, fused_lm_head=True, use_cache=False).log_probs


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sample_gradients(model, batch) -> list[list[Tensor]]:
    """Per sample, the gradient of its summed loss for every trainable parameter, by autograd on that sample alone."""
    out = []
    for row in range(len(batch["input_ids"])):
        loss = losses_of(model, {k: v[row : row + 1] for k, v in batch.items()}).sum()
        grads = torch.autograd.grad(loss, list(trainable(model).values()), allow_unused=True)
        out.append(
            [torch.zeros_like(p) if g is None else g for g, p in zip(grads, trainable(model).values(), strict=True)]
        )
    return out


def tapped(model):
    """Layers, uses and taps of a model."""
    layers, uses = find_layers(model, list(trainable(model)))
    return SimpleNamespace(layers=layers, uses=uses, taps=Taps(model, uses))


def whole(batch, offset: int = 0) -> Batch:
    rows, width = batch["input_ids"].shape
    return Batch(torch.arange(rows).unsqueeze(1).expand(rows, width), rows, offset, True)
