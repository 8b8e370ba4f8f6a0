"""Every hook fires in a real training run, at the stated moment and in the stated order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import Nll, Plugin
from safetensors.torch import load_file

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError, PluginError
from trl_ext.hookspecs import HOOKS
from trl_ext.records import AuxiliaryLoss, StreamRequest
from trl_ext.testing.runs import MAKE, additions, make_grpo, make_sft, parameters, rows, start_model

STEPS, ACCUMULATION, CLIP = 2, 2, 1e-3


@dataclass(eq=False)
class Spy(Plugin):
    """Writes down what its hooks saw."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    context: Any = None

    def note(self, hook: str, **facts: Any) -> None:
        self.events.append((hook, facts))

    def weights(self) -> list[torch.Tensor]:
        return [] if self.context is None else [w.clone() for w in self.context.weights.local()]


class Hooks:
    """All of them; a spy has those that its trainer calls."""

    @hookimpl
    def check(self, run):
        self.note("check", run=run)

    @hookimpl
    def streams(self):
        self.note("streams")
        return [StreamRequest("early", batch_size=2, when="before"), StreamRequest("late", batch_size=2)]

    @hookimpl
    def setup(self, context):
        self.context = context
        self.note("setup", weights=self.weights(), resuming=context.resuming)

    @hookimpl
    def wrap_optimizer(self, optimizer):
        self.note("wrap_optimizer", type=type(optimizer), groups=len(optimizer.param_groups))
        return optimizer

    @hookimpl
    def prompt_order(self, order, prompts, epoch):
        self.note("prompt_order", rows=len(prompts), order=order, epoch=epoch)
        return order

    @hookimpl
    @contextmanager
    def sampling_weights(self, weights) -> Iterator[None]:
        before = self.weights()
        self.note("sampling_weights", weights=before)
        yield
        self.note("sampling_weights ends")

    @hookimpl
    def advantages(self, rollouts, rewards, advantages):
        self.note("advantages", training=rollouts.training, shape=advantages.shape, rewards=rewards.total.shape)
        return advantages

    @hookimpl
    def sample_weights(self, window):
        self.note("sample_weights", samples=window.num_samples, streams=set(window.streams), step=window.step)

    @hookimpl
    def per_token_loss(self, tokens):
        self.note("per_token_loss", stream=tokens.stream, training=tokens.training, shape=tokens.log_probs.shape)
        return -tokens.log_probs

    @hookimpl
    def policy_loss(self, tokens):
        self.note("policy_loss", training=tokens.training)
        return -(tokens.log_probs - tokens.old_log_probs).exp() * tokens.advantages

    @hookimpl
    def auxiliary_losses(self, micro_step):
        self.note("auxiliary_losses", step=micro_step.step)
        return {"zero": AuxiliaryLoss(0 * micro_step.log_probs.sum(), "token")}

    @hookimpl
    def gradients_ready(self, gradients, streams):
        self.note("gradients_ready", norm=float(gradients.norm()), streams=set(streams), weights=self.weights())

    @hookimpl
    def weights_updated(self, weights, step, skipped):
        norm = torch.stack([p.grad.norm() for p in weights.parameters if p.grad is not None]).norm()
        self.note("weights_updated", step=step, skipped=skipped, weights=self.weights(), grad_norm=float(norm))

    @hookimpl
    @contextmanager
    def deployed_weights(self, weights) -> Iterator[None]:
        self.note("deployed_weights")
        raw = self.weights()
        for w in weights.local():
            w.add_(1)
        yield
        for w, kept in zip(weights.local(), raw, strict=True):
            w.copy_(kept)
        self.note("deployed_weights ends")

    @hookimpl
    def end(self, weights, step):
        assert weights is self.context.weights
        self.note("end", step=step, weights=self.weights())

    @hookimpl
    def metrics(self, mode):
        self.note("metrics", mode=mode)
        return {"events": len(self.events)}


def spy_on(kind: str) -> Spy:
    hooks = {name: hook for name, hook in vars(Hooks).items() if name in HOOKS and kind in HOOKS[name].trainers}
    return type(f"SpyOn{kind.capitalize()}", (Spy,), hooks)()


def streams_of(kind: str) -> dict[str, Any]:
    takes = kind in HOOKS["streams"].trainers
    return {"early": additions(8), "late": additions(8, seed=2)} if takes else {}


