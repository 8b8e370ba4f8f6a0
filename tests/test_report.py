"""What a run says about itself: on the screen, in a file of its folder, and in the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar

import pytest
import torch
from helpers import FIRST, Nll, Plugin
from safetensors.torch import load_file

import trl_ext
from trl_ext import hookimpl
from trl_ext.config import SFTConfig
from trl_ext.errors import ConfigurationError
from trl_ext.plugins import activate
from trl_ext.records import StreamRequest
from trl_ext.testing.runs import MAKE, additions, make_sft


@dataclass(eq=False)
class Cited(Plugin):
    """A plugin with options, a citation and a stream."""

    citation: ClassVar[str] = "A Paper, arXiv 2501.00001"
    cost: ClassVar[str] = "one more backward a window"
    rate: float = 0.25
    names: tuple[str, ...] = ("a", "b")

    @hookimpl
    def streams(self):
        return [StreamRequest("general", batch_size=2, when="before", on_exhausted="stop", seed=11)]

    @hookimpl
    def gradients_ready(self, gradients):
        pass


def run(folder: Any, kind: str = "sft", **config: Any) -> Any:
    names = ["ema:decay=0.5", "power:alpha=2"] if kind == "sft" else ["ema:decay=0.5"]
    trainer = MAKE[kind](
        folder, names=names, plugins=[Cited(rate=0.5)], streams={"general": additions(9)}, max_steps=2, **config
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", FIRST)
def test_the_run_file_says_who_does_what(tmp_path, kind):
    run(tmp_path / "run", kind)
    facts = json.loads((tmp_path / "run" / "trl_ext_run.json").read_text())
    assert facts["trainer"] == kind
    for name in ("trl", "transformers", "accelerate", "torch"):
        assert facts["versions"][name] == version(name)
    assert facts["versions"]["trl_ext"] == trl_ext.__version__
    assert facts["versions"]["trl_ext API"] == trl_ext.API_VERSION
    expected = ["ema", "power", "Cited"] if kind == "sft" else ["ema", "Cited"]
    assert [plugin["name"] for plugin in facts["plugins"]] == expected
    ema, cited = facts["plugins"][0], facts["plugins"][-1]
    assert ema["origin"] == f"trl-ext-averaging {version('trl-ext-averaging')}"
    assert ema["options"]["decay"] == 0.5
    assert cited["origin"] == f"class Cited of {Cited.__module__}"
    assert cited["options"] == {"rate": 0.5, "names": ["a", "b"]}
    assert cited["hooks"] == ["streams", "gradients_ready"]
    assert cited["citation"] == "A Paper, arXiv 2501.00001"
    owners = {
        "deployed_weights": "ema",
        **({"per_token_loss": "power"} if kind == "sft" else {"sampling_weights": "ema"}),
    }
    assert facts["exclusive"] == owners
    stream = {"samples": 9, "seed": 11, "batch_size": 2, "when": "before", "on_exhausted": "stop", "shuffle": True}
    assert facts["streams"]["general"].items() >= stream.items()


def test_the_header_is_printed_before_the_first_step(tmp_path, capsys):
    run(tmp_path / "run")
    shown = capsys.readouterr().out
    header, _, rest = shown.partition("{'loss'")
    assert rest
    assert f"trl_ext sft run (trl {version('trl')}" in header
    lines = header[header.index("trl_ext sft run") :].splitlines()
    assert max(map(len, lines)) <= 80
    assert f"  1. ema (trl-ext-averaging {version('trl-ext-averaging')}): decay=0.5" in lines
    assert f"  2. power (trl-ext-objectives {version('trl-ext-objectives')}): alpha=2.0" in lines
    assert f"  3. Cited (class Cited of {Cited.__module__}): rate=0.5" in lines
    assert lines.count("     cost: one more backward a window") == 1
    assert "  per_token_loss belongs to power" in lines
    assert "  deployed_weights belongs to ema" in lines
    assert any(line.startswith("  stream general: samples=9, seed=11, batch_size=2") for line in lines)


def test_the_end_of_training_and_the_card_say_which_weights_are_where(tmp_path, capsys):
    trainer = run(tmp_path / "run", save_strategy="steps", save_steps=1)
    said = "`trainer.save_model()` writes the weights that `ema` deploys and, where training ended with others, those "
    end = capsys.readouterr().out.rpartition("The model in memory has the weights that training ended with. ")[2]
    assert end.startswith(said + "into `raw`. `model.save_pretrained()` writes the weights that training ended with.")
    assert said in (tmp_path / "run/README.md").read_text()
    # And so it is.
    trainer.save_model()
    trainer.model.save_pretrained(tmp_path / "by-hand")
    final, raw, by_hand = (load_file(tmp_path / f / "model.safetensors") for f in ("run", "run/raw", "by-hand"))
    assert all(torch.equal(raw[name], by_hand[name]) for name in raw)
    assert not torch.equal(final["lm_head.weight"], raw["lm_head.weight"])


def test_the_model_card_names_plugins_options_and_sources_once(tmp_path):
    trainer = run(tmp_path / "run", save_strategy="steps", save_steps=1)
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.count("## Plugins") == 1
    section = card[card.index("## Plugins") :]
    assert section.index("**ema**") < section.index("**power**") < section.index("**Cited**")
    assert "`alpha=2" in section
    assert "`rate=0.5`" in section
    assert "Source: A Paper, arXiv 2501.00001" in section
    assert "arXiv 2510.00526" in section
    assert "trl-ext-objectives" in section
    # TRL's own card is still there, above.
    assert "base_model" in card or "library_name" in card
    assert card.index("TRL") < card.index("## Plugins")


def test_without_plugins_nothing_is_said(tmp_path, capsys):
    trainer = make_sft(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert "trl_ext" not in capsys.readouterr().out
    assert not (tmp_path / "run" / "trl_ext_run.json").exists()
    assert "## Plugins" not in (tmp_path / "run" / "README.md").read_text()


def test_metrics_are_prefixed_by_their_plugin(tmp_path):
    @dataclass(eq=False)
    class Counts(Plugin):
        label: str = ""

        @hookimpl
        def metrics(self, mode):
            return {"mode": float(mode == "eval"), "tensor": torch.tensor(1.5)}

    held_out = {"eval_dataset": additions(4)}
    trainer = make_sft(
        tmp_path, plugins=[Counts("one"), Counts("two"), Nll()], trainer=held_out, eval_strategy="steps", eval_steps=4
    )
    trainer.train()
    shown = [entry for entry in trainer.state.log_history if "one/mode" in entry or "eval_one/mode" in entry]
    assert [entry.get("one/mode") for entry in shown] == [0, 0, 0, 0, None]
    assert shown[-1]["eval_two/mode"] == 1
    assert shown[0]["two/tensor"] == 1.5


# -- secrets and foreign text ----------------------------------------------------------------------------------------

SECRETS = ("hf_abcdefghijklmnop", "sk-proj-0123456789", "swordfish", "open sesame")


@dataclass(eq=False)
class Judged(Nll):
    """A plugin that asks a service with keys of its user's."""

    citation: ClassVar[str] = "A Paper\n# Not a heading\n<script>alert(1)</script>"
    api_key: str = "swordfish"
    endpoint: str = field(default="open sesame", repr=False)
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": "Bearer sk-proj-0123456789"})
    token_count: int = 7
    unset_token: str = ""
    note: str = "a\n# b `c` <b>"


