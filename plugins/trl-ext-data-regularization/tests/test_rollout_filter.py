"""The filter in GRPO: scores against autograd, advantages against the definition, and no trace in the trainer."""

import copy
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
import trl
from short_runs import TOKENIZER, arguments, model
from torch.distributed.tensor import DTensor
from trl_ext_data_regularization.rollout_filter import RolloutFilter
from trl_ext_data_regularization.token_coefficients import (
    PolicyBatch,
    reward_loss,
    token_policy_gradient,
    train_loss,
)

import trl_ext
from trl_ext import hookimpl
from trl_ext.errors import PluginError
from trl_ext.groups import group_advantages
from trl_ext.options import check_options
from trl_ext.testing import Addition

TASK = Addition(digits=1)
PROMPTS = TASK.dataset(16, kind="prompt_only", seed=3)


def noisy_reward(prompts, completions, **columns):
    """A procedural reward that a random model does not always miss: the share of digits in the completion."""
    return [sum(c.isdigit() or ord(c) % 2 for c in text) / max(len(text), 1) for text in completions]


def run(plugins=(), net=None, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "max_steps": 2,
    }
    net = model(layers=1) if net is None else net
    net = net if any(isinstance(p, DTensor) for p in net.parameters()) else copy.deepcopy(net)
    torch.manual_seed(0)
    plain = not plugins
    args = arguments(trl.GRPOConfig if plain else trl_ext.GRPOConfig, **{**defaults, **options})
    cls = trl.GRPOTrainer if plain else trl_ext.GRPOTrainer
    extra = {} if plain else {"plugins": list(plugins)}
    trainer = cls(net, reward_funcs=noisy_reward, args=args, train_dataset=PROMPTS, processing_class=TOKENIZER, **extra)
    trainer.train()
    return trainer


class Witness:
    """Comes after the filter in the chain; keeps what it was given, and what the filter made of it."""

    requires_api = "1"
    trainers = ("grpo",)
    label = "witness"

    def __init__(self):
        self.seen = []

    @hookimpl
    def advantages(self, rollouts, rewards, advantages):
        self.seen.append((rollouts, rewards, advantages.clone()))
        return advantages


class Before(Witness):
    label = "before"


def only_norms(net):
    """In few dimensions, gradients of few completions can oppose their sum."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("norm" in name)
    return net


def gradients_of(net, rollouts, coefficients):
    """(N, P) the gradient of each completion's own loss, at a temperature of 0.9."""
    trained, out = [p for p in net.parameters() if p.requires_grad], []
    for i in range(len(coefficients)):
        real = rollouts.prompt_mask[i].bool()
        prompt = rollouts.prompt_ids[i][real]
        ids = torch.cat([prompt, rollouts.completion_ids[i]]).unsqueeze(0)
        logits = net(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits / 0.9, -1).gather(1, rollouts.completion_ids[i].unsqueeze(1)).squeeze(1)
        grads = torch.autograd.grad(-(log_p * coefficients[i]).sum(), trained)
        out.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(out)


CASES = [("dapo", "train-loss"), ("grpo", "reward"), ("dr_grpo", "token-pg")]
REST = [
    (a, b) for a in ("dapo", "grpo", "dr_grpo") for b in ("train-loss", "reward", "token-pg") if (a, b) not in CASES
]


@pytest.mark.parametrize(
    ("loss_type", "target_loss"), [*CASES, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)]
)
def test_filter_drops_what_opposes_the_rollout_itself_and_rescales(loss_type, target_loss):
    before, after, net = Before(), Witness(), only_norms(model(layers=1))
    plugin = RolloutFilter(target_loss=target_loss, engine="direct")
    run([before, plugin, after], net, max_steps=1, loss_type=loss_type, temperature=0.9, per_device_train_batch_size=8)
    (rollouts, rewards, raw), (_, _, filtered) = before.seen[0], after.seen[0]
    mask = rollouts.mask.float()
    length = mask.sum(1, keepdim=True)
    general = raw.unsqueeze(1) * (mask / length if loss_type == "grpo" else mask)
    spread = rewards.total.std(unbiased=False)
    target = {
        "train-loss": general,
        "token-pg": raw.unsqueeze(1) * mask / mask.sum(),
        "reward": ((rewards.total - rewards.total.mean()) / spread).unsqueeze(1) * mask / len(raw),
    }[target_loss]
    scores = gradients_of(net, rollouts, general) @ gradients_of(net, rollouts, target).sum(0)
    kept = scores >= 0
    assert 0 < kept.sum() < len(kept), "the case must tell completions apart"
    size = mask.sum(1) if loss_type == "dapo" else torch.ones(len(raw))
    expected = raw * kept * size.sum() / size[kept].sum()
    torch.testing.assert_close(filtered, expected, rtol=1e-4, atol=1e-5)


