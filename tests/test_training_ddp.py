"""Two processes (gloo, started by torchrun as ``accelerate launch`` does on GPUs) compute what one computes.

Run as a script: ``FOLDER`` trains into it and writes the result beside the run as the main process sees it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import epic_fast
from epic_fast.testing import tiny_clip
from epic_fast.testing.pairs import RandomPairs
from epic_fast.training import TrainingConfig, fit

TASKS = {"single_label_classification": 21, "multi_label_classification": 17}


def train(folder: Path, problem_type: str, length: int):
    """Batches of 8, so the last one of an epoch holds 5 or 1; 7 samples of validation."""
    torch.set_num_threads(1)
    backbone = tiny_clip()
    torch.manual_seed(0)
    config = epic_fast.EpicConfig(prompt_length=2, num_layer_pairs=2, head_dropout=0.0, feature_norm="standardize")
    task = {"num_labels": 3, "problem_type": problem_type}
    if problem_type == "multi_label_classification":
        task["pos_weight"] = "auto"
    model = epic_fast.wrap(backbone, config, self_check=False, **task)
    settings = TrainingConfig(
        epochs=2,
        batch_size=8,
        learning_rate=1e-2,
        log_every_steps=1,
        device="cpu",
        checkpoint_every_steps=2,
        tensorboard=False,
        load_best=False,
    )
    data = RandomPairs(length, problem_type, augment=True), RandomPairs(7, problem_type, seed=1)
    result = fit(model, *data, config=settings, output_dir=folder, progress=False)
    return model, result


def main(folder: str) -> None:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    assert state.num_processes == 2
    for problem_type, length in TASKS.items():
        model, result = train(Path(folder) / problem_type, problem_type, length)
        weights = torch.cat([each.flatten() for each in model.state_dict().values()])
        both = [torch.empty_like(weights) for _ in range(2)]
        torch.distributed.all_gather(both, weights)
        assert torch.equal(*both)
        if state.is_main_process:
            (Path(folder) / f"{problem_type}.json").write_text(json.dumps([result.best_epoch, result.best_metrics]))
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])


def compare(first, second):
    """Nested numbers equal to 1e-5."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            compare(first[key], second[key])
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=1e-5)
    else:
        assert first == second


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(epic_fast.__file__).parents[1])}
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *launch, __file__, str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    before = torch.get_num_threads()
    try:
        for problem_type, length in TASKS.items():
            one, two = tmp_path / "one" / problem_type, tmp_path / "two" / problem_type
            model, result = train(one, problem_type, length)
            logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, two)]
            assert len(logs[0]) == len(logs[1])
            for rows in zip(*logs, strict=True):
                compare(*rows)
            best = json.loads((tmp_path / "two" / f"{problem_type}.json").read_text())
            compare({"best": best[0], **best[1]}, {"best": result.best_epoch, **result.best_metrics})
            weights = load_file(two / "checkpoint" / "state.safetensors")
            for name, each in model.state_dict().items():
                torch.testing.assert_close(weights[f"model/{name}"], each, rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(before)
