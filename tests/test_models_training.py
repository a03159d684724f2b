"""What trains and what does not: gradients, frozen towers, losses, state dicts, autocast and torch.compile."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epic_fast
from epic_fast import EpicConfig
from epic_fast.errors import ConfigError
from epic_fast.testing import tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.probes import lively, make_batch, perturb

LABELS = torch.tensor([0, 2, 1])
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "gaussian": {"vision_prompt_init": "gaussian"},
    "a projection a step": {"shared_projections": False},
    "gaussian, a projection a step": {"vision_prompt_init": "gaussian", "shared_projections": False},
    "channel gates": {"gate": "channel"},
    "fixed gates": {"learn_gates": False, "gate_init": 0.5},
    "fixed temperature": {"learn_temperature": False},
    "one pair": {"num_layer_pairs": 1},
    "one pair, gaussian": {"num_layer_pairs": 1, "vision_prompt_init": "gaussian"},
    "one pair, a projection a step": {"num_layer_pairs": 1, "shared_projections": False},
    "no interaction": {"interaction": False},
    "no interaction, gaussian": {"interaction": False, "vision_prompt_init": "gaussian"},
    "no interaction, a projection a step": {"interaction": False, "shared_projections": False},
    "prefix": {"prompt_mask": "prefix"},
    "gaps": {"layer_pairs": [(0, 1), (2, 3)]},
    "activation": {"activation": "gelu_layernorm"},
    "prompts into the head": {"head_reads_prompts": True},
    "prompts into the head, one pair, gaussian": {
        "head_reads_prompts": True,
        "num_layer_pairs": 1,
        "vision_prompt_init": "gaussian",
    },
    "no prompts, nor in the head": {"prompt_length": 0, "head_reads_prompts": True},
    "mlp": {"head": "mlp", "feature_norm": "layer"},
    "no prompts": {"prompt_length": 0},
    "means": {"text_head_input": "mean+pooled+projected", "vision_head_input": "cls+mean+projected"},
}


def make_model(fields: dict[str, Any] | None = None, **task: Any) -> Any:
    torch.manual_seed(0)
    config = EpicConfig(**{"prompt_length": 3, "head_dropout": 0.0, **(fields or {})})
    return epic_fast.wrap(lively(tiny_clip()), config, **{"num_labels": 3, **task})


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_trainable_tensor_gets_a_gradient_and_nothing_else_does(name: str) -> None:
    model = make_model(CONFIGS[name]).train()
    batch = make_batch([8, 5, 6])
    model(**batch, labels=LABELS).loss.backward()
    trainable = dict(model.trainable_parameters())
    assert {name for name, each in model.named_parameters() if each.requires_grad} == set(trainable)
    assert not [name for name, each in trainable.items() if each.grad is None]
    assert not [name for name, each in model.backbone.named_parameters() if each.grad is not None]
    model.zero_grad()
    perturb(model)
    model(**batch, labels=LABELS).loss.backward()
    assert not [name for name, each in trainable.items() if not each.grad.abs().max() > 0]
    groups = model.parameter_groups()
    assert sorted(id(each) for group in groups.values() for each in group) == sorted(map(id, trainable.values()))
    assert set(groups) <= {"prompts", "projections", "gates", "head"}


def test_gates_at_zero_learn_although_the_hub_changes_nothing_yet() -> None:
    model = make_model().train()
    control = make_model({"interaction": False}).train()
    shared = control.state_dict().keys() - {"hub.text_gate", "hub.vision_gate"}
    control.load_state_dict({name: each for name, each in model.state_dict().items() if name in shared}, strict=False)
    batch = make_batch([8, 5, 6])
    assert torch.equal(model(**batch).logits, control(**batch).logits)
    model(**batch, labels=LABELS).loss.backward()
    assert model.hub.text_gate.grad.abs().max() > 0
    assert model.hub.vision_gate.grad.abs().max() > 0


def test_frozen_tensors_are_the_same_bits_after_training_and_the_rest_moved() -> None:
    model = make_model({"gate_init": 0.1}).train()
    before, trained_before = tensors(model), {name: each.clone() for name, each in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(4):
        loss = model(**make_batch([8, 5, 6], seed=seed), labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = tensors(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(trained_before[name], each) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.backbone.parameters())


def test_layers_below_the_first_pair_run_once_and_leave_no_graph() -> None:
    model = make_model({"layer_pairs": [(1, 2), (2, 3)]}).train()
    clip = model.backbone.model
    graphs: dict[str, list[bool]] = {}

    def watch(name: str) -> Any:
        return lambda module, inputs, output: graphs.setdefault(name, []).append(output.requires_grad)

    for side, layers in (("text", clip.text_model.encoder.layers), ("vision", clip.vision_model.encoder.layers)):
        for index, layer in enumerate(layers):
            layer.register_forward_hook(watch(f"{side} {index}"))
    saved: list[tuple[int, ...]] = []
    batch = make_batch([8, 5, 6])
    batch["pixel_values"].requires_grad_()  # not even then
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each.shape) or each, lambda each: each):
        prefix = model.extract(**batch)
        assert saved == []
        loss = model(prefix=prefix, labels=LABELS).loss
    assert saved
    assert not prefix.text.hidden.requires_grad
    assert not prefix.vision.hidden.requires_grad
    assert graphs == {
        **{"text 0": [False], "text 1": [True], "text 2": [True]},
        **{"vision 0": [False], "vision 1": [False], "vision 2": [True], "vision 3": [True]},
    }
    loss.backward()


def test_a_later_first_pair_leaves_a_smaller_graph() -> None:
    """Counted in autograd nodes: extraction layers cost none."""

    def nodes(pairs: list[tuple[int, int]]) -> int:
        loss = make_model({"layer_pairs": pairs}).train()(**make_batch([8, 5, 6]), labels=LABELS).loss
        seen, stack = set(), [loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack.extend(parent for parent, _ in node.next_functions)
        return len(seen)

    assert nodes([(2, 3)]) < nodes([(1, 3)]) < nodes([(0, 0)])


@pytest.mark.parametrize("fields", [{}, {"gate": "channel", "shared_projections": False, "prompt_mask": "prefix"}])
def test_gradients_are_those_of_finite_differences(fields: dict[str, Any]) -> None:
    model = perturb(make_model({"prompt_length": 2, **fields}), scale=0.2).double().eval()
    batch = make_batch([6, 4, 5], dtype=torch.float64)

    def loss() -> Tensor:
        return model(**batch, labels=LABELS).loss

    loss().backward()
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.trainable_parameters():
        direction = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        numeric, analytic = float((above - below) / (2 * step)), float((parameter.grad * direction).sum())
        assert analytic != 0.0, name
        assert math.isclose(numeric, analytic, rel_tol=1e-5, abs_tol=1e-8), (name, numeric, analytic)


def test_half_precision_towers_train_with_single_precision_prompts() -> None:
    clip = lively(tiny_clip()).to(torch.bfloat16)
    model = perturb(epic_fast.wrap(clip, EpicConfig(prompt_length=3), num_labels=3), scale=0.05).train()
    assert {each.dtype for _, each in model.trainable_parameters()} == {torch.float32}
    out = model(**make_batch([8, 5, 6]), labels=LABELS)
    assert out.logits.dtype == torch.float32
    out.loss.backward()
    assert all(each.grad.dtype == torch.float32 for _, each in model.trainable_parameters())


# -- frozen towers stay in eval() ---------------------------------------------------------------------------------


def noisy_towers(kind: str) -> Any:
    """Towers whose every dropout is on in training."""
    from transformers import BertModel, CLIPModel, ViTModel

    if kind == "clip":
        config = tiny_clip().config
        config.text_config.attention_dropout = config.vision_config.attention_dropout = 0.5
        return lively(CLIPModel(config))
    vit, bert = tiny_vit().config, tiny_bert().config
    for config in (vit, bert):
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.5
    return lively((ViTModel(vit, add_pooling_layer=False), BertModel(bert)))


@pytest.mark.parametrize("kind", ["clip", "pair"])
def test_frozen_towers_stay_in_eval_whatever_the_caller_does(kind: str) -> None:
    towers = noisy_towers(kind)
    both = towers if isinstance(towers, tuple) else (towers.vision_model, towers.text_model)
    for tower in both:
        tower.train()
    model = epic_fast.wrap(towers, EpicConfig(prompt_length=2, head_dropout=0.0), num_labels=3)
    batch = make_batch([8, 5, 6])
    wanted = model.eval()(**batch).logits
    for disturb in (model.train, model.backbone.train, both[0].train, both[1].train, both[1].encoder.train):
        disturb()
        model.head.train()
        assert torch.equal(model(**batch).logits, wanted)
    assert model.train().training
    assert not any(module.training for module in model.backbone.modules())
    both[0].train(), both[1].train()
    prefix = model.extract(**batch)
    both[0].train(), both[1].train()
    assert torch.equal(model(prefix=prefix).logits, wanted)


def test_dropout_of_the_head_follows_train_and_eval() -> None:
    model = make_model({"head_dropout": 0.5})
    batch = make_batch([8, 5, 6])
    assert torch.equal(model.eval()(**batch).logits, model(**batch).logits)
    assert not torch.equal(model.train()(**batch).logits, model(**batch).logits)


# -- losses ---------------------------------------------------------------------------------------------------------


def test_the_single_label_loss_is_cross_entropy_with_smoothing() -> None:
    for smoothing in (0.0, 0.2):
        model = make_model({"label_smoothing": smoothing}).eval()
        out = model(**make_batch([8, 5, 6]), labels=LABELS)
        logs = out.logits - out.logits.exp().sum(dim=1, keepdim=True).log()
        target = nn.functional.one_hot(LABELS, 3) * (1 - smoothing) + smoothing / 3
        assert torch.allclose(out.loss, -(target * logs).sum(dim=1).mean(), atol=1e-6)


@pytest.mark.parametrize("integers", [False, True])
def test_the_multi_label_loss_weighs_the_positives(integers: bool) -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]])
    weight = torch.tensor([2.0, 0.5, 3.0])
    for given in (None, weight, [2.0, 0.5, 3.0]):
        model = make_model(problem_type="multi_label_classification", pos_weight=given).eval()
        out = model(**make_batch([8, 5, 6]), labels=labels if integers else labels.float())
        positive = torch.ones(3) if given is None else weight
        chance = out.logits.sigmoid()
        wanted = -(positive * labels * chance.log() + (1 - labels) * (1 - chance).log()).mean()
        assert torch.allclose(out.loss, wanted, atol=1e-6)


def test_pos_weight_auto_must_be_resolved_before_the_loss() -> None:
    model = make_model(problem_type="multi_label_classification", pos_weight="auto")
    batch, labels = make_batch([8, 5, 6]), torch.zeros(3, 3)
    assert model.pos_weight == "auto"
    model(**batch)
    with pytest.raises(ConfigError, match=r"'auto' is not resolved.*set_pos_weight"):
        model(**batch, labels=labels)
    model.set_pos_weight([1.0, 2.0, 3.0])
    assert model.pos_weight.tolist() == [1.0, 2.0, 3.0]
    assert torch.isfinite(model(**batch, labels=labels).loss)
    with pytest.raises(ConfigError, match=r"pos_weight has shape \(2,\); wanted \(3,\)"):
        model.set_pos_weight(torch.ones(2))


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_regression_loss_is_the_mean_squared_error(outputs: int) -> None:
    model = make_model(problem_type="regression", num_labels=outputs).eval()
    labels = torch.tensor([[0.5, 1.0, 2.0], [-1.0, 0.0, 3.0], [2.0, 2.0, 2.0]])[:, :outputs]
    batch = make_batch([8, 5, 6])
    for given in [labels] + ([labels[:, 0], labels[:, 0].double()] if outputs == 1 else []):
        out = model(**batch, labels=given)
        assert torch.allclose(out.loss, ((out.logits - labels) ** 2).mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("problem_type", "labels", "said"),
    [
        ("single_label_classification", torch.zeros(2, dtype=torch.long), r"labels have shape \(2,\).*\(3,\)"),
        ("single_label_classification", torch.tensor([0, 7, 1]), r"labels hold \[7\]; wanted classes 0 to"),
        ("single_label_classification", torch.tensor([0, -1, 1]), r"labels hold \[-1\]; wanted classes 0 to"),
        ("single_label_classification", torch.zeros(3), r"labels .*float32.*integers"),
        ("multi_label_classification", torch.zeros(3, dtype=torch.long), r"shape \(3,\).*\(3, 4\)"),
        ("regression", torch.zeros(4, 3), r"shape \(4, 3\).*\(3, 4\)"),
        ("regression", torch.zeros(12), r"shape \(12,\).*\(3, 4\)"),
    ],
)
def test_labels_of_the_wrong_kind_say_what_was_wanted(problem_type: str, labels: Tensor, said: str) -> None:
    model = make_model(problem_type=problem_type, num_labels=4)
    with pytest.raises(ConfigError, match=said):
        model(**make_batch([8, 5, 6]), labels=labels)


def test_the_loss_can_be_traced_and_mapped() -> None:
    model = make_model(num_labels=4).eval()
    logits, labels = torch.randn(2, 3, 4), torch.tensor([[0, 3, 1], [2, 2, 0]])
    wanted = torch.stack([model.loss(*each) for each in zip(logits, labels, strict=True)])
    torch.testing.assert_close(torch.func.vmap(model.loss)(logits, labels), wanted)
    first = logits[0], labels[0]
    with torch._subclasses.FakeTensorMode() as fake:
        assert model.loss(*map(fake.from_tensor, first)).shape == ()


def test_a_whole_model_of_before_the_engine_was_a_property() -> None:
    model = make_model()
    model.engine = epic_fast.EngineConfig(blocks="fused")
    state = dict(model.__dict__)
    state["engine"] = state.pop("_engine")
    old = type(model).__new__(type(model))
    old.__setstate__(state)
    assert old.engine == model.engine
    assert copy.deepcopy(model).engine == model.engine


def test_labels_that_do_not_count() -> None:
    model, batch = make_model(num_labels=4).eval(), make_batch([8, 5, 6])
    found = model(**batch, labels=torch.tensor([1, -100, 3]))
    wanted = torch.nn.functional.cross_entropy(found.logits[[0, 2]], torch.tensor([1, 3]))
    torch.testing.assert_close(found.loss, wanted)


@pytest.mark.parametrize("engine", ["fast", {"graphs": True}, True])
def test_an_engine_is_a_configuration(engine: Any) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=r"engine=.*wanted an EngineConfig, or None"):
        model.engine = engine
    assert model.engine is None


def test_inputs_that_do_not_belong_together_say_so() -> None:
    model, batch = make_model(), make_batch([8, 5, 6])
    with pytest.raises(ConfigError, match="pixel_values was not given"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ConfigError, match="input_ids was not given"):
        model(pixel_values=batch["pixel_values"])
    with pytest.raises(ConfigError, match="2 pictures and 3 texts"):
        model(pixel_values=batch["pixel_values"][:2], input_ids=batch["input_ids"])
    with pytest.raises(ConfigError, match="input_ids has 17 tokens, but this text tower takes 16"):
        model(**make_batch([17, 4]))
    with pytest.raises(ConfigError, match=r"input_ids has shape \(8,\)"):
        model(pixel_values=batch["pixel_values"][:1].expand(8, -1, -1, -1), input_ids=batch["input_ids"][0])


# -- state ------------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As DistributedDataParallel: everything under the name ``module``."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def test_state_dicts_hold_the_trainable_tensors_and_load_strictly() -> None:
    model, other = perturb(make_model()), make_model()
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.trainable_parameters()}
    assert other.load_state_dict(state, strict=True).missing_keys == []
    batch = make_batch([8, 5, 6])
    assert torch.equal(other.eval()(**batch).logits, model.eval()(**batch).logits)
    wrapped = Wrapper(perturb(make_model(), seed=8))
    assert set(wrapped.state_dict()) == {f"module.{name}" for name in state}
    wrapped.load_state_dict({f"module.{name}": each for name, each in state.items()}, strict=True)
    assert torch.equal(wrapped.module.eval()(**batch).logits, model(**batch).logits)


def test_loading_strictly_still_complains_of_missing_and_unknown_tensors() -> None:
    model = make_model()
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="text_prompt"):
        model.load_state_dict({name: each for name, each in state.items() if name != "text_prompt"})
    with pytest.raises(RuntimeError, match="surprise"):
        model.load_state_dict({**state, "surprise": torch.ones(1)})

    class Mine(nn.Module):
        """A module of the user's own, whose other part is called ``backbone`` too."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(2, 2)
            self.epic = make_model()

    mine = Mine()
    state = mine.state_dict()
    assert "backbone.weight" in state
    del state["backbone.weight"]
    with pytest.raises(RuntimeError, match=r"backbone\.weight"):
        mine.load_state_dict(state)