class Scored(RolloutFilter):
    """Keeps the scores of the first generation batch."""

    def _vectors(self, *arguments):
        g, t = super()._vectors(*arguments)
        self.scores = sum(vectors @ part for vectors, part in zip(g, t, strict=True))
        return g, t


def test_sketched_scores_agree_with_direct_ones():
    plugins = [Scored(engine="direct"), Scored(engine="sketch", sketch_size=512)]  # as wide as every layer: exact
    for plugin in plugins:
        run([plugin], max_steps=1)
    direct, sketched = (plugin.scores for plugin in plugins)
    assert direct.std() > 0.01 * direct.abs().max(), "the case must tell completions apart"
    # Both sum products in fp32, in other orders: an error of rounding relative to the largest of them.
    torch.testing.assert_close(sketched, direct, rtol=1e-4, atol=1e-5 * float(direct.abs().max()))


@pytest.fixture
def held_out():
    """A file of held-out prompts."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
        for row in TASK.dataset(4, kind="prompt_only", split="held_out"):
            file.write(json.dumps({k: row[k] for k in ("prompt", "answer")}) + "\n")
    return file.name


def fresh(held_out, cls=RolloutFilter, **options):
    options = {"prompts_per_step": 2, "generations": 2, "reward": "test_rollout_filter:noisy_reward"} | options
    return cls(target="prompts", prompts=held_out, **options)


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow), {"steps_per_generation": 4, "gradient_accumulation_steps": 2}]
)
@pytest.mark.parametrize("target", ["rollout", "prompts"])
def test_without_dropping_anything_training_is_plain_trl_to_the_bit(options, target, held_out):
    """Counters, metric names, logged numbers, random streams and weights: all as if there were no filter."""
    plugin = RolloutFilter(frac=0.0) if target == "rollout" else fresh(held_out, frac=0.0)
    plain, filtered = run(**options), run([plugin], **options)
    for (name, a), (_, b) in zip(plain.model.named_parameters(), filtered.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    timing = ("runtime", "per_second", "step_time")
    ours = ("rollout-filter/", "nll", "skipped")
    for mine, theirs in zip(filtered.state.log_history, plain.state.log_history, strict=True):
        left = {k: v for k, v in mine.items() if not k.startswith(ours) and not any(t in k for t in timing)}
        assert left == {k: v for k, v in theirs.items() if not any(t in k for t in timing)}
    assert filtered._step == plain._step
    assert filtered.state.num_input_tokens_seen == plain.state.num_input_tokens_seen
    assert any("rollout-filter/kept" in log for log in filtered.state.log_history)


class Remembers(RolloutFilter):
    """Keeps its fresh rollouts, one batch for each generation batch."""

    def __post_init__(self):
        super().__post_init__()
        self.batches = []

    def _fresh(self):
        self.batches.append(super()._fresh())
        return self.batches[-1]

    def drawn(self):
        """(prompt, completion) texts of each batch."""
        return [
            [
                tuple(TOKENIZER.decode(ids[real.bool()], skip_special_tokens=True) for ids, real in pair)
                for pair in zip(
                    zip(batch.prompt_ids, batch.prompt_mask, strict=True),
                    zip(batch.completion_ids, batch.mask, strict=True),
                    strict=True,
                )
            ]
            for batch in self.batches
        ]


@pytest.mark.parametrize("target_loss", ["train-loss", "token-pg", "reward"])
def test_filter_drops_what_opposes_fresh_rollouts_on_held_out_prompts(held_out, target_loss):
    before, after, net = Before(), Witness(), only_norms(model(layers=1))
    plugin = fresh(held_out, cls=Remembers, target_loss=target_loss, engine="direct")
    trainer = run([before, plugin, after], net, max_steps=1, temperature=0.9, per_device_train_batch_size=8)
    (rollouts, _, raw), (_, _, filtered) = before.seen[0], after.seen[0]
    (batch,), (drawn,) = plugin.batches, plugin.drawn()
    rewards = torch.tensor(noisy_reward(prompts=None, completions=[completion for _, completion in drawn]))
    pairs = rewards.view(2, 2)
    expected = {
        "reward": (rewards - rewards.mean()) / rewards.std(unbiased=False) / 4,
        "train-loss": ((pairs - pairs.mean(1, keepdim=True)) / (pairs.std(1, keepdim=True) + 1e-4)).flatten(),
    }
    expected["token-pg"] = expected["train-loss"]
    torch.testing.assert_close(batch.coefficients, expected[target_loss].unsqueeze(1) * batch.mask)
    target = gradients_of(net, batch, batch.coefficients).sum(0)
    kept = gradients_of(net, rollouts, raw.unsqueeze(1) * rollouts.mask) @ target >= 0
    assert 0 < kept.sum() < len(kept), "the case must tell completions apart"
    tokens = rollouts.mask.sum(1)
    torch.testing.assert_close(filtered, raw * kept * tokens.sum() / tokens[kept].sum(), rtol=1e-4, atol=1e-5)
    assert trainer.state.log_history[0]["Remembers/kept"] == pytest.approx(float(kept.float().mean()))
    assert trainer.state.log_history[0]["Remembers/target_reward"] == pytest.approx(float(rewards.mean()))


def test_held_out_prompts_cycle_and_resume_where_they_were(held_out):
    """With a learning rate of 0 the policy stays, so that a resumed run has to draw what the whole one drew."""
    rows = [json.loads(line)["prompt"] for line in Path(held_out).read_text().splitlines()]
    still = {"learning_rate": 0.0, "num_iterations": 1}
    whole = fresh(held_out, cls=Remembers)
    run([whole], max_steps=3, **still)
    drawn = whole.drawn()
    assert [[prompt for prompt, _ in batch] for batch in drawn] == [
        [rows[0], rows[0], rows[1], rows[1]],
        [rows[2], rows[2], rows[3], rows[3]],
        [rows[0], rows[0], rows[1], rows[1]],
    ]
    assert drawn[2] != drawn[0], "the same prompts get other completions the next time"
    resumed = fresh(held_out, cls=Remembers)
    resumed.load_state_dict({"position": 2})
    run([resumed], max_steps=2, **still)
    assert resumed.drawn() == drawn[1:]
    assert resumed.state_dict() == whole.state_dict() == {"position": 6}


def test_fresh_rollouts_end_with_the_tokens_that_end_those_of_the_trainer(held_out):
    """Those of the model's generation settings too; a token that is drawn in every completion shows it."""
    free = fresh(held_out, cls=Remembers)
    run([free], max_steps=1)
    ids = free.batches[0].completion_ids[0]
    ending = int(ids[0])
    net = model(layers=1)
    net.generation_config.eos_token_id = [TOKENIZER.eos_token_id, ending]
    ended = fresh(held_out, cls=Remembers)
    run([ended], net, max_steps=1)
    batch = ended.batches[0]
    assert batch.completion_ids[0, 0] == ending
    assert batch.mask[0].tolist() == [1] + [0] * (batch.mask.shape[1] - 1)


