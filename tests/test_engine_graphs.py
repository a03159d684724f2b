"""Graphs: what is copied in and out, which graph is taken, when it is thrown away, and that nothing else changes.

Without a GPU a backend that calls again what it recorded stands in for CUDA graphs; with one, CUDA graphs themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import epic_fast
from epic_fast.classifier import Classifier
from epic_fast.engine import CapturedCall, EngineConfig, Prefix, TowerState, graphed
from epic_fast.engine import graphs as engine_graphs
from epic_fast.engine.graphs import GraphCache, flatten, say_once, to_bucket, unflatten
from epic_fast.errors import ConfigError, DataError, EpicFastError
from epic_fast.testing import tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.graphs import FakeBackend
from epic_fast.testing.pairs import RandomPairs
from epic_fast.training import TrainingConfig, fit, loop, predict
from epic_fast.training.graphs import CapturedStep, why_not_captured
from epic_fast.training.loop import backward_threads
from epic_fast.training.optim import make_optimizer

CPU = torch.device("cpu")
EAGER = EngineConfig(blocks="plain", pooled_rows=False, trim_text=False)
GRAPHS = dataclasses.replace(EAGER, graphs=True)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _said_nothing_yet():
    say_once.cache_clear()


@pytest.fixture
def fake(monkeypatch):
    """The stand-in wherever a backend is asked for."""
    backend = FakeBackend()
    for module in (engine_graphs, loop):
        monkeypatch.setattr(module, "backend_for", lambda device: backend)
    return backend


def build(engine=GRAPHS, *, backbone=None, **options):
    backbone = tiny_clip() if backbone is None else backbone
    torch.manual_seed(0)
    config = {"prompt_length": 2, "num_layer_pairs": 2, "head_dropout": 0.3} | options
    return epic_fast.wrap(backbone, epic_fast.EpicConfig(**config), num_labels=3, self_check=False, engine=engine)


def settings(**changes) -> TrainingConfig:
    values = {"epochs": 3, "batch_size": 8, "log_every_steps": 1, "tensorboard": False, "device": "cpu"}
    return TrainingConfig(**{**values, "learning_rate": 1e-2, "head_learning_rate": 1e-2, **changes})


class Ragged(RandomPairs):
    """Texts of 3 to 6 tokens, padded to 6 in the sample already."""

    def __getitem__(self, index):
        sample = dict(super().__getitem__(index))
        length = 3 + index % 4
        sample["input_ids"] = sample["input_ids"].clone()
        sample["input_ids"][length - 1] = 38
        sample["input_ids"][length:] = 0
        sample["attention_mask"] = (torch.arange(6) < length).long()
        return sample


def batch_of(*indices, device="cpu", labels=True):
    data = Ragged(32)
    samples = [data[index] for index in indices]
    names = [name for name in samples[0] if labels or name != "labels"]
    return {name: torch.stack([each[name] for each in samples]).to(device) for name in names}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)


# -- trees and buckets ----------------------------------------------------------------------------------------


def test_trees_come_back_and_say_what_they_are():
    state = TowerState(torch.ones(2, 3, 4), 2, torch.ones(2, 3, dtype=torch.bool))
    tree = {"prefix": Prefix(state, TowerState(torch.zeros(2, 5))), "more": [torch.arange(2), (1, "a", None)]}
    leaves, structure = flatten(tree)
    assert len(leaves) == 4
    back = unflatten(structure, [each + 1 if each.dtype != torch.bool else each for each in leaves])
    assert isinstance(back["prefix"], Prefix)
    assert back["prefix"].text.layer == 2
    assert back["prefix"].text.valid is state.valid
    assert torch.equal(back["prefix"].vision.hidden, torch.ones(2, 5))
    assert back["more"][1] == (1, "a", None)
    assert hash(structure) == hash(flatten(tree)[1])
    for other in (1.0, True, 2):
        assert flatten({**tree, "more": [torch.arange(2), (other, "a", None)]})[1] != structure
    with pytest.raises(TypeError):
        flatten({"a": bytearray(2)})


@pytest.mark.parametrize("backbone", [tiny_clip, lambda: (tiny_vit(), tiny_bert())], ids=["clip", "vit+bert"])
def test_a_fuller_text_gives_the_same_logits(backbone):
    model = build(EAGER, backbone=backbone(), text_head_input="pooled+mean").eval()
    batch = batch_of(0, 1, 2, labels=False)
    fuller = to_bucket(batch, most=16, multiple=8)
    assert fuller["input_ids"].shape == fuller["attention_mask"].shape == (3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(**fuller).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)
        prefix = model.extract(**batch)
        prefix = dataclasses.replace(
            prefix, text=dataclasses.replace(prefix.text, native_mask=None, has_native_mask=False)
        )
        padded = to_bucket({"prefix": prefix}, multiple=8)
        assert padded["prefix"].text.hidden.shape[1] == padded["prefix"].text.valid.shape[1] == 8
        torch.testing.assert_close(model(**padded).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)


def test_buckets_end_where_the_tower_does():
    batch = batch_of(0, 1)
    assert to_bucket(batch, most=7, multiple=16)["input_ids"].shape[1] == 7
    assert to_bucket(batch, most=6, multiple=16)["input_ids"].shape[1] == 6
    assert to_bucket(batch, most=77, multiple=3)["input_ids"].shape[1] == 6
    unsaid = {name: each for name, each in batch.items() if name != "attention_mask"}
    assert to_bucket(unsaid, multiple=16)["input_ids"].shape[1] == 6
    assert batch["input_ids"].shape[1] == 6


# -- forward passes -------------------------------------------------------------------------------------------


def test_a_replay_computes_what_the_model_computes(fake):
    model = build().eval()
    call = graphed(model)
    assert isinstance(call, CapturedCall)
    assert graphed(model) is call
    batches = [batch_of(0, 1), batch_of(2, 3), batch_of(5, 9)]
    with torch.no_grad():
        found = [call(**batch) for batch in batches]
        for batch, out in zip(batches, found, strict=True):
            expected = model(**to_bucket(batch, 16))
            assert type(out) is type(expected)
            assert torch.equal(out.logits, expected.logits)  # an earlier result is not what a later replay wrote
            assert torch.equal(out.loss, expected.loss)
    assert fake.events == ["rehearse", "record", "replay", "replay", "replay"]
    with torch.inference_mode():
        inside = call(**batch_of(1, 7))
    with torch.no_grad():
        assert torch.equal(inside.logits, model(**to_bucket(batch_of(1, 7), 16)).logits)
        call(**batch_of(0, 2))
    assert call.cache.captures == 1


def test_one_graph_a_shape_and_the_oldest_makes_room(fake):
    model = build().eval()
    call = CapturedCall(model, capacity=2)
    with torch.no_grad():
        for size, captures in ((2, 1), (3, 2), (2, 2), (4, 3), (2, 3), (3, 4)):
            out = call(**batch_of(*range(size), labels=False))
            assert call.cache.captures == captures
            assert len(call.cache) == min(captures, 2)
            assert out.logits.shape == (size, 3)
    gc.collect()
    held = {key[1][0] for key in call.cache._buffers}
    assert held == {2, 3}, "the buffers of a graph that is gone are still there"


def test_buffers_are_shared_by_graphs_that_differ_elsewhere(fake):
    model = build().eval()
    call = graphed(model)
    batch = batch_of(0, 1, labels=False)
    with torch.no_grad():
        call(**batch)
        call(**{**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])})
    pictures = [key for key in call.cache._buffers if len(key[1]) == 4]
    assert (len(call.cache), len(pictures)) == (2, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.text_prompt, "data", model.text_prompt.data + 1),
        lambda model: setattr(next(model.backbone.parameters()), "data", next(model.backbone.parameters()).data + 1),
        lambda model: next(model.backbone.parameters()).mul_(0.5),
        lambda model: model.train(),
        lambda model: setattr(model.head.classifier[1], "weight", nn.Parameter(model.head.classifier[1].weight + 1)),
        lambda model: model.double(),
        lambda model: setattr(model, "forward", model.forward),
    ],
    ids=["trained memory", "frozen memory", "frozen value", "mode", "another parameter", "dtype", "accelerate"],
)
def test_graphs_are_thrown_away_with_what_they_stand_on(fake, change):
    model = build(head_dropout=0.0).eval()
    call = graphed(model)
    with torch.no_grad():
        call(**batch_of(0, 1))
        change(model)
        out = call(**batch_of(0, 1))
        assert torch.equal(out.logits, model(**to_bucket(batch_of(0, 1), 16)).logits)
        assert (call.cache.captures, len(call.cache)) == (2, 1)
        call(**batch_of(0, 1))
    assert call.cache.captures == 2


def test_trained_values_may_change_in_place(fake):
    model = build().eval()
    call = graphed(model)
    with torch.no_grad():
        before = call(**batch_of(0, 1)).logits
        model.head.classifier[1].bias.add_(1.0)
        torch.testing.assert_close(call(**batch_of(0, 1)).logits, before + 1.0)
    assert call.cache.captures == 1


def test_autocast_of_the_caller_is_a_part_of_the_graph(fake):
    model = build().eval()
    call = graphed(model)
    with torch.no_grad():
        plain = call(**batch_of(0, 1)).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = call(**batch_of(0, 1)).logits
            assert torch.equal(low, model(**to_bucket(batch_of(0, 1), 16)).logits)
        assert not torch.equal(low, plain)
        assert torch.equal(call(**batch_of(0, 1)).logits, plain)
    assert call.cache.captures == 2


def test_copies_that_autocast_keeps_are_no_part_of_a_graph(fake):
    model = build().eval()
    call = graphed(model)
    weight = model.hub.text_to_vision[0].weight
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        call(**batch_of(0, 1))
        model(**batch_of(0, 1))
        weight.mul_(3.0)  # autocast still holds a copy of what it was
        found = call(**batch_of(0, 1)).logits
        assert torch.equal(found, model(**to_bucket(batch_of(0, 1), 16)).logits)


def test_what_was_captured_in_inference_mode_serves_outside(fake):
    model = build().eval()
    call = graphed(model)
    with torch.inference_mode():
        call(**batch_of(0, 1))
    with torch.no_grad():
        found = call(**batch_of(2, 3)).logits
        assert torch.equal(found, model(**to_bucket(batch_of(2, 3), 16)).logits)
    assert call.cache.captures == 1


def test_with_gradients_the_module_itself_is_called(fake):
    model = build()
    graphed(model)(**batch_of(0, 1)).loss.backward()
    assert model.text_prompt.grad is not None
    assert fake.events == []


def test_a_captured_call_does_not_keep_its_model(fake):
    model = build().eval()
    with torch.no_grad():
        call = graphed(model)
        call(**batch_of(0, 1))
    del model
    gc.collect()
    with pytest.raises(ReferenceError, match="EpicModel"):
        call(**batch_of(0, 1))
    assert call not in engine_graphs._CALLS.values()


def test_without_the_switch_the_model_is_called():
    model = build(None)
    assert graphed(model) is model
    model.engine = EAGER
    assert graphed(model) is model
    assert graphed(nn.Identity()).__class__ is nn.Identity


# -- with the rest of the engine --------------------------------------------------------------------------------

FUSED = EngineConfig(blocks="fused", graphs=True)


@pytest.fixture
def waits(monkeypatch):
    """How often somebody asked the device where texts end."""
    from epic_fast.backbones import towers
    from epic_fast.engine import state

    counted = []
    for module in (towers, state):
        monkeypatch.setattr(module, "measure", lambda *args, real=state.measure: counted.append(1) or real(*args))
    return counted


@pytest.mark.parametrize("backbone", [tiny_clip, lambda: (tiny_vit(), tiny_bert())], ids=["clip", "vit+bert"])
def test_fused_blocks_are_captured_without_a_wait(fake, waits, backbone):
    model, plain = build(FUSED, backbone=backbone()).eval(), build(None, backbone=backbone()).eval()
    call = graphed(model)
    with torch.no_grad():
        for indices in ((0, 1), (2, 3), (1, 2)):
            waits.clear()
            batch = engine_graphs.prepared(model, batch_of(*indices))
            assert batch["input_ids"].shape[1] == 6
            assert len(waits) == 1
            found = call(**batch)
            assert len(waits) == 1, "the captured call asks the device"
            expected = plain(**batch_of(*indices))
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert call.cache.captures == 1


def test_fused_blocks_are_trained_in_graphs(fake):
    compare_with_eager(device="cpu", rtol=1e-5, engine=FUSED)
    assert fake.events.count("replay") >= 20


def test_weights_that_blocks_have_merged_are_held_by_the_graph(fake):
    """A hook that comes and goes makes the blocks read their layers anew; the graph reads what there was."""
    model = build(FUSED).eval()
    call = graphed(model)
    with torch.no_grad():
        call(**batch_of(0, 1))
        merged = [
            weakref.ref(found.qkv)
            for tower in (model.backbone.text, model.backbone.vision)
            for block in tower.frozen.blocks()
            for _, found in block.parts._cache.values()
        ]
        assert len(merged) == 7
        for tower in (model.backbone.text, model.backbone.vision):
            tower.frozen._blocks = None
        model(**batch_of(0, 1))
        gc.collect()
        assert all(each() is not None for each in merged)
        call.cache.clear()
        gc.collect()
        assert all(each() is None for each in merged)


@pytest.mark.parametrize("measured", [True, False])
def test_a_cached_prefix_is_captured(fake, waits, measured):
    model = build(FUSED).eval()
    call = graphed(model)
    with torch.no_grad():
        for indices in ((0, 1), (2, 3)):
            batch = batch_of(*indices, labels=False)
            prefix = model.extract(**batch)
            if not measured:
                prefix = dataclasses.replace(prefix, text=dataclasses.replace(prefix.text, lengths=None))
            waits.clear()
            found = call(prefix=prefix)
            assert len(waits) == (0 if measured else 1), "the device is asked once, before the capture"
            torch.testing.assert_close(found.logits, model(**batch).logits, rtol=1e-5, atol=1e-6)
    assert call.cache.captures == 1


def test_padding_on_the_left_is_eager(fake, caplog):
    model, plain = build(FUSED).eval(), build(None).eval()
    batch = batch_of(0, 1)
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name].flip(1)
    batch["input_ids"][:, 0] = 0
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(graphed(model)(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-6)
        graphed(model)(**batch_of(0, 1))
    assert fake.events == ["rehearse", "record", "replay"]
    assert "padded on the left" in caplog.text


# -- falling back ---------------------------------------------------------------------------------------------


def test_a_reason_is_said_once(caplog):
    model = build().eval()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "epic_fast"):
        expected = model(**batch_of(0, 1)).logits
        for _ in range(3):
            assert torch.equal(graphed(model)(**batch_of(0, 1)).logits, expected)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["EpicModel runs without a CUDA graph: graphs need a CUDA device; it is on cpu"]


def test_hooks_are_honoured(fake, caplog):
    model, seen = build().eval(), []
    model.head.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        for _ in range(3):
            graphed(model)(**batch_of(0, 1))
    assert len(seen) == 3
    assert "Head 'head' has hooks" in caplog.text


def test_a_capture_that_fails_is_eager_from_then_on(fake, caplog):
    model = build().eval()
    try:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        except RuntimeError:
            raise RuntimeError("the capture is invalid")  # noqa: B904 - as torch.cuda.graph ends
    except RuntimeError as error:
        fake.failure = error
    state = torch.get_rng_state()
    with torch.no_grad():
        for _ in range(3):
            out = graphed(model)(**batch_of(0, 1))
            assert torch.equal(out.logits, model(**to_bucket(batch_of(0, 1), 16)).logits)
        graphed(model)(**batch_of(0, 1, 2))
    assert fake.events == ["rehearse", "record", "recover"]
    assert "RuntimeError: operation not permitted when stream is capturing" in caplog.text
    assert caplog.text.count("without a CUDA graph") == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_without_memory_only_that_shape_is_eager(fake, caplog):
    model = build().eval()
    call = graphed(model)
    with torch.no_grad():
        fake.failure = torch.cuda.OutOfMemoryError("out of memory")
        for _ in range(2):
            assert call(**batch_of(0, 1, 2)).logits.shape == (3, 3)
        fake.failure = None
        call(**batch_of(0, 1))
        call(**batch_of(0, 1, 2))
    assert fake.events == ["rehearse", "record", "rehearse", "record", "replay"]
    assert "no memory for a graph of the shapes (3, 3, 32, 32)" in caplog.text


def test_what_cannot_be_compared_is_eager(fake):
    cache = GraphCache("sum", lambda inputs: inputs["a"] + 1, fake, CPU)
    for _ in range(2):
        assert torch.equal(cache({"a": torch.ones(2), "b": bytearray(2)}), torch.full((2,), 2.0))
    assert cache.refused is not None
    assert fake.events == []


def test_an_error_of_the_model_is_the_callers(fake):
    model = build().eval()
    with torch.no_grad(), pytest.raises(ConfigError, match="wanted pairs"):
        graphed(model)(**{**batch_of(0, 1), "pixel_values": torch.zeros(3, 3, 32, 32)})


# -- training steps -------------------------------------------------------------------------------------------


def train(model, folder=None, *, data=None, callbacks=(), resume="auto", **changes):
    data = Ragged(26, augment=True) if data is None else data
    options = {"config": settings(**changes), "output_dir": folder, "progress": False, "callbacks": callbacks}
    return fit(model, data, Ragged(10, seed=1), **options, resume="never" if folder is None else resume)


class Record:
    def __init__(self, stop=None):
        self.rows, self.stop = [], stop

    def on_step(self, row):
        self.rows.append(row)
        if row["step"] == self.stop:
            raise KeyboardInterrupt


def compare_with_eager(precision="fp32", *, device, rtol, engine=GRAPHS, **changes):
    """The steps and the end of a run with and without graphs; in float32 without any of the engine's parts."""
    found = []
    for each in (EAGER if precision == "fp32" else dataclasses.replace(engine, graphs=False), engine):
        model, record = build(each), Record()
        result = train(model, callbacks=[record], epochs=5, precision=precision, device=device, **changes)
        found.append((model, record.rows, result))
    (eager, rows, result), (captured, captured_rows, captured_result) = found
    assert len(rows) == len(captured_rows) == 20
    for row, other in zip(rows, captured_rows, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=rtol)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=10 * rtol)
        assert other["learning_rates"] == row["learning_rates"]
    assert captured_result.best_metrics["loss"] == pytest.approx(result.best_metrics["loss"], rel=10 * rtol)
    for name, each in eager.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], each, rtol=100 * rtol, atol=10 * rtol)