@dataclass
class Run:
    spy: Spy
    trainer: Any

    def of(self, hook: str) -> list[dict[str, Any]]:
        return [facts for name, facts in self.spy.events if name == hook]

    def order(self) -> list[str]:
        return [name for name, _ in self.spy.events]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    finished = {}
    for kind in MAKE:
        spy = spy_on(kind)
        folder = tmp_path_factory.mktemp(kind)
        trainer = MAKE[kind](
            folder / "run",
            plugins=[spy],
            streams=streams_of(kind),
            trainer={"eval_dataset": rows(kind, 4, seed=5)},
            max_steps=STEPS,
            gradient_accumulation_steps=ACCUMULATION,
            max_grad_norm=CLIP,
            eval_strategy="steps",
            eval_steps=STEPS,
        )
        trainer.train()
        trainer.save_model(str(folder / "final"))
        finished[kind] = Run(spy, trainer)
    return finished


def during_setup(run: Run) -> None:
    (facts,) = run.of("setup")
    assert not facts["resuming"]
    start = start_model(run.trainer.ext_kind).parameters()
    assert all(torch.equal(a, b) for a, b in zip(facts["weights"], start, strict=True))


def at_check(run: Run) -> None:
    (facts,) = run.of("check")
    assert run.order()[0] == "check"
    assert facts["run"].trainer == run.trainer.ext_kind
    assert facts["run"].streams == tuple(streams_of(run.trainer.ext_kind))
    assert "prompt" in facts["run"].columns


def at_construction(run: Run) -> None:
    assert run.order().count("streams") == 1
    assert run.order().index("streams") < run.order().index("setup")
    assert all(facts["streams"] == {"early", "late"} for facts in run.of("gradients_ready"))


def at_optimiser_creation(run: Run) -> None:
    (facts,) = run.of("wrap_optimizer")
    assert issubclass(facts["type"], torch.optim.AdamW)
    assert run.order().index("wrap_optimizer") < run.order().index("setup")


def at_each_label_forward(run: Run) -> None:
    streams = [facts["stream"] for facts in run.of("per_token_loss") if facts["training"]]
    own = [None] * ACCUMULATION if run.trainer.ext_kind == "sft" else []
    assert streams == ["early", *own, "late"] * STEPS
    evaluated = [facts for facts in run.of("per_token_loss") if not facts["training"]]
    assert len(evaluated) == (1 if run.trainer.ext_kind == "sft" else 0)


def at_window_start(run: Run) -> None:
    assert [facts["step"] for facts in run.of("sample_weights")] == list(range(STEPS))
    assert all(facts["samples"] == 4 * ACCUMULATION for facts in run.of("sample_weights"))
    assert all(facts["streams"] == {"early"} for facts in run.of("sample_weights"))


def at_an_epochs_start(run: Run) -> None:
    (facts,) = run.of("prompt_order")  # 32 prompts last for 8 generation batches of 8 completions of 4 prompts
    assert facts["epoch"] == 0
    assert facts["rows"] == 32
    assert sorted(facts["order"]) == list(range(32))


def around_training_completions(run: Run) -> None:
    order = run.order()
    begins = [i for i, name in enumerate(order) if name == "sampling_weights"]
    assert len(begins) == STEPS  # none in evaluation
    then = "per_token_loss" if run.trainer.ext_kind == "distillation" else "advantages"  # of the stream "late"
    assert all(order[i + 1 : i + 3] == ["sampling_weights ends", then] for i in begins)


def after_rewards(run: Run) -> None:
    # One generation batch a step; evaluation generates 4 prompts x 2 completions in batches of 4.
    assert [facts["training"] for facts in run.of("advantages")] == [True] * STEPS + [False] * 2
    rows = 4 * ACCUMULATION
    assert run.of("advantages")[0]["shape"] == (rows,)
    assert run.of("advantages")[0]["rewards"] == (rows,)


def in_place_of_the_clipped_term(run: Run) -> None:
    assert [facts["training"] for facts in run.of("policy_loss")] == [True] * STEPS * ACCUMULATION + [False] * 2


def every_micro_step(run: Run) -> None:
    assert [facts["step"] for facts in run.of("auxiliary_losses")] == [0] * ACCUMULATION + [1] * ACCUMULATION


