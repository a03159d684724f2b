"""What fit() does: curves, best weights, files, seeds, odd sizes, errors."""

from __future__ import annotations

import json
import logging
import math
import os
import random
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import yaml

import epic_fast
from epic_fast.errors import ConfigError, DataError, EpicFastError
from epic_fast.testing import make_folder, tiny_clip
from epic_fast.testing.pairs import RandomPairs
from epic_fast.training import Callback, TrainingConfig, compute_metrics, fit, predict, tune_threshold
from epic_fast.training.batches import ordered_batches, training_batches
from epic_fast.training.progress import BarReporter, LineReporter, Reporter, make_reporter

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def build(problem_type=SINGLE, *, seed=0, num_labels=3, pos_weight=None, **options):
    config = {"prompt_length": 2, "num_layer_pairs": 2, "head_dropout": 0.2} | options
    backbone = tiny_clip()
    torch.manual_seed(seed)
    return epic_fast.wrap(
        backbone,
        epic_fast.EpicConfig(**config),
        num_labels=num_labels,
        problem_type=problem_type,
        pos_weight=pos_weight,
        self_check=False,
    )


def settings(**changes) -> TrainingConfig:
    values = {"epochs": 2, "batch_size": 8, "log_every_steps": 2, "tensorboard": False, "device": "cpu"}
    return TrainingConfig(**{**values, "learning_rate": 1e-2, "head_learning_rate": 1e-2, **changes})


def run(model, length=26, validation=10, *, output_dir=None, callbacks=(), data=None, **changes):
    train = RandomPairs(length, model.problem_type, model.num_labels) if data is None else data
    held_out = RandomPairs(validation, model.problem_type, model.num_labels, seed=1) if validation else None
    options = {"config": settings(**changes), "output_dir": output_dir, "progress": False, "callbacks": callbacks}
    return fit(model, train, held_out, **options)


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Record(Callback):
    def __init__(self):
        self.steps, self.epochs = [], []

    def on_step(self, row):
        self.steps.append(row)

    def on_epoch(self, row):
        self.epochs.append(row)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
def test_learns_and_reports(problem_type, tmp_path):
    model = build(problem_type, num_labels=1 if problem_type == REGRESSION else 3)
    data = RandomPairs(48, problem_type, 3)
    held_out = RandomPairs(16, problem_type, 3, seed=1)
    result = fit(model, data, held_out, config=settings(epochs=6), output_dir=tmp_path, progress=False)
    history = result.history
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in history] == [6, 12, 18, 24, 30, 36]
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    names = {SINGLE: "accuracy f1_macro", MULTI: "f1_micro f1_macro threshold", REGRESSION: "mae mse pearson"}
    assert set(history[0]["validation"]) == {*names[problem_type].split(), "loss"}
    assert set(history[0]["learning_rates"]) == {"prompts", "projections", "gates", "head"}
    assert "temperature" in history[0]["gates"]
    assert all(row["seconds"] > 0 and row["samples_per_second"] > 0 for row in history)
    assert result.run_dir == tmp_path
    assert result.best_metrics == history[result.best_epoch - 1]["validation"]
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_backbone_is_bit_identical_after_training():
    model = build()
    before = {name: each.clone() for name, each in model.backbone.state_dict().items()}
    trained = {name: each.clone() for name, each in model.state_dict().items()}
    run(model)
    assert same_bits(model.backbone.state_dict(), before)
    assert all(not torch.equal(each, trained[name]) for name, each in model.state_dict().items() if "gate" not in name)


class Spoil(Callback):
    """Keeps each epoch's weights; after the third it turns the head round, which no later epoch can mend."""

    def __init__(self, model):
        self.model, self.weights = model, []

    def on_epoch(self, row):
        self.weights.append({name: each.clone() for name, each in self.model.state_dict().items()})
        if row["epoch"] == 3:
            with torch.no_grad():
                for parameter in self.model.head.parameters():
                    parameter.mul_(-50.0)


