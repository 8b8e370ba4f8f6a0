"""The plugin in SFT: updates against per-sample gradients by plain autograd, and against plain TRL."""

import copy
import weakref

import pytest
import torch
from peft import LoraConfig
from short_runs import GENERAL, TARGET, DataRegularization, differences, model, parameters, train
from trl.trainer.utils import add_fused_lm_head
from trl_ext_data_regularization.gradient_surgery import GradientSurgery
from trl_ext_data_regularization.layers import find_layers

from trl_ext.testing import tiny_qwen2

SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1}
SLOW = pytest.mark.slow  # the same path with another setting
# Gradients of a tiny fp32 model, summed in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


def sharpened(net):
    """At initialisation samples hardly differ; sharper weights tell them apart."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return net


def gradients_of(net, rows):
    """Per sample, the gradient of its summed loss by autograd on that sample alone, and its label tokens."""
    net = copy.deepcopy(net)
    add_fused_lm_head(net)
    names = {name: p for name, p in net.named_parameters() if p.requires_grad}
    gradients, tokens = [], []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        loss = -net(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum()
        gradients.append(dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True)))
        tokens.append(int((labels[:, 1:] != -100).sum()))
    return gradients, tokens


def layers_of(net):
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    return [[names[i] for i in layer.parameters] for layer in find_layers(net, names)[0]]


class Reference:
    """One step on all of a small general set, with a target set of one sample, from the definitions."""

    def __init__(self, net, general, target):
        g, self.tokens = gradients_of(net, general)
        t, target_tokens = gradients_of(net, target)
        self.total = sum(self.tokens)
        self.g = [{name: x / self.total for name, x in sample.items()} for sample in g]
        self.t = {name: sum(sample[name] for sample in t) / sum(target_tokens) for name in t[0]}
        self.n = len(g)

    def scores(self, names):
        return [float(sum((sample[name] * self.t[name]).sum() for name in names)) for sample in self.g]

    def subset(self, kept, name):
        scale = self.total / sum(self.tokens[i] for i in kept)
        return scale * sum(self.g[i][name] for i in kept)

    def topk(self, groups, k):
        """Name to update, when each group of parameters keeps its own k best samples."""
        update = {}
        for names in groups:
            scores = self.scores(names)
            kept = sorted(range(self.n), key=lambda i: -scores[i])[:k]
            update |= {name: self.subset(kept, name) for name in names}
        return update


def assert_update(before, trainer, expected):
    after = parameters(trainer)
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(before[name] - after[name], value, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def prepared():
    """The general and target samples as the trainer tokenizes them."""
    few = {"data": GENERAL.select(range(8)), "streams": {"target": TARGET.select([0])}}
    trainer = train(DataRegularization(rule="full"), **few, max_steps=1)
    return list(trainer.train_dataset), list(trainer.ext_streams["target"].dataset)


def one_step(plugin, net, accumulation=1, **options):
    few = {"data": GENERAL.select(range(8)), "streams": {"target": TARGET.select([0])}}
    size = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    return train(plugin, net, **few, **SGD, **size, **options)


# -- layer-wise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulation", "options"),
    [
        (1, {"passes": "one"}),
        (1, {"passes": "two"}),
        (2, {}),
        (2, {"engine": "direct"}),
        (1, {"engine": "sketch", "sketch_size": 512}),  # as wide as every layer: exact
        (2, {"engine": "sketch", "sketch_size": 512}),
    ],
)
def test_every_layer_trains_on_its_own_best_samples(prepared, accumulation, options):
    net = sharpened(model(layers=1))
    reference = Reference(net, *prepared)
    trainer = one_step(DataRegularization(frac=0.5, **options), net, accumulation)
    assert_update(dict(net.named_parameters()), trainer, reference.topk(layers_of(net), 4))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_tied_embedding_is_one_layer_scored_once(prepared, accumulation):
    net = sharpened(tiny_qwen2(hidden=16, layers=1))
    groups = layers_of(net)
    assert ["model.embed_tokens.weight"] in groups
    trainer = one_step(DataRegularization(frac=0.5), net, accumulation)
    assert_update(dict(net.named_parameters()), trainer, Reference(net, *prepared).topk(groups, 4))


def test_gradient_checkpointing_changes_nothing(prepared):
    net = sharpened(model(layers=1))
    expected = Reference(net, *prepared).topk(layers_of(net), 4)
    for passes in ("one", "two"):
        trainer = one_step(DataRegularization(frac=0.5, passes=passes), net, activation_checkpointing=True)
        assert_update(dict(net.named_parameters()), trainer, expected)


def test_the_targets_gradient_can_be_added(prepared):
    net = sharpened(model(layers=1))
    reference = Reference(net, *prepared)
    expected = {name: u + reference.t[name] for name, u in reference.topk(layers_of(net), 4).items()}
    trainer = one_step(DataRegularization(frac=0.5, with_target=True), net)
    assert_update(dict(net.named_parameters()), trainer, expected)


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, pytest.param({"unit": "micro"}, marks=SLOW)])
@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=SLOW)])
def test_target_only_is_the_targets_gradient(prepared, accumulation, options):
    net = sharpened(model(layers=1))
    trainer = one_step(DataRegularization(rule="target", **options), net, accumulation)
    assert_update(dict(net.named_parameters()), trainer, Reference(net, *prepared).t)


@pytest.mark.parametrize("options", [{}, {"scope": "global"}])
def test_a_wide_ball_reaches_the_target_and_a_point_is_full_training(prepared, options):
    net = sharpened(model(layers=1))
    reference = Reference(net, *prepared)
    mean = {name: sum(g[name] for g in reference.g) for name in reference.t}
    for radius, expected in ((1e4, reference.t), (0.0, mean)):
        trainer = one_step(DataRegularization(rule="ball", radius=radius, **options), net)
        assert_update(dict(net.named_parameters()), trainer, expected)


@pytest.mark.parametrize(
    "rule", ["cone", "second-order", *(pytest.param(r, marks=SLOW) for r in ("hull", "capped", "span"))]
)
def test_one_pass_equals_two_passes(rule):
    runs = [
        train(DataRegularization(rule=rule, passes=passes), sharpened(model(layers=1)), optim="sgd", max_steps=2)
        for passes in ("one", "two")
    ]
    scale = max(float(p.abs().max()) for p in parameters(runs[1]).values())
    assert differences(*runs) <= 1e-5 * scale  # fp32, in two orders of summation


@pytest.mark.parametrize("rule", ["topk", "cone"])
def test_micro_batches_choose_alike_in_one_pass_and_in_two(rule):
    """A micro-batch's choice is one of shares of its own token mean, whatever the window divides by."""
    runs = [
        train(
            DataRegularization(rule=rule, unit="micro", passes=passes),
            sharpened(model(layers=1)),
            **{**SGD, "learning_rate": 0.1},
            gradient_accumulation_steps=3,
        )
        for passes in ("one", "two")
    ]
    assert differences(*runs) <= 1e-5