def test_a_copy_is_independent() -> None:
    model = perturb(make_model()).eval()
    batch = make_batch([8, 5, 6])
    wanted = model(**batch).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**batch).logits, wanted)


# -- speed without another result -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "pair", "pair, activation"])
def test_torch_compile_takes_the_whole_forward_pass_for_all_sizes(kind: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    fields = {"activation": "gelu_layernorm"} if "activation" in kind else {}
    backbone = lively(tiny_clip() if kind == "clip" else (tiny_vit(), tiny_bert()))
    model = perturb(epic_fast.wrap(backbone, EpicConfig(prompt_length=3, **fields), num_labels=3)).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for lengths in ([8, 5, 6], [9, 3], [7, 4, 7, 4, 5], [12, 9]):
        prefix, labels = model.extract(**make_batch(lengths)), torch.zeros(len(lengths), dtype=torch.long)
        wanted, found = model(prefix=prefix, labels=labels), compiled(prefix=prefix, labels=labels)
        assert torch.equal(found.logits, wanted.logits)
        assert torch.equal(found.loss, wanted.loss)
    assert counter.frame_count == 2  # the first sizes, then all others
    found.loss.backward()
    assert all(each.grad is not None for _, each in model.trainable_parameters())


@pytest.mark.parametrize("kind", ["clip", "clip eager", "pair", "activation"])
def test_bfloat16_autocast_is_close(kind: str) -> None:
    fields = {"activation": "gelu_layernorm"} if kind == "activation" else {}
    backbone = lively((tiny_vit(), tiny_bert()) if kind == "pair" else tiny_clip(), scale=0.05)
    if kind == "clip eager":
        backbone.set_attn_implementation("eager")
    config = EpicConfig(prompt_length=3, **fields)
    model = perturb(epic_fast.wrap(backbone, config, num_labels=3), scale=0.05).eval()
    batch = make_batch([8, 5, 6])
    wanted = model(**batch).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch, labels=LABELS)
    assert out.logits.dtype == torch.float32
    assert not torch.equal(out.logits, wanted)
    assert (out.logits - wanted).abs().max() < 0.05 * wanted.abs().max()
    out.loss.backward()
    assert all(torch.isfinite(each.grad).all() for _, each in model.trainable_parameters())


def test_prefix_in_place_of_inputs_gives_the_same_bits() -> None:
    model, batch = perturb(make_model()).eval(), make_batch([8, 5, 6])
    wanted = model(**batch, labels=LABELS)
    found = model(prefix=model.extract(**batch), labels=LABELS)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.loss, wanted.loss)
    assert model(**batch).loss is None


def test_the_first_step_may_be_a_compiled_one() -> None:
    """Whether a head still waits for statistics is no question for a traced graph."""
    model = make_model().train()
    batch = {**make_batch([8, 5, 6]), "labels": LABELS}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