def test_model_and_folder_hold_the_best_epoch(tmp_path):
    model, last = build(), build()
    spoil = Spoil(model)
    result = run(model, epochs=5, output_dir=tmp_path, callbacks=[spoil], metric="loss")
    losses = [row["validation"]["loss"] for row in result.history]
    assert result.best_epoch == losses.index(min(losses)) + 1 <= 3
    assert [row["best"] for row in result.history] == [
        value == min(losses[: n + 1]) and value not in losses[:n] for n, value in enumerate(losses)
    ]
    assert same_bits(model.state_dict(), spoil.weights[result.best_epoch - 1])
    saved = epic_fast.from_pretrained(tmp_path, backbone=tiny_clip())
    assert same_bits(saved.state_dict(), model.state_dict())
    again = Spoil(last)
    run(last, epochs=5, load_best=False, metric="loss", callbacks=[again])
    assert same_bits(last.state_dict(), spoil.weights[-1])


def test_best_metrics_are_those_of_the_returned_model():
    model = build()
    result = run(model, epochs=3)
    held_out = RandomPairs(10, seed=1)
    found = predict(model, held_out, batch_size=8, progress=False)
    measured = compute_metrics(found.logits, found.labels, SINGLE, num_labels=3)
    assert measured == {name: result.best_metrics[name] for name in measured}
    expected = torch.nn.functional.cross_entropy(found.logits, found.labels)
    assert result.best_metrics["loss"] == pytest.approx(float(expected), abs=1e-6)


def test_a_threshold_that_could_not_be_saved_is_taken_back(tmp_path, monkeypatch):
    model = build(MULTI)
    model.threshold = 0.125
    full, asked = OSError(28, "No space left on device"), []

    def failing(folder):
        asked.append(model.threshold)
        raise full

    monkeypatch.setattr(model, "save_pretrained", failing)
    with pytest.raises(EpicFastError, match="No space left"):
        run(model, output_dir=tmp_path)
    assert asked != [0.125]
    assert model.threshold == 0.125


def test_multi_label_tunes_and_saves_the_threshold(tmp_path):
    model = build(MULTI, pos_weight="auto")
    result = run(model, output_dir=tmp_path)
    found = predict(model, RandomPairs(10, MULTI, seed=1), batch_size=8, progress=False)
    assert model.threshold == result.best_metrics["threshold"] == tune_threshold(found.logits, found.labels)
    assert epic_fast.from_pretrained(tmp_path, backbone=tiny_clip()).threshold == model.threshold
    data = RandomPairs(26, MULTI)
    labels = torch.tensor(data.label_ids())
    expected = (26 - labels.sum(0)) / labels.sum(0)
    assert model.pos_weight.tolist() == pytest.approx(expected.clamp(0.01, 100).tolist())


def test_run_folder(tmp_path):
    model = build()
    result = fit(
        model,
        RandomPairs(26),
        RandomPairs(10, seed=1),
        config=settings(tensorboard=True),
        output_dir=tmp_path,
        progress=False,
        description={"backbone": "tiny", "data": tmp_path},
    )
    names = "checkpoint config.json log.jsonl metrics.json model.safetensors tensorboard training.yaml".split()
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / "metrics.json").read_text())["validation"] == result.best_metrics
    described = yaml.safe_load((tmp_path / "training.yaml").read_text())
    assert (described["backbone"], described["data"]) == ("tiny", str(tmp_path))
    assert described["training"] == settings(tensorboard=True).to_dict()
    assert described["method"]["prompt_length"] == 2
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["type"], row["step"]) for row in rows] == [
        *(("step", 2), ("step", 4), ("epoch", 4)),
        *(("step", 6), ("step", 8), ("epoch", 8)),
    ]
    assert rows[2]["validation"] == result.history[0]["validation"]
    assert "seconds" not in rows[2]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [each.step for each in events.Scalars("train/loss")] == [2, 4, 6, 8]
    assert [each.value for each in events.Scalars("validation/accuracy")] == pytest.approx(
        [row["validation"]["accuracy"] for row in result.history]
    )
    assert {"learning_rate/gates", "gates/temperature", "speed/samples_per_second"} <= set(events.Tags()["scalars"])