def unsure_reward(prompts, completions, **columns):
    return [None] * len(completions)


def test_a_reward_of_none_is_refused(held_out):
    """What does not count has no gradient to be a target."""
    with pytest.raises(PluginError, match=r"unsure_reward gave None for row 0 of prompts"):
        run([fresh(held_out, reward="test_rollout_filter:unsure_reward")], max_steps=1)


def huge_reward(prompts, completions, **columns):
    return [3e38] * len(completions)


def test_a_target_gradient_of_nan_stops_the_run(held_out, caplog):
    """No order of NaN says which completions to drop; here a mean of rewards is more than fp32 holds."""
    with pytest.raises(PluginError, match=r"rollout-filter.*advantages that are NaN or infinite"):
        run([fresh(held_out, reward="test_rollout_filter:huge_reward")], max_steps=1)
    assert "the scores <g_i, t> are NaN or infinite" in caplog.text


def test_the_authors_target_loss_is_the_default():
    """`val_loss_type: reward` in their RLHF and RLVR code; all negative completions are dropped there too."""
    assert RolloutFilter().target_loss == "reward"
    assert RolloutFilter().frac == 1.0


def test_evaluation_is_left_alone():
    plugin = RolloutFilter()
    advantages = torch.randn(4)
    rollouts = type("R", (), {"training": False})()
    assert plugin.advantages(rollouts=rollouts, rewards=None, advantages=advantages) is advantages