def before_clipping(run: Run) -> None:
    seen = [facts["norm"] for facts in run.of("gradients_ready")]
    norms = [entry["grad_norm"] for entry in run.trainer.state.log_history if "grad_norm" in entry]
    assert seen == pytest.approx(norms, rel=1e-5)  # two ways to sum the same fp32 squares
    assert min(seen) > 10 * CLIP


def after_the_step(run: Run) -> None:
    ready, updated = run.of("gradients_ready"), run.of("weights_updated")
    assert [facts["step"] for facts in updated] == [1, 2]
    assert not any(facts["skipped"] for facts in updated)
    for before, after in zip(ready, updated, strict=True):
        changed = [not torch.equal(a, b) for a, b in zip(before["weights"], after["weights"], strict=True)]
        assert all(changed)
        assert after["grad_norm"] == pytest.approx(CLIP, rel=1e-3)  # torch divides by the norm plus 1e-6
    final = parameters(run.trainer)
    assert all(
        torch.equal(final[name], w) for name, w in zip(run.spy.context.names, updated[-1]["weights"], strict=True)
    )


def around_evaluation_and_final_save(run: Run) -> None:
    order = run.order()
    assert order.count("deployed_weights") == 2  # the evaluation, and `save_model`
    begin, end = order.index("deployed_weights"), order.index("deployed_weights ends")
    inside = run.spy.events[begin + 1 : end]
    assert inside
    assert all(not facts.get("training", False) for _, facts in inside)
    assert not any(not facts.get("training", True) for _, facts in run.spy.events[:begin])


def at_each_log(run: Run) -> None:
    assert [facts["mode"] for facts in run.of("metrics")] == ["train", "train", "eval"]
    keys = [key for entry in run.trainer.state.log_history for key in entry if "events" in key]
    name = type(run.spy).__name__
    assert keys == [f"{name}/events", f"{name}/events", f"eval_{name}/events"]


def at_the_end(run: Run) -> None:
    (facts,) = run.of("end")
    assert facts["step"] == STEPS
    assert all(
        torch.equal(a, b) for a, b in zip(facts["weights"], run.of("weights_updated")[-1]["weights"], strict=True)
    )


MOMENTS = {
    "check": at_check,
    "setup": during_setup,
    "streams": at_construction,
    "prompt_order": at_an_epochs_start,
    "sampling_weights": around_training_completions,
    "sample_weights": at_window_start,
    "per_token_loss": at_each_label_forward,
    "advantages": after_rewards,
    "policy_loss": in_place_of_the_clipped_term,
    "auxiliary_losses": every_micro_step,
    "gradients_ready": before_clipping,
    "wrap_optimizer": at_optimiser_creation,
    "weights_updated": after_the_step,
    "deployed_weights": around_evaluation_and_final_save,
    "metrics": at_each_log,
    "end": at_the_end,
}


@pytest.mark.parametrize(
    ("hook", "kind"),
    [(hook, kind) for hook, facts in HOOKS.items() for kind in facts.trainers],
)
def test_hook_fires_at_its_moment(runs, hook, kind):
    assert hook in runs[kind].order()
    MOMENTS[hook](runs[kind])


def test_every_declared_hook_and_no_other_has_its_moment_here():
    assert MOMENTS.keys() == HOOKS.keys()


STREAM, MICRO = "per_token_loss", ["per_token_loss", "auxiliary_losses"]
SAMPLING = ["sampling_weights", "sampling_weights ends"]
START = ["check", "streams", "wrap_optimizer", "setup"]
END = [STREAM, "gradients_ready", "weights_updated", "metrics"]
SAVED = ["end", "deployed_weights", "deployed_weights ends"]
DEPLOYED = ["deployed_weights", "metrics", "deployed_weights ends", *SAVED]
PREFERENCES = [*START, *[STREAM, *["auxiliary_losses"] * ACCUMULATION, *END] * STEPS, *DEPLOYED]
REWARDED = [
    *START,
    "prompt_order",
    *[STREAM, *SAMPLING, "advantages", *["policy_loss", "auxiliary_losses"] * ACCUMULATION, *END] * STEPS,
    *["deployed_weights", *["advantages", "policy_loss"] * 2, "metrics", "deployed_weights ends", *SAVED],
]
ORDER = {
    "sft": [
        *START,
        *[STREAM, "sample_weights", *MICRO * ACCUMULATION, *END] * STEPS,
        *["deployed_weights", "per_token_loss", "metrics", "deployed_weights ends", *SAVED],
    ],
    "grpo": REWARDED,
    "dpo": PREFERENCES,
    "kto": PREFERENCES,
    "rloo": REWARDED,
    "reward": [
        *["check", "wrap_optimizer", "setup"],
        *["gradients_ready", "weights_updated", "metrics"] * STEPS,
        *DEPLOYED,
    ],
    "distillation": [*START, "prompt_order", *[STREAM, *SAMPLING, *END] * STEPS, *DEPLOYED],
}