# -- global ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["ghost", "derivative", pytest.param("direct", marks=SLOW)])
@pytest.mark.parametrize("accumulation", [2, pytest.param(1, marks=SLOW)])
def test_global_scope_keeps_one_subset_for_all_layers(prepared, engine, accumulation):
    net = sharpened(model(layers=1))
    names = [name for name, _ in net.named_parameters()]
    trainer = one_step(DataRegularization(scope="global", engine=engine, frac=0.5), net, accumulation)
    assert_update(dict(net.named_parameters()), trainer, Reference(net, *prepared).topk([names], 4))


@pytest.mark.parametrize(
    "rule", ["topk", "cone", *(pytest.param(r, marks=SLOW) for r in ("filter", "second-order", "hull"))]
)
def test_with_a_single_layer_layerwise_is_global(rule):
    def single():
        net = sharpened(model(layers=1))
        for name, parameter in net.named_parameters():
            parameter.requires_grad_("down_proj" in name)
        return net

    options = {"optim": "sgd", "gradient_accumulation_steps": 2, "max_steps": 3}
    runs = [train(DataRegularization(rule=rule, scope=scope), single(), **options) for scope in ("layer", "global")]
    assert differences(*runs) <= 1e-6


# -- plain TRL -------------------------------------------------------------------------------------------------------