# -- target losses ---------------------------------------------------------------------------------------------------


def test_reward_loss_standardises_and_falls_back_where_rewards_hardly_spread():
    mask = torch.tensor([[1, 1], [1, 0]])
    torch.testing.assert_close(reward_loss(torch.tensor([1.0, 0.0]), mask), torch.tensor([[0.5, 0.5], [-0.5, 0.0]]))
    torch.testing.assert_close(reward_loss(torch.tensor([1.0, 1.0]), mask), torch.tensor([[0.25, 0.25], [0.25, 0.0]]))


def test_reward_loss_of_a_rank_is_its_part_of_that_over_all():
    rewards, mask = torch.tensor([0.0, 1.0, 3.0, 2.0]), torch.ones(4, 3)
    whole = reward_loss(rewards, mask)
    parts = [reward_loss(rewards[rows], mask[rows], rewards) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_token_policy_gradient_of_a_rank_is_its_part_of_that_over_all():
    """Ranks have different numbers of tokens: 1 and 4."""
    advantages, mask = torch.tensor([1.0, 1.0]), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    whole = token_policy_gradient(advantages, mask)
    parts = [token_policy_gradient(advantages[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 2))]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("function", [train_loss, token_policy_gradient, reward_loss])
def test_a_target_loss_states_its_shape_its_denominator_and_its_source(function):
    assert "(N, T)" in function.__doc__
    assert re.search(r"divide|denominator", function.__doc__)
    assert re.search(r"arXiv:2605\.07063|TRL's policy loss", function.__doc__)


def test_losses_weigh_tokens_as_trl_does():
    advantages, mask = torch.tensor([2.0, -1.0]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(train_loss(advantages, mask, "grpo"), torch.tensor([[1.0, 1, 0], [-1, 0, 0]]))
    torch.testing.assert_close(train_loss(advantages, mask, "dapo"), torch.tensor([[2.0, 2, 0], [-1, 0, 0]]))
    torch.testing.assert_close(token_policy_gradient(advantages, mask), torch.tensor([[2.0, 2, 0], [-1, 0, 0]]))
    half = 0.5 / (0.5**0.5 + 1e-4)  # of two rewards 0 and 1, over their unbiased standard deviation
    torch.testing.assert_close(
        group_advantages(torch.tensor([1.0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), "group"),
        torch.tensor([half, -half, 0, 0]),
    )


def test_inputs_put_labels_on_the_tokens_of_the_loss():
    batch = PolicyBatch(
        prompt_ids=torch.tensor([[0, 7]]),
        prompt_mask=torch.tensor([[0, 1]]),
        completion_ids=torch.tensor([[3, 4, 5]]),
        mask=torch.tensor([[1, 0, 1]]),
        coefficients=torch.ones(1, 3),
        completion_mask=torch.tensor([[1, 1, 1]]),
    )
    inputs = batch.inputs(slice(0, 1))
    assert inputs["labels"].tolist() == [[-100, -100, 3, -100, 5]]
    assert inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"frac": 1.5}, "frac"),
        ({"generations": 0}, "generations"),
        ({"target": "prompts"}, "reward"),
        ({"prompts": "x.jsonl"}, "target=prompts"),
        ({"target": "prompt"}, "target='prompt' is not one of rollout, prompts"),
        ({"target_loss": "rewards"}, "target_loss='rewards' is not one of train-loss, token-pg, reward"),
        ({"engine": "ghost"}, "engine='ghost' is not one of sketch, direct"),
    ],
)
def test_bad_options_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        check_options(RolloutFilter(**options))


@pytest.mark.parametrize("target_loss", ["train-loss", "token-pg"])
def test_advantages_within_groups_of_one_are_refused(held_out, target_loss):
    """They are all zero, and so would be the target: nothing would ever be dropped."""
    with pytest.raises(ValueError, match=r"generations=1 .* set generations to 2 or more, or target_loss=reward"):
        fresh(held_out, target_loss=target_loss, generations=1)


def test_rewards_as_target_do_with_one_completion_a_prompt(held_out):
    fresh(held_out, target_loss="reward", generations=1)
    RolloutFilter(generations=1)  # the rollout itself as target: groups are the trainer's


def test_too_few_held_out_prompts_are_refused(held_out):
    with pytest.raises(trl_ext.errors.ConfigurationError, match="prompts_per_step"):
        run([fresh(held_out, prompts_per_step=5)])