@pytest.mark.parametrize("max_grad_norm", [0.5, None])
def test_twenty_steps_end_where_the_uncaptured_ones_do(fake, max_grad_norm):
    """Dropout and augmentation on, two shapes of batches, rates that rise and fall, two weight decays."""
    compare_with_eager(device="cpu", rtol=1e-6, max_grad_norm=max_grad_norm)
    steps = fake.events.count("replay")
    assert fake.events.count("record") == fake.events.count("rehearse") <= 8
    assert steps >= 20


def make_step(model, backend, *, device=CPU, **changes):
    optimizer = make_optimizer(model, settings(**changes), fused=True)
    step = CapturedStep(model, model, optimizer, max_grad_norm=1.0, device=device, backend=backend)
    return optimizer, step


def everything(model, optimizer):
    found = {name: each.clone() for name, each in model.state_dict().items()}
    for number, state in enumerate(optimizer.state.values()):
        found |= {f"{number}/{name}": each.clone() for name, each in state.items()}
    return found


def check_not_finite(device, backend):
    """A step that is not finite changes nothing, neither at once nor for the steps after it."""
    model, twin = build().to(device).train(), build().to(device).train()
    optimizer, step = make_step(model, backend, device=device)
    other, undisturbed = make_step(twin, backend, device=device)
    batch = batch_of(0, 1, device=device)
    for each in (step, undisturbed):
        torch.manual_seed(1)
        each(batch)
    before = everything(model, optimizer)
    for value in (math.nan, math.inf):
        broken = {**batch, "pixel_values": torch.full_like(batch["pixel_values"], value)}
        loss, norm = step(broken)
        assert not (math.isfinite(loss) and math.isfinite(norm))
        assert same_bits(everything(model, optimizer), before)
    for each in (step, undisturbed):
        torch.manual_seed(2)
        each(batch)
    assert not same_bits(everything(model, optimizer), before)
    assert same_bits(everything(model, optimizer), everything(twin, other))
    assert step.cache.captures == 1