SETTINGS = {
    "one pass": {},
    "two passes": {"passes": "two"},
    "global": {"scope": "global"},
    "derivative": {"scope": "global", "engine": "derivative"},
    "sketch": {"rule": "second-order", "engine": "sketch"},
    "micro": {"unit": "micro"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_keeping_all_samples_is_plain_trl_to_the_bit(setting):
    options = {} if setting == "one pass" else {"gradient_accumulation_steps": 2}
    assert differences(train(**options), train(DataRegularization(frac=1.0, **SETTINGS[setting]), **options)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"bf16": True},
        {"padding_free": True, "packing": True, "max_length": 32},
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "down_proj"])},
    ],
    ids=["checkpointing", "bf16", "packing", "lora"],
)
@pytest.mark.parametrize("passes", ["two", pytest.param("one", marks=SLOW)])
def test_keeping_all_samples_is_plain_trl_to_the_bit_also_with(options, passes):
    assert differences(train(**options), train(DataRegularization(frac=1.0, passes=passes), **options)) == 0


def test_tied_weights_too():
    net = tiny_qwen2(hidden=16, layers=1)
    assert differences(train(net=net), train(DataRegularization(frac=1.0), net)) == 0


def test_a_second_training_taps_once():
    plugin = DataRegularization(frac=0.5)
    trainer = train(plugin, max_steps=2)
    tapped = {name: m.forward for name, m in trainer.model.named_modules() if "forward" in vars(m)}
    trainer.train()
    plugin._model.remove()
    left = {name for name, m in trainer.model.named_modules() if "forward" in vars(m)}
    assert left == {""}, "only TRL's fused head replaces a forward of its own"
    assert len(tapped) > 10