@pytest.mark.parametrize("kind", ORDER)
def test_hooks_fire_in_the_stated_order(runs, kind):
    assert runs[kind].order() == ORDER[kind]


@pytest.mark.parametrize("kind", ORDER)
def test_hooks_are_declared_in_the_order_in_which_they_first_fire(runs, kind):
    own = [hook for hook, facts in runs[kind].spy.events if hook in HOOKS and not facts.get("stream")]
    declared = [hook for hook, facts in HOOKS.items() if kind in facts.trainers and hook in own]
    assert list(dict.fromkeys(own)) == declared


def test_check_runs_before_the_model_loads(tmp_path):
    @dataclass(eq=False)
    class Refuses(Plugin):
        @hookimpl
        def check(self, run):
            raise ValueError(f"not with {run.model}")

    with pytest.raises(ConfigurationError, match=r"'Refuses' refuses this run: not with no/such/model"):
        make_sft(tmp_path, model="no/such/model", plugins=[Refuses()])


@dataclass(eq=False)
class Ends(Plugin):
    """Notes the end, and may fail at a step."""

    fails_at: int = 0
    steps: list[int] = field(default_factory=list)

    @hookimpl
    def weights_updated(self, step):
        if step == self.fails_at:
            raise ValueError("as asked for")

    @hookimpl
    def end(self, step):
        self.steps.append(step)


def test_a_run_that_fails_has_no_end(tmp_path):
    plugin = Ends(fails_at=2)
    with pytest.raises(PluginError, match="as asked for"):
        make_sft(tmp_path, plugins=[plugin]).train()
    assert plugin.steps == []


def test_a_run_that_resumes_after_its_last_step_ends_once_more(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    first, again = Ends(), Ends()
    make_sft(tmp_path, plugins=[first], **saving).train()
    make_sft(tmp_path, plugins=[again], **saving).train(resume_from_checkpoint=True)
    assert first.steps == again.steps == [4]


def test_the_end_sees_the_last_weights_and_not_the_best_that_are_loaded_after_it(tmp_path):
    spy = spy_on("sft")
    trainer = make_sft(
        tmp_path,
        plugins=[spy],
        streams={"early": additions(8), "late": additions(8)},
        trainer={"eval_dataset": additions(4, seed=5)},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True},
    )
    trainer.train()
    (facts,) = Run(spy, trainer).of("end")
    updated = Run(spy, trainer).of("weights_updated")[-1]["weights"]
    assert all(torch.equal(a, b) for a, b in zip(facts["weights"], updated, strict=True))
    assert trainer.state.best_global_step < 4, "the best weights by the worst loss are early ones"


def test_saved_weights_are_the_deployed_ones_and_checkpoints_keep_raw_ones(tmp_path):
    spy = spy_on("sft")
    streams = {"early": additions(8), "late": additions(8)}
    trainer = make_sft(tmp_path / "run", plugins=[spy], streams=streams, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    raw = parameters(trainer)
    checkpoint = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    final = load_file(tmp_path / "final" / "model.safetensors")
    for name in checkpoint:
        assert torch.equal(checkpoint[name], raw[name])
        assert torch.equal(final[name], raw[name] + 1)


# -- chains and exclusive owners -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Affine(Plugin):
    """Scales the gradient, and puts an SGD in place of the optimiser it is handed."""

    label: str = ""
    factor: float = 1.0
    seen: list[Any] = field(default_factory=list)

    @hookimpl
    def gradients_ready(self, gradients):
        self.seen.append(float(gradients.norm()))
        gradients.mul_(self.factor)

    @hookimpl
    def wrap_optimizer(self, optimizer):
        self.seen.append(optimizer)
        return torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1, momentum=self.factor / 10)


