"""The loop on a GPU: mixed precision, and resumption with the loss scale and the GPU's generator."""

from __future__ import annotations

import pytest
import torch

import epic_fast
from epic_fast.testing import tiny_clip
from epic_fast.testing.pairs import RandomPairs
from epic_fast.training import TrainingConfig, fit, predict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def build():
    backbone = tiny_clip()
    torch.manual_seed(0)
    config = epic_fast.EpicConfig(prompt_length=2, num_layer_pairs=2, head_dropout=0.3, feature_norm="standardize")
    return epic_fast.wrap(backbone, config, num_labels=3, self_check=False)


def train(folder, precision, *, model=None, callbacks=(), **changes):
    model = build() if model is None else model
    values = {"epochs": 3, "batch_size": 8, "checkpoint_every_steps": 3, "log_every_steps": 1, "tensorboard": False}
    config = TrainingConfig(**{**values, "learning_rate": 1e-2, "precision": precision, **changes})
    data = RandomPairs(26, augment=True), RandomPairs(10, seed=1)
    result = fit(model, *data, config=config, output_dir=folder, resume="auto", progress=False, callbacks=callbacks)
    return model, result


class Interrupt:
    def on_step(self, row) -> None:
        if row["step"] == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto"])
def test_resumed_run_has_the_same_weights(precision, tmp_path):
    whole, result = train(tmp_path / "whole", precision)
    assert whole.device.type == "cuda"
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert all(each.dtype == torch.float32 for name, each in whole.named_parameters() if each.requires_grad)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", precision, callbacks=[Interrupt()])
    resumed, _ = train(tmp_path / "cut", precision)
    for name, each in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], each), name
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_fp16_halves_its_scale_at_an_overflow_and_goes_on():
    """The first gradients overflow on purpose: those steps are skipped, later ones are not."""
    model, calls = build(), [0]

    def overflow(grad):
        calls[0] += 1
        return grad * float("inf") if calls[0] <= 2 else grad

    model.text_prompt.register_hook(overflow)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    config = TrainingConfig(epochs=2, batch_size=8, precision="fp16", tensorboard=False)
    result = fit(model, RandomPairs(26), config=config, progress=False)
    assert result.history[-1]["train_loss"] > 0
    assert not torch.equal(model.state_dict()["text_prompt"].cpu(), before["text_prompt"])


def test_device_cpu_stays_off_the_gpu(tmp_path):
    model, _ = train(tmp_path, "fp32", device="cpu", epochs=1)
    assert model.device.type == "cpu"
    model, _ = train(tmp_path / "gpu", "fp32", epochs=1)
    assert model.device.type == "cuda"


def test_workers_and_pinned_batches(tmp_path):
    states = [train(tmp_path / str(n), "fp32", num_workers=n)[0].state_dict() for n in (0, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_predictions_agree_with_the_cpu():
    model, data = build(), RandomPairs(10)
    on_cpu = predict(model, data, progress=False).logits
    on_gpu = predict(model.to("cuda"), data, progress=False, precision="fp32").logits
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)