def test_secrets_are_shown_and_kept_nowhere(tmp_path, capsys):
    trainer = make_sft(tmp_path / "run", plugins=[Judged()], max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    kept = [path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    written = "".join([capsys.readouterr().out, *kept])
    assert not [secret for secret in SECRETS if secret in written]
    options = json.loads((tmp_path / "run" / "trl_ext_run.json").read_text())["plugins"][0]["options"]
    assert options["headers"] == {"Authorization": "Bearer ***"}
    assert (options["api_key"], options["endpoint"]) == ("***", "***")
    assert (options["token_count"], options["unset_token"]) == (7, "")


def test_a_secret_in_a_config_is_not_in_what_trackers_keep_of_it():
    config = SFTConfig(use_cpu=True, bf16=False, plugins=[{"name": "judge", "api_key": SECRETS[2], "count": 3}])
    assert config.plugins[0]["api_key"] == SECRETS[2]
    assert config.to_dict()["plugins"] == [{"name": "judge", "api_key": "***", "count": 3}]
    for kept in (config.to_json_string(), str(config.to_sanitized_dict())):
        assert SECRETS[2] not in kept


def test_a_secret_in_a_config_is_not_in_its_errors():
    with pytest.raises(ConfigurationError, match="ema") as caught:
        activate([{"name": "ema", "decay": 5, "hub_token": SECRETS[0]}], trainer="sft")
    assert SECRETS[0] not in str(caught.value)


def test_text_of_a_plugin_stays_text_in_the_card(tmp_path):
    trainer = make_sft(tmp_path / "run", plugins=[Judged()], max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = (tmp_path / "run" / "README.md").read_text()
    section = card[card.index("## Plugins") :]
    assert "`note=a # b 'c' <b>`" in section
    assert "Source: A Paper # Not a heading &lt;script&gt;alert(1)&lt;/script&gt;" in section
    assert [line for line in section.splitlines() if line.startswith("#")] == ["## Plugins"]