# -- the trainer's own data as the target ----------------------------------------------------------------------------


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_general_data_can_be_the_stream(prepared, accumulation, with_target):
    net = sharpened(model(layers=1))
    trainer = train(
        DataRegularization(general="stream", frac=0.5, with_target=with_target),
        net,
        data=GENERAL.select(range(8)),
        streams={"general": TARGET},
        **{**SGD, "per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation},
    )
    reference = Reference(net, list(trainer.ext_streams["general"].dataset), prepared[0])
    # 8 of the 6 samples of the stream: its second pass begins, so some are drawn twice.
    seen = trainer.ext_streams["general"]
    seen.position = 0
    rows = seen.next_indices()
    reference = Reference(net, [seen.dataset[i] for i in rows], prepared[0])
    expected = reference.topk(layers_of(net), 4)
    if with_target:
        expected = {name: u + reference.t[name] for name, u in expected.items()}
    assert_update(dict(net.named_parameters()), trainer, expected)


def test_general_stream_with_all_kept_is_plain_trl_on_the_general_data():
    trainer = train(
        DataRegularization(general="stream", rule="full"),
        data=TARGET,
        streams={"general": GENERAL.select(range(8))},
        **SGD,
    )
    plain = train(data=GENERAL.select(range(8)), **{**SGD, "per_device_train_batch_size": 8})
    assert differences(trainer, plain) <= 1e-6  # the stream's order of samples is another


# -- options ---------------------------------------------------------------------------------------------------------


def test_preconditioned_scores_follow_adams_second_moments():
    plugin = DataRegularization(precondition=True, scope="global", frac=0.5)
    trainer = train(plugin, max_steps=2)
    optimizer, parameter = plugin._optimizer, trainer.model.lm_head.weight
    from trl_ext_data_regularization.preconditioner import preconditioned

    gradient = torch.randn_like(parameter)
    (found,) = preconditioned(optimizer, [parameter], [gradient])
    state = optimizer.state[parameter]
    expected = gradient / ((state["exp_avg_sq"] / (1 - 0.999 ** int(state["step"]))).sqrt() + 1e-8)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("plugin", [DataRegularization, GradientSurgery])
@pytest.mark.parametrize("options", [{}, {"optim_args": "momentum=0.9"}])
def test_precondition_refuses_an_optimizer_without_second_moments(plugin, options):
    with pytest.raises(Exception, match="second moments, and SGD has none"):
        train(
            plugin(general="train", precondition=True), optim="sgd", max_steps=1, streams={"target": TARGET}, **options
        )


def test_preconditioned_choice_is_that_of_the_definition():
    """In the second step of Adam: the best by <g_i, t / (sqrt(v) + eps)>, with weights and moments as they were."""

    class Spy(DataRegularization):
        def _weigh(self, window, tapped):
            named = dict(self._context.model.named_parameters())
            self.before = {name: p.detach().clone() for name, p in named.items()}
            self.moments = {name: copy.deepcopy(self._optimizer.state.get(p)) for name, p in named.items()}
            out = super()._weigh(window, tapped)
            rows, kept = window.micro_batches[0]["input_ids"].tolist(), self._choice.weights[0].tolist()
            self.kept = {tuple(row) for row, weight in zip(rows, kept, strict=True) if weight > 0}
            return out

    net, plugin = sharpened(model(layers=1)), Spy(precondition=True, scope="global", frac=0.25)
    few = {"data": GENERAL.select(range(8)), "streams": {"target": TARGET.select([0])}}
    trainer = train(plugin, net, **few, per_device_train_batch_size=8, max_steps=2)
    net.load_state_dict(plugin.before, strict=False)
    reference = Reference(net, list(trainer.train_dataset), list(trainer.ext_streams["target"].dataset))
    raw = reference.scores(list(reference.t))
    for name, t in reference.t.items():
        moments = plugin.moments[name]
        second = moments["exp_avg_sq"] / (1 - 0.999 ** float(moments["step"]))
        reference.t[name] = t / (second.sqrt() + 1e-8)
    best, plain = (
        torch.tensor(scores).topk(2).indices.tolist() for scores in (reference.scores(list(reference.t)), raw)
    )
    assert set(best) != set(plain), "else the test could not tell the two apart"
    ids = [tuple(row["input_ids"]) for row in trainer.train_dataset]
    assert {row[: len(one)] for row in plugin.kept for one in ids if row[: len(one)] == one} == {ids[i] for i in best}


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"scope": "global"}, {"rule": "cone"}])
def test_sketched_target_is_dropped_and_the_choice_stays(options):
    """`position_steps` asks for t at the end of the step, so there it is kept: the updates must be the same."""
    plugin = {name: options[name] for name in ("scope", "rule") if name in options}
    config = {name: value for name, value in options.items() if name not in plugin}
    kept, dropped = (
        train(DataRegularization(engine="sketch", sketch_size=8, position_steps=n, **plugin), model(), **config)
        for n in (100, 0)
    )
    logged = [
        {key.rpartition("/")[2] for log in trainer.state.log_history for key in log} for trainer in (kept, dropped)
    ]
    assert ["update_cosine" in keys for keys in logged] == [True, False]
    assert all("kept" in keys for keys in logged)
    assert differences(kept, dropped) == 0


@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("with_target", [False, True])
def test_a_sketched_target_takes_no_memory_in_the_windows_own_pass(passes, with_target):
    """Unless the update needs it."""
    alive, tensors = [], []

    class Spy(DataRegularization):
        def _begin_step(self, samples, target):
            tensors.extend(weakref.ref(t.untyped_storage()) for t in target if t is not None)
            return super()._begin_step(samples, target)

    def look(module, args, output):
        if module.training and tensors:
            alive.append(sum(reference() is not None for reference in tensors))

    net = model(layers=1)
    net.register_forward_hook(look)
    train(Spy(engine="sketch", sketch_size=4, passes=passes, with_target=with_target), net, max_steps=1)
    assert alive[-1] == (len(tensors) if with_target else 0)
    assert tensors


@pytest.mark.parametrize("points", [2, 4])
def test_derivative_takes_as_many_forwards_as_it_is_told(points):
    forwards = []
    net = model(layers=1)
    net.register_forward_hook(lambda module, args, output: forwards.append(torch.is_grad_enabled()))
    train(DataRegularization(scope="global", engine="derivative", points=points), net, max_steps=1)
    assert forwards.count(False) == points
    assert forwards.count(True) == 2  # the target's and the window's own