def test_a_training_yaml_of_the_caller_is_left_alone(tmp_path):
    (tmp_path / "training.yaml").write_text("backbone: mine\n")
    run(build(), output_dir=tmp_path, epochs=1)
    assert (tmp_path / "training.yaml").read_text() == "backbone: mine\n"


@pytest.mark.parametrize(("multi_label", "problem_type"), [(False, SINGLE), (True, MULTI)])
def test_pictures_and_texts_from_a_folder(multi_label, problem_type, tmp_path):
    """Files to metrics with the library's own reader and collator."""
    from epic_fast.data import read_folder

    tiny_clip(tmp_path / "towers")
    folder = read_folder(make_folder(tmp_path / "data", multi_label=multi_label))
    model = epic_fast.wrap(
        str(tmp_path / "towers"),
        epic_fast.EpicConfig(prompt_length=2, num_layer_pairs=2, feature_norm="standardize"),
        num_labels=len(folder.labels),
        problem_type=folder.problem_type,
        labels=folder.labels,
        pos_weight="auto" if multi_label else None,
    )
    assert model.problem_type == problem_type
    splits = folder.splits
    result = fit(
        model,
        splits["train"],
        splits["validation"],
        config=settings(epochs=4),
        output_dir=tmp_path / "run",
        progress=False,
    )
    assert result.best_metrics["f1_macro"] > 0.6
    found = predict(epic_fast.from_pretrained(tmp_path / "run"), splits["test"], progress=False)
    assert found.logits.shape == (9, len(folder.labels))
    assert found.labels is not None
    if multi_label:
        ids = splits["train"].label_ids()
        share = [sum(label in row for row in ids) / 24 for label in range(len(folder.labels))]
        assert model.pos_weight.tolist() == pytest.approx([(1 - each) / each for each in share])


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    logs, states = [], []
    for number, seed in enumerate((3, 3, 4)):
        model = build()
        torch.rand(number)  # what was drawn before does not matter
        run(model, output_dir=tmp_path / str(number), seed=seed, data=RandomPairs(26, augment=True))
        logs.append((tmp_path / str(number) / "log.jsonl").read_bytes())
        states.append(model.state_dict())
    assert logs[0] == logs[1]
    assert same_bits(states[0], states[1])
    assert logs[0] != logs[2]
    assert not same_bits(states[0], states[2])


class Whole(RandomPairs):
    """Hands out a batch at a time."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_data_that_hands_out_batches():
    states = []
    for kind in (RandomPairs, Whole):
        model = build()
        run(model, data=kind(26))
        states.append(model.state_dict())
    assert same_bits(*states)


def test_draws_of_the_data_leave_the_dropout_alone():
    """The model's own randomness is the same whether or not the data draws any."""
    seen = []
    for data in (RandomPairs(26), Drawing(26), DrawingWhole(26)):
        model = build()
        run(model, data=data)
        seen.append(model.state_dict())
    model = build()
    options = {"config": settings(), "collator": drawing_collator, "progress": False}
    fit(model, RandomPairs(26), RandomPairs(10, seed=1), **options)
    assert same_bits(seen[0], seen[1])
    assert same_bits(seen[0], seen[2])
    assert same_bits(seen[0], model.state_dict())


def drawing_collator(items):
    torch.rand(3)
    return torch.utils.data.default_collate(items)


class Drawing(RandomPairs):
    """Draws from every global generator and uses nothing of it."""

    def __getitem__(self, index):
        torch.rand(index + 1), np.random.rand(), random.random()  # noqa: NPY002
        return super().__getitem__(index)


class DrawingWhole(Drawing, Whole):
    pass


@pytest.mark.slow
def test_workers_change_nothing():
    states = []
    for workers in (0, 2):
        model = build()
        run(model, num_workers=workers, data=RandomPairs(26, augment=True))
        states.append(model.state_dict())
    assert same_bits(*states)


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        return [index for batch in training_batches(20, 8, seed=seed, epoch=epoch) for index in batch.indices]

    assert sorted(order(0, 0)) == list(range(20))
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert [len(batch.indices) for batch in training_batches(20, 8, seed=0, epoch=0)] == [8, 8, 4]