@dataclass(eq=False)
class AffineAdvantages(Plugin):
    label: str = ""
    factor: float = 1.0
    shift: float = 0.0
    seen: list[Any] = field(default_factory=list)

    @hookimpl
    def advantages(self, rollouts, rewards, advantages):
        self.seen.append(advantages)
        return advantages * self.factor + self.shift


def test_chains_run_in_the_order_given_each_on_the_result_before(tmp_path):
    first, second = Affine(label="first", factor=3.0), Affine(label="second", factor=0.5)
    trainer = make_sft(tmp_path, plugins=[first, second], max_steps=1, max_grad_norm=0)
    trainer.train()
    assert second.seen[1] == pytest.approx(3 * first.seen[1])
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(1.5 * first.seen[1], rel=1e-5)
    assert isinstance(first.seen[0], torch.optim.AdamW)
    assert second.seen[0].defaults["momentum"] == 0.3
    assert trainer._ext_optimizer.defaults["momentum"] == 0.05


def test_advantages_chain_runs_in_the_order_given(tmp_path):
    first, second = AffineAdvantages("first", 2.0, 0.0), AffineAdvantages("second", 1.0, 5.0)
    make_grpo(tmp_path / "run", plugins=[first, second], max_steps=1).train()
    assert torch.equal(second.seen[0], 2 * first.seen[0])


def plugin_with(hook: str, name: str = "Forgetful") -> Any:
    """A plugin whose only hook returns None."""
    return type(name, (Plugin,), {hook: hookimpl(lambda self: None)})()


@pytest.mark.parametrize(
    ("hook", "kind"),
    [("advantages", "grpo"), ("prompt_order", "grpo"), ("wrap_optimizer", "sft"), ("wrap_optimizer", "grpo")],
)
def test_a_chain_hook_may_not_return_nothing(tmp_path, hook, kind):
    trainer = MAKE[kind](tmp_path / "run", plugins=[plugin_with(hook)])
    with pytest.raises(PluginError, match=f"'Forgetful'.*failed in hook '{hook}' at step 1: TypeError: returned"):
        trainer.train()


@dataclass(eq=False)
class ReturnsAView(Plugin):
    @hookimpl
    def gradients_ready(self, gradients):
        return gradients


def test_an_in_place_hook_may_not_return_a_value(tmp_path):
    trainer = make_sft(tmp_path / "run", plugins=[ReturnsAView()])
    match = "hook 'gradients_ready' at step 1: TypeError: returned a GradientView, which would be ignored; edit"
    with pytest.raises(PluginError, match=match):
        trainer.train()


@pytest.mark.parametrize("hook", [hook for hook, facts in HOOKS.items() if facts.kind == "exclusive"])
def test_an_exclusive_hook_has_one_owner(tmp_path, hook):
    plugins = [plugin_with(hook, "One"), plugin_with(hook, "Other")]
    with pytest.raises(ConfigurationError, match=f"hook '{hook}' can have one owner, and 'One'.* and 'Other'.*claim"):
        MAKE[HOOKS[hook].trainers[0]](tmp_path / "run", plugins=plugins)


def test_the_wrapped_optimiser_is_the_one_that_steps_and_is_wrapped_once(tmp_path):
    @dataclass(eq=False)
    class Halves(Plugin):
        calls: int = 0

        @hookimpl
        def wrap_optimizer(self, optimizer):
            self.calls += 1
            return torch.optim.SGD(optimizer.param_groups, lr=0.5)

    plugin = Halves()
    trainer = make_sft(tmp_path, plugins=[plugin, Nll()], max_steps=1, max_grad_norm=0, lr_scheduler_type="constant")
    start = parameters(trainer)
    grads: dict[str, torch.Tensor] = {}
    original = trainer._get_grad_norm

    def noting(model, grad_norm=None):
        grads.update({name: p.grad.clone() for name, p in model.named_parameters()})
        return original(model, grad_norm)

    trainer._get_grad_norm = noting
    trainer.train()
    lr = trainer.optimizer.param_groups[0]["lr"]
    for name, after in parameters(trainer).items():
        torch.testing.assert_close(after, start[name] - lr * grads[name], rtol=1e-6, atol=1e-7)  # fp32 rounding
    trainer.train()
    assert plugin.calls == 1