def test_a_step_that_is_not_finite_changes_nothing():
    check_not_finite(CPU, FakeBackend())


def test_a_finite_loss_with_an_infinite_gradient_changes_nothing():
    model = build().train()
    optimizer, step = make_step(model, FakeBackend())
    step(batch_of(0, 1))
    before = everything(model, optimizer)

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    loss_of = model.loss
    model.loss = lambda logits, labels: Overflow.apply(loss_of(logits, labels))
    step.cache.clear()
    loss, norm = step(batch_of(0, 1))
    assert math.isfinite(loss)
    assert not math.isfinite(norm)
    assert same_bits(everything(model, optimizer), before)


def test_a_rehearsal_leaves_no_trace():
    model = build().train()
    backend = FakeBackend()
    optimizer, step = make_step(model, backend)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = torch.get_rng_state()
    inputs = to_bucket(batch_of(0, 1), 16)
    step._step(inputs, counts=False)
    assert not torch.equal(torch.get_rng_state(), state)  # the dropout has drawn
    torch.set_rng_state(state)
    assert same_bits(model.state_dict(), before)
    assert all(not each.any() for moments in optimizer.state.values() for each in moments.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    step(batch_of(0, 1))
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    model(**inputs)
    assert torch.equal(torch.get_rng_state(), drawn)  # a step draws what one forward pass draws
    assert backend.events == ["rehearse", "record", "replay"]


def test_rates_reach_the_device_before_a_replay():
    model = build().train()
    optimizer, step = make_step(model, FakeBackend())
    assert len(optimizer.param_groups) > 3
    for rate in (1e-2, 0.0):
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = rate * (number + 1)
        before = everything(model, optimizer)
        step(batch_of(0, 1))
        assert step.rates.tolist() == pytest.approx([rate * (n + 1) for n in range(len(step.rates))])
        kept = [group["lr"] for group in optimizer.param_groups]
        assert all(type(each) is float for each in kept)  # the schedule's own, not what the device was given
        assert kept == [rate * (n + 1) for n in range(len(step.rates))]
        changed = [not torch.equal(before[name], each) for name, each in model.state_dict().items()]
        assert any(changed) == (rate > 0)
    assert step.cache.captures == 1


def test_a_resumed_run_does_what_the_run_would_have_done(fake, tmp_path):
    check_resume(tmp_path, "fp32", "cpu")


def check_resume(tmp_path, precision, device):
    options = {"precision": precision, "device": device, "checkpoint_every_steps": 3}
    whole = build()
    train(whole, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(build(), tmp_path / "cut", callbacks=[Record(stop=7)], **options)
    resumed = build()
    train(resumed, tmp_path / "cut", **options)
    assert same_bits(resumed.state_dict(), whole.state_dict())
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    states = [load_file(tmp_path / name / "checkpoint" / "state.safetensors") for name in ("whole", "cut")]
    assert same_bits(*states)


class Broken(Ragged):
    """The picture of one sample is no number."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index == 13:
            sample["pixel_values"] = torch.full_like(sample["pixel_values"], math.nan)
        return sample


def check_message(tmp_path, device):
    model, record = build(), Record()
    kept = []

    class Keep:
        def on_step(self, row):
            kept.append({name: each.clone() for name, each in model.state_dict().items()})

    before = {name: each.clone() for name, each in model.state_dict().items()}
    message = r"is not finite, its loss is nan: first NaN in the batch's 'pixel_values'. The weights were not changed"
    with pytest.raises(EpicFastError, match=message):
        train(model, data=Broken(26), callbacks=[record, Keep()], device=device, precision="fp32")
    assert same_bits(model.state_dict(), kept[-1] if kept else before)


def test_the_message_says_where_it_happened(fake, tmp_path):
    check_message(tmp_path, "cpu")


def test_a_run_leaves_no_graphs_behind(fake):
    model = build()
    train(model, epochs=1)
    assert model not in engine_graphs._CALLS
    assert "forward" not in model.__dict__
    assert fake.events.count("replay") > 4


def test_samples_without_labels_are_refused(fake):
    class Bare(Ragged):
        def __getitem__(self, index):
            return {name: each for name, each in super().__getitem__(index).items() if name != "labels"}

    with pytest.raises(DataError, match="no labels"):
        train(build(), data=Bare(16))


class Accelerator:
    device, num_processes, scaler, gradient_accumulation_steps = torch.device("cuda"), 1, None, 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_processes": 2}, "2 processes"),
        ({"scaler": object()}, "fp16"),
        ({"gradient_accumulation_steps": 4}, "over 4 batches"),
    ],
)
def test_why_steps_are_not_captured(changes, reason):
    accelerator = Accelerator()
    assert why_not_captured(build(), accelerator, FakeBackend()) is None
    assert "needs a CUDA device" in str(why_not_captured(build(), accelerator, None)).replace("need ", "needs ")
    for name, value in changes.items():
        setattr(accelerator, name, value)
    assert reason in why_not_captured(build(), accelerator, FakeBackend())


def test_hooks_on_parameters_are_honoured(fake, caplog):
    model, seen = build(), []
    model.text_prompt.register_hook(lambda grad: seen.append(1))
    train(model, epochs=1)
    assert len(seen) == 4
    assert "training runs without a CUDA graph: parameter 'text_prompt' has hooks" in caplog.text


def test_without_a_gpu_training_says_so_and_is_as_without_graphs(caplog):
    models = [build(engine) for engine in (EAGER, GRAPHS)]
    for model in models:
        train(model, epochs=1)
    assert same_bits(models[0].state_dict(), models[1].state_dict())
    assert caplog.text.count("training runs without a CUDA graph: graphs need a CUDA device") == 1


@pytest.mark.parametrize(("device", "ranks", "threads"), [("cuda", 1, False), ("cuda", 2, True), ("cpu", 1, True)])
def test_one_gpu_needs_no_thread_for_the_backward_pass(device, ranks, threads):
    with backward_threads(torch.device(device), ranks):
        assert torch._C._is_multithreading_enabled() == threads
    assert torch._C._is_multithreading_enabled()


def test_predictions_are_those_without_graphs(fake):
    data = Ragged(11)
    logits = [predict(build(engine), data, batch_size=4, progress=False).logits for engine in (EAGER, GRAPHS)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    assert fake.events.count("record") == 2
    assert fake.events.count("replay") == 3


def test_the_classifier_takes_graphs(fake, tmp_path):
    from PIL import Image

    tiny_clip(tmp_path)
    pictures = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    texts = ["a red circle", "a dog", "the small star above a tree"]
    answers = []
    for engine in (EAGER, GRAPHS):
        classifier = Classifier(build(engine, backbone=str(tmp_path)))
        answers.append([classifier.predict(pictures[:2], texts[:2]), classifier.predict(pictures[2:], texts[2:])])
    for eager, captured in zip(*answers, strict=True):
        for first, second in zip(eager, captured, strict=True):
            assert first.label == second.label
            assert first.probability == pytest.approx(second.probability, rel=1e-5)
    assert fake.events.count("replay") == 2


# -- on a GPU -------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)


def test_the_collector_waits_for_the_last_of_several_recordings():
    inside, leave = threading.Event(), threading.Event()

    def record():
        with engine_graphs.no_garbage():
            inside.set()
            assert leave.wait(30)

    assert gc.isenabled()
    thread = threading.Thread(target=record)
    with engine_graphs.no_garbage():
        thread.start()
        assert inside.wait(30)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_garbage_is_collected_before_a_recording_and_not_in_it():
    class Loop:
        pass

    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            garbage = Loop()
            garbage.itself = garbage
            alive = weakref.ref(garbage)
            del garbage
            with engine_graphs.no_garbage():
                assert alive() is None
                assert not gc.isenabled()
            assert gc.isenabled() == enabled
            with pytest.raises(ZeroDivisionError), engine_graphs.no_garbage():
                _ = 1 / 0
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("engine", [GRAPHS, FUSED], ids=["plain", "fused"])
def test_gpu_twenty_steps(engine, precision, rtol):
    compare_with_eager(precision, device="auto", rtol=rtol, engine=engine)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gpu_resume(precision, tmp_path):
    check_resume(tmp_path, precision, "auto")


@pytest.mark.gpu
@on_gpu
def test_gpu_a_step_that_is_not_finite_changes_nothing(tmp_path):
    check_not_finite(CUDA, engine_graphs.backend_for(CUDA))
    check_message(tmp_path, "auto")


@pytest.mark.gpu
@on_gpu
def test_gpu_steps_are_those_of_the_same_function_uncaptured():
    """The same kernels, so the same bits; dropout draws the same numbers."""
    found = []
    for captured in (False, True):
        model = build().to(CUDA).train()
        optimizer, step = make_step(model, engine_graphs.backend_for(CUDA), device=CUDA)
        if not captured:
            step.cache.refused = "for comparison"
        torch.manual_seed(3)
        reports = []
        for number in range(20):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                reports.append(step(batch_of(number, number + 1, number + 2, device=CUDA)))
        assert step.cache.captures == (1 if captured else 0)
        found.append((reports, everything(model, optimizer), torch.cuda.get_rng_state()))
    assert found[0][0] == found[1][0]
    assert same_bits(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gpu_forward_passes(dtype):
    model = build().to(CUDA).eval()
    call = graphed(model)
    with torch.inference_mode(), torch.autocast("cuda", dtype=dtype or torch.float16, enabled=dtype is not None):
        for size in (2, 3, 2, 1, 2):
            batch = batch_of(*range(size), device=CUDA)
            expected, found = model(**to_bucket(batch, 16)), call(**batch)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5 if dtype is None else 2e-2, atol=1e-4)
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5 if dtype is None else 2e-2, atol=1e-4)
    assert call.cache.refused is None
    assert call.cache.captures == 3


@pytest.mark.gpu
@on_gpu
def test_gpu_a_capture_that_fails_leaves_the_device_whole(caplog):
    """A synchronisation inside: eager from then on, on the same stream, with the generator in order."""

    def work(inputs):
        total = inputs["a"].sum()
        return inputs["a"] + total.item()

    backend, stream = engine_graphs.backend_for(CUDA), torch.cuda.current_stream()
    cache = GraphCache("item", work, backend, CUDA)
    for _ in range(3):
        assert torch.equal(cache({"a": torch.ones(2, device=CUDA)}), torch.full((2,), 3.0, device=CUDA))
    assert cache.refused is not None
    assert "its capture failed" in caplog.text
    assert torch.cuda.current_stream() == stream
    torch.manual_seed(5)
    drawn = torch.rand(4, device=CUDA)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4, device=CUDA), drawn)
    model = build().to(CUDA).eval()
    with torch.no_grad():
        call = graphed(model)
        torch.testing.assert_close(
            call(**batch_of(0, 1, device=CUDA)).logits, model(**batch_of(0, 1, device=CUDA)).logits
        )
    assert call.cache.captures == 1


@pytest.mark.gpu
@on_gpu
def test_gpu_an_older_graph_among_the_garbage_does_not_spoil_a_capture():
    class Loop:
        pass

    def leave_a_graph():
        garbage = Loop()
        garbage.itself = garbage
        garbage.graph = backend.record(lambda: torch.ones(3, device=CUDA) + 1)

    backend = engine_graphs.backend_for(CUDA)
    gc.collect()
    gc.disable()
    try:
        leave_a_graph()
        # What the collector does when it pleases.
        recorded = backend.record(lambda: (gc.collect(), torch.ones(3, device=CUDA) * 2)[1])
    finally:
        gc.enable()
    recorded.replay()
    assert recorded.result.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.gpu
@on_gpu
def test_gpu_workers_that_pin_memory_do_not_spoil_a_capture(caplog):
    train(build(), data=Ragged(64), epochs=2, device="auto", precision="fp32", num_workers=2, batch_size=4)
    assert "without a CUDA graph" not in caplog.text


@pytest.mark.gpu
@on_gpu
def test_gpu_the_thread_of_the_backward_pass_changes_no_bit(monkeypatch):
    found = []
    for threads in (False, True):
        if threads:
            monkeypatch.setattr(loop, "backward_threads", lambda device, ranks: contextlib.nullcontext())
        model = build(None)
        train(model, epochs=1, device="auto", precision="bf16")
        found.append(model.state_dict())
    assert same_bits(*found)


@pytest.mark.gpu
@on_gpu
def test_gpu_memory_comes_back_with_the_graphs():
    """Buffers and pool of 20 shapes; a cache that is cleared leaves none of it."""
    model = build().to(CUDA).eval()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with torch.no_grad():
        for size in range(1, 21):
            graphed(model)(**batch_of(*range(size), device=CUDA))
    engine_graphs.forget(model)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 2**27  # workspaces of the libraries stay