@pytest.mark.parametrize("length", [1, 2, 9, 16, 17])
def test_processes_share_every_batch_without_duplicates(length):
    one = training_batches(length, 8, seed=0, epoch=0)
    shares = [training_batches(length, 8, seed=0, epoch=0, rank=rank, ranks=3) for rank in range(3)]
    for whole, *parts in zip(one, *shares, strict=True):
        counted = [index for part in parts for index in part.indices[: part.count]]
        assert sorted(counted) == sorted(whole.indices)
        assert all(part.indices and part.total == len(whole.indices) for part in parts)
    seen = [i for rank in range(3) for part in ordered_batches(length, 4, rank=rank, ranks=3) for i in part.indices]
    assert sorted(seen) == list(range(length))


@pytest.mark.parametrize(("length", "batch_size", "steps"), [(26, 8, 4), (5, 64, 1), (1, 1, 1), (9, 8, 2)])
def test_odd_sizes(length, batch_size, steps):
    record = Record()
    result = run(build(), length, validation=1, batch_size=batch_size, epochs=1, callbacks=[record])
    assert result.history[0]["step"] == len(record.steps) == steps
    assert math.isfinite(result.history[0]["train_loss"])


def test_train_loss_is_the_mean_over_samples():
    record = Record()
    result = run(build(), 9, epochs=1, callbacks=[record])
    losses = [row["loss"] for row in record.steps]
    assert result.history[0]["train_loss"] == pytest.approx((8 * losses[0] + losses[1]) / 9)


def test_callbacks_see_rates_norms_and_rows():
    record = Record()
    result = run(build(), callbacks=[record])
    assert [row["step"] for row in record.steps] == list(range(1, 9))
    assert [row["epoch"] for row in record.steps] == [1] * 4 + [2] * 4
    assert record.steps[0]["learning_rates"]["head"] == pytest.approx(1e-2)
    assert all(row["grad_norm"] > 0 for row in record.steps)
    assert record.epochs == result.history


def test_without_validation_the_last_epoch_is_the_best(tmp_path):
    model = build()
    result = run(model, validation=0, output_dir=tmp_path)
    assert result.best_epoch == 2
    assert result.best_metrics == {}
    assert result.history[0]["validation"] == {}
    assert same_bits(epic_fast.from_pretrained(tmp_path, backbone=tiny_clip()).state_dict(), model.state_dict())


def test_nothing_is_written_without_an_output_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(build(), epochs=1)
    assert not os.listdir(tmp_path)


def test_empty_and_unusable_data():
    with pytest.raises(DataError, match="the training data is empty"):
        run(build(), 0)
    with pytest.raises(DataError, match="the validation data is empty"):
        fit(build(), RandomPairs(4), RandomPairs(0), progress=False)
    with pytest.raises(DataError, match="has no length"):
        fit(build(), iter([1]), progress=False)
    unlabelled = [{k: v for k, v in RandomPairs(4)[i].items() if k != "labels"} for i in range(4)]
    with pytest.raises(DataError, match="training samples carry no labels"):
        fit(build(), unlabelled, config=settings(), progress=False)
    with pytest.raises(DataError, match="validation samples carry no labels"):
        fit(build(), RandomPairs(4), unlabelled, config=settings(), progress=False)
    with pytest.raises(DataError, match="is empty"):
        predict(build(), RandomPairs(0))


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match="'f1_micro'; for single_label"):
        run(build(), metric="f1_micro")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="fp16 needs a GPU"):
            run(build(), precision="fp16")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        predict(build(), RandomPairs(4), batch_size=0)


