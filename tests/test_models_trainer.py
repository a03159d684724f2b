"""transformers' own Trainer drives a wrapped model: it trains, saves the trainable tensors only, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils.data import Dataset

import epic_fast
from epic_fast import EpicConfig, MitConfig
from epic_fast.errors import ConfigError
from epic_fast.testing import tiny_clip, tiny_llama, tiny_vit
from epic_fast.testing.probes import lively, make_batch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Pairs(Dataset):
    """Sixteen pairs whose label is how bright the picture is."""

    def __init__(self, multi_label: bool = False) -> None:
        self.batch: dict[str, Any] = make_batch([8] * 16)
        classes = torch.arange(16) % 2
        self.batch["pixel_values"] += 2.0 * classes[:, None, None, None]
        self.batch["labels"] = torch.nn.functional.one_hot(classes, 2).float() if multi_label else classes

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**{name: each[index] for name, each in self.batch.items()}, "unused": "a column"}


def make_model(multi_label: bool = False) -> Any:
    torch.manual_seed(0)
    task: dict[str, Any] = {"num_labels": 2}
    if multi_label:
        task.update(problem_type="multi_label_classification", pos_weight=[1.0, 2.0])
    return epic_fast.wrap(lively(tiny_clip()), EpicConfig(prompt_length=2), **task)


def make_trainer(model: Any, folder: Path, multi_label: bool = False, **arguments: Any) -> Any:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "label_names": ["labels"],
        "seed": 1,
        **arguments,
    }
    data = Pairs(multi_label)
    return transformers.Trainer(
        model, transformers.TrainingArguments(**arguments), train_dataset=data, eval_dataset=data
    )


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_trainer_trains_saves_and_resumes(multi_label: bool, tmp_path: Path) -> None:
    model = make_model(multi_label)
    frozen = {name: each.clone() for name, each in model.backbone.state_dict().items()}
    trainer = make_trainer(model, tmp_path / "one", multi_label)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(torch.equal(each, frozen[name]) for name, each in model.backbone.state_dict().items())
    assert not any(each.training for each in model.backbone.modules())

    checkpoint = tmp_path / "one" / "checkpoint-2"
    stored = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert set(stored) == set(model.state_dict())
    assert not any(name.startswith("backbone.") for name in stored)
    assert (checkpoint / "model.safetensors").stat().st_size < 60_000

    again = make_model(multi_label)
    resumed = make_trainer(again, tmp_path / "two", multi_label)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    for name, wanted in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], wanted), name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
    predictions = trainer.predict(Pairs(multi_label))
    assert predictions.predictions.shape == (16, 2)


@pytest.mark.parametrize("sequences", [None, {"sound": 3}])
def test_the_trainer_trains_a_model_that_takes_sequences(sequences: dict[str, int] | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MitConfig(sequences=sequences)
    model = epic_fast.wrap(lively((tiny_vit(), tiny_llama())), config, num_labels=2)
    trainer = make_trainer(model, tmp_path)
    if sequences:
        with pytest.raises(ConfigError, match=r"sound was not given.*remove_unused_columns=False"):
            trainer.train()
        batch = {**Pairs().batch, "sound": torch.randn(16, 4, 3)}
        data = [{name: each[index] for name, each in batch.items()} for index in range(16)]
        trainer = make_trainer(model, tmp_path, remove_unused_columns=False)
        trainer.train_dataset = trainer.eval_dataset = data
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_the_trainer_survives_a_checkpoint_that_lacks_a_tensor(tmp_path: Path) -> None:
    """It then asks the model which of its tensors need not be saved."""
    trainer = make_trainer(make_model(), tmp_path, max_steps=2)
    trainer.train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["text_prompt"]
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    trainer._load_from_checkpoint(str(path.parent))


def test_the_trainer_keeps_the_best_and_logs_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = make_model()
    trainer = make_trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        report_to=["tensorboard"],
    )
    trainer.train()
    best = safetensors.torch.load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(each, best[name]) for name, each in model.state_dict().items())
    model.save_pretrained(tmp_path / "adapter")
    loaded = epic_fast.from_pretrained(tmp_path / "adapter", backbone=lively(tiny_clip()))
    batch = make_batch([8, 5])
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_distributed_data_parallel_needs_no_search_for_unused_tensors(tmp_path: Path) -> None:
    """Without find_unused_parameters its second forward pass fails if any trainable tensor had no gradient."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = make_model()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        batch = {**make_batch([8, 5]), "labels": torch.tensor([0, 1])}
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = parallel(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        state = parallel.state_dict()
        assert set(state) == {f"module.{name}" for name in model.state_dict()}
        parallel.load_state_dict(state, strict=True)
    finally:
        distributed.destroy_process_group()
