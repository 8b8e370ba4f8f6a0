"""Every objective through the conformance kit; the formulas are written from the logits, as in the papers.

The conformance test of each compares one whole step, through TRL's collator, head and optimiser; `test_formulas.py`
covers the options on single batches.
"""

from __future__ import annotations

import math
from tempfile import TemporaryDirectory

import pytest
from torch import Tensor
from trl_ext_objectives.asft import ASFT
from trl_ext_objectives.auto import Auto
from trl_ext_objectives.by_column import ByColumn
from trl_ext_objectives.chord_phi import ChordPhi
from trl_ext_objectives.deft import DEFT
from trl_ext_objectives.dft import DFT
from trl_ext_objectives.eaft import EAFT
from trl_ext_objectives.entropy import Entropy
from trl_ext_objectives.focal import Focal
from trl_ext_objectives.gem import GEM
from trl_ext_objectives.huber import Huber
from trl_ext_objectives.idft import IDFT
from trl_ext_objectives.iw_sft import IwSFT
from trl_ext_objectives.log1mp import Log1mp
from trl_ext_objectives.mixture import Mixture
from trl_ext_objectives.nll import NLL
from trl_ext_objectives.power import Power
from trl_ext_objectives.psft import PSFT
from trl_ext_objectives.rho1 import Rho1
from trl_ext_objectives.talr import TALR
from trl_ext_objectives.threshold import Threshold
from trl_ext_objectives.weighted import Weighted
from trl_ext_objectives.wit import WIT

from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer
from trl_ext.testing.conformance import conformance

OTHER = TemporaryDirectory(prefix="other-model-")
save_model(tiny_llama(hidden=16, layers=1, seed=5), tiny_tokenizer(), OTHER.name)


def p_of(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(-1).gather(-1, labels[:, None])[:, 0]


def entropy_of(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    return -p_of(logits, labels).log()


def power(logits: Tensor, labels: Tensor) -> Tensor:
    return (1 - p_of(logits, labels) ** 0.5) / 0.5


def dft(logits: Tensor, labels: Tensor) -> Tensor:
    p = p_of(logits, labels)
    return -p.detach() * p.log()


def idft(logits: Tensor, labels: Tensor) -> Tensor:
    p = p_of(logits, labels)
    gate = p ** (1 / (p * entropy_of(logits).exp())).clamp(0.1, 2)
    return -gate.detach() * p.log()


def deft(logits: Tensor, labels: Tensor) -> Tensor:
    a = (logits.softmax(-1) ** 2).sum(-1).detach()
    return (1 - p_of(logits, labels) ** a) / a


def psft(logits: Tensor, labels: Tensor) -> Tensor:
    """Before the first step the ratio to the start is 1."""
    p = p_of(logits, labels)
    return -p / p.detach()


def eaft(logits: Tensor, labels: Tensor) -> Tensor:
    top = logits.softmax(-1).topk(20).values.detach()
    top = top / top.sum(-1, keepdim=True)
    return -(top * top.log()).sum(-1) / math.log(20) * nll(logits, labels)


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nll(logits, labels) - 0.3 * entropy_of(logits)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    p = p_of(logits, labels)
    return -((1 - p) ** 2) * p.log()


def huber(logits: Tensor, labels: Tensor) -> Tensor:
    """Quadratic: 1 - p of an untrained model is below the bend at 1."""
    return (1 - p_of(logits, labels)) ** 2 / 2


def log1mp(logits: Tensor, labels: Tensor) -> Tensor:
    return (1 - p_of(logits, labels)).log()


def chord_phi(logits: Tensor, labels: Tensor) -> Tensor:
    p = p_of(logits, labels)
    return -(p * (1 - p)).detach() * p.log()


def mixture(logits: Tensor, labels: Tensor) -> Tensor:
    p = p_of(logits, labels)
    return 0.3 * (1 - p**2) / 2 - 0.7 * p.detach() * p.log()


WITH_PROMPT = {"completion_only_loss": False}  # the prompt has labels

test_power = conformance(Power(0.5), trainer="sft", formula=power)


@pytest.mark.slow
class TestOthers:
    """All of them, which takes minutes."""

    test_nll = staticmethod(conformance(NLL(), trainer="sft", formula=nll))
    test_dft = staticmethod(conformance(DFT(), trainer="sft", formula=dft))
    test_idft = staticmethod(conformance(IDFT(), trainer="sft", formula=idft))
    test_deft = staticmethod(conformance(DEFT(), trainer="sft", formula=deft))
    test_asft = staticmethod(conformance(ASFT(), trainer="sft", formula=dft))  # at the start the divergence is flat
    test_psft = staticmethod(conformance(PSFT(refresh_every=2), trainer="sft", formula=psft))
    test_iw_sft = staticmethod(
        conformance(IwSFT(temperature=20), trainer="sft", formula=nll)
    )  # at the start each ratio is 1
    test_eaft = staticmethod(conformance(EAFT(), trainer="sft", formula=eaft))
    test_talr = staticmethod(conformance(TALR(), trainer="sft"))
    test_gem = staticmethod(conformance(GEM(), trainer="sft"))
    test_entropy = staticmethod(conformance(Entropy(0.3), trainer="sft", formula=entropy))
    test_focal = staticmethod(conformance(Focal(2.0), trainer="sft", formula=focal))
    test_huber = staticmethod(conformance(Huber(1.0), trainer="sft", formula=huber))
    test_log1mp = staticmethod(conformance(Log1mp(), trainer="sft", formula=log1mp))
    test_rho1 = staticmethod(conformance(Rho1(f"model:{OTHER.name}"), trainer="sft"))
    test_threshold = staticmethod(conformance(Threshold(0.004), trainer="sft"))
    test_chord_phi = staticmethod(conformance(ChordPhi(), trainer="sft", formula=chord_phi))
    test_mixture = staticmethod(conformance(Mixture("power:alpha=2", "dft", 0.3), trainer="sft", formula=mixture))
    test_weighted = staticmethod(conformance(Weighted(), trainer="sft"))
    test_weighted_mean = staticmethod(conformance(Weighted(denominator="weights"), trainer="sft"))
    test_wit = staticmethod(conformance(WIT(), trainer="sft", config=WITH_PROMPT))
    test_wit_completion = staticmethod(conformance(WIT(0.0, 0.5), trainer="sft"))
    test_by_column = staticmethod(conformance(ByColumn("kind", {"sum": "power:alpha=1", "text": "nll"}), trainer="sft"))
    test_auto = staticmethod(conformance(Auto(), trainer="sft"))