class Poisoned(RandomPairs):
    """One sample holds a NaN."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index == 3:
            sample["pixel_values"] = sample["pixel_values"] * float("nan")
        return sample


def test_non_finite_loss_names_step_and_tensor_and_keeps_the_checkpoint(tmp_path):
    order = [i for batch in training_batches(26, 8, seed=0, epoch=0) for i in batch.indices]
    step = order.index(3) // 8 + 1
    model = build()
    with pytest.raises(EpicFastError, match=rf"step {step} \(epoch 1.*NaN in the batch's 'pixel_values'") as caught:
        run(model, output_dir=tmp_path, data=Poisoned(26), checkpoint_every_steps=1)
    assert all(torch.isfinite(each).all() for each in model.state_dict().values())
    if step > 1:
        assert str(tmp_path / "checkpoint") in str(caught.value)
        assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["position"]["step"] == step - 1


def test_non_finite_gradient_names_the_parameter():
    model = build()
    model.text_prompt.register_hook(lambda grad: grad * float("inf"))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(EpicFastError, match=r"step 1 \(epoch 1, batch 1\).*in the gradient of parameter 'text_prompt'"):
        run(model)
    assert same_bits(model.state_dict(), before)


def test_non_finite_weight_names_the_parameter():
    model = build()
    with torch.no_grad():
        model.text_prompt[0, 0] = float("inf")
    with pytest.raises(EpicFastError, match="an infinity in parameter 'text_prompt'"):
        run(model)


def test_clipping_bounds_the_step():
    norms = []
    for limit in (None, 1e-3):
        model, record = build(), Record()
        seen: list[float] = []
        model.text_prompt.register_post_accumulate_grad_hook(lambda p: None)
        step = torch.optim.AdamW.step

        def watched(self, *args, seen=seen, step=step, **kwargs):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(float(torch.nn.utils.get_total_norm(grads)))
            return step(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", watched)
            run(model, epochs=1, max_grad_norm=limit, callbacks=[record])
        norms.append((seen, [row["grad_norm"] for row in record.steps]))
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-5)
    assert max(norms[1][0]) <= 1e-3 * 1.0001
    assert min(norms[1][1]) > 1e-2


def test_bf16_keeps_parameters_in_float32_and_the_model_clean():
    model = build()
    dtypes = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    run(model, precision="bf16", epochs=1)
    assert torch.bfloat16 in dtypes
    assert all(each.dtype == torch.float32 for each in model.parameters())
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(model))
    dtypes.clear()
    run(model, precision="fp32", epochs=1)  # another precision in the same process
    assert set(dtypes) == {torch.float32}
    assert predict(model, RandomPairs(4), progress=False, precision="bf16").logits.dtype == torch.float32


def test_an_accelerator_of_the_caller_stays_whole():
    from accelerate import Accelerator

    mine = Accelerator(cpu=True, mixed_precision="no")
    run(build(), precision="bf16", epochs=1)
    assert mine.mixed_precision == "no"
    assert mine.device.type == "cpu"


def test_feature_statistics_are_fitted_once_before_the_first_step():
    model = build(feature_norm="standardize")
    assert model.needs_feature_statistics
    run(model, epochs=1)
    assert not model.needs_feature_statistics


def test_set_epoch_is_called_before_each_epoch():
    class Fresh(RandomPairs):
        seen: list[int]

        def set_epoch(self, epoch):
            self.seen.append(epoch)

    data = Fresh(9)
    data.seen = []
    run(build(), data=data, epochs=3)
    assert data.seen == [0, 1, 2]


def test_predict_keeps_the_order_and_the_mode():
    model, data = build(), RandomPairs(11)
    model.train()
    whole = predict(model, data, batch_size=11, progress=False)
    parts = predict(model, data, batch_size=4, progress=False)
    assert model.training
    assert whole.logits.shape == (11, 3)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(parts.labels, data.classes)
    unlabelled = [{k: v for k, v in data[i].items() if k != "labels"} for i in range(3)]
    assert predict(model, unlabelled, progress=False).labels is None


def test_a_line_an_epoch_where_there_is_no_terminal(capfd, caplog):
    lines = []
    options = {"config": settings(), "output_dir": None}
    fit(build(), RandomPairs(9), RandomPairs(4, seed=1), progress=lines.append, **options)
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2, train loss ")
    assert "accuracy" in lines[0]
    with caplog.at_level(logging.INFO, "epic_fast"):
        fit(build(), RandomPairs(9), RandomPairs(4, seed=1), **options)
    assert [record.message for record in caplog.records if record.message.startswith("epoch ")] != []
    assert capfd.readouterr().out == ""


def test_what_progress_means(monkeypatch):
    assert type(make_reporter(False)) is Reporter
    assert isinstance(make_reporter(True), BarReporter)
    assert isinstance(make_reporter(print), LineReporter)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert isinstance(make_reporter(None), BarReporter)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert isinstance(make_reporter(None), LineReporter)


def test_the_bar_runs_through(capfd):
    fit(build(), RandomPairs(9), RandomPairs(4, seed=1), config=settings(epochs=1), progress=True)
    assert "epoch 1/1, train loss" in capfd.readouterr().err


@pytest.fixture
def loss_scaling(monkeypatch):
    """fp16 as on a GPU: accelerate's loss scaling with PyTorch's CPU scaler, the passes themselves in float32."""
    from epic_fast.training import loop

    scalers = []
    original = loop.launched

    @contextmanager
    def scaled(config):
        with original(config) as (accelerator, precision):
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
            accelerator.state._mixed_precision = "fp16"
            accelerator.prepare_model = lambda model: model
            accelerator.native_amp = True
            monkeypatch.setattr(accelerator, "autocast", nullcontext)
            scalers.append(accelerator.scaler)
            yield accelerator, precision

    monkeypatch.setattr(loop, "launched", scaled)
    return scalers


def test_fp16_overflow_is_skipped_and_scaled_down(loss_scaling):
    model, record, calls = build(), Record(), [0]

    def overflow(grad):
        calls[0] += 1
        return grad * float("inf") if calls[0] == 1 else grad

    model.text_prompt.register_hook(overflow)
    run(model, epochs=1, callbacks=[record])
    assert math.isinf(record.steps[0]["grad_norm"])
    assert all(math.isfinite(row["grad_norm"]) for row in record.steps[1:])
    assert record.steps[1]["learning_rates"] == record.steps[0]["learning_rates"]  # a skipped step moves no schedule
    assert record.steps[2]["learning_rates"] != record.steps[1]["learning_rates"]
    assert loss_scaling[0].get_scale() == 2.0**16  # halved once, doubled after three good steps


def test_fp16_that_always_overflows_ends(loss_scaling, monkeypatch):
    model = build()
    model.text_prompt.register_hook(lambda grad: grad * float("inf"))
    monkeypatch.setattr("epic_fast.training.loop.MOST_SKIPPED_STEPS", 3)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(EpicFastError, match=r"step 3 .*in the gradient of parameter 'text_prompt'"):
        run(model)
    assert same_bits(model.state_dict(), before)


def test_scaled_gradients_train_as_unscaled_ones(loss_scaling, monkeypatch):
    scaled, plain = build(), build()
    run(scaled, epochs=1)
    monkeypatch.undo()
    run(plain, epochs=1)
    for name, each in plain.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], each, rtol=1e-5, atol=1e-6)
    assert loss_scaling[0].get_scale() == 2.0**17


class Interrupt:
    def on_step(self, row):
        if row["step"] == 7:
            raise KeyboardInterrupt


def test_loss_scale_is_resumed(loss_scaling, tmp_path):
    data = RandomPairs(26), RandomPairs(10, seed=1)
    options = {"config": settings(epochs=3, checkpoint_every_steps=3), "progress": False}
    whole = build()
    fit(whole, *data, output_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(build(), *data, output_dir=tmp_path / "cut", callbacks=[Interrupt()], **options)
    resumed = build()
    fit(resumed, *data, output_dir=tmp_path / "cut", resume="auto", **options)
    assert same_bits(resumed.state_dict(), whole.state_dict())
    assert loss_scaling[2].get_scale() == loss_scaling[0].get_scale() == 2.0**20


def test_fp16_takes_no_nan_for_an_overflow(loss_scaling):
    with pytest.raises(EpicFastError, match="NaN in the batch's 'pixel_values'"):
        run(build(), data=Poisoned(26), epochs=1)
