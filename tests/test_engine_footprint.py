"""What a step of CLIP ViT-L/14 saves and launches, counted on tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from epic_fast import EngineConfig, EpicConfig, wrap
from epic_fast.testing.footprint import Footprint, as_if_on_gpu

BATCH, PROMPTS, TOKENS, LENGTH = 64, 8, 257, 47
VISION, TEXT = 1024, 768
LAYOUTS = {"late": None, "deep": [(text, 2 * text + 1) for text in range(12)]}
# In rows of a tower's width in bfloat16: QKV and the attention's output; and by `save` the inputs of the two norms
# and what backward wants of the MLP, which is four times as wide.
ATTENTION = 4.0
NORM = {"full": 1.0, "eight_bit": 0.5, "recompute": 1.0}
MLP = {"full": 4.0, "eight_bit": 2.0, "recompute": 0.0}


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    common = {"hidden_act": "quick_gelu"}
    text = {"hidden_size": TEXT, "intermediate_size": 4 * TEXT, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {
        "hidden_size": VISION,
        "intermediate_size": 4 * VISION,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    with torch.device("meta"):
        model: Any = CLIPModel(CLIPConfig(text_config=text | common, vision_config=vision | common))
    return model.eval().to(torch.bfloat16)


def footprint(layout: str, engine: EngineConfig) -> Footprint:
    config = EpicConfig(layer_pairs=LAYOUTS[layout], prompt_length=PROMPTS, head_dropout=0.0)
    model = wrap(clip(), config, 10, engine=engine, self_check=False).to("meta").train()
    inputs: dict[str, Tensor] = {
        "pixel_values": torch.empty(BATCH, 3, 224, 224, dtype=torch.bfloat16),
        "input_ids": torch.empty(BATCH, LENGTH, dtype=torch.long),
        "attention_mask": torch.empty(BATCH, LENGTH, dtype=torch.long),
        "text_lengths": torch.empty(BATCH, dtype=torch.int32),
        "labels": torch.empty(BATCH, dtype=torch.long),
    }
    inputs = {name: value.to("meta") for name, value in inputs.items()}

    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    with as_if_on_gpu(), torch.autograd.set_multithreading_enabled(False):
        # What is made once, such as joined weights, is no part of a step.
        step()
        with Footprint() as counted:
            step()
    return counted


def saved(layers: int, prompted: list[int], tokens: int, width: int, save: str) -> float:
    """Bytes that a tower's layers keep for a backward pass, statistics and log-sum-exp of few bytes a row aside."""
    total = 0.0
    for layer in range(prompted[0], layers):
        rows = BATCH * (tokens + (PROMPTS if layer in prompted else 0)) * width * 2
        if layer == layers - 1:
            # Keys and values of all rows; everything else of one.
            total += rows * (2.0 + NORM[save])
        elif layer == prompted[0]:
            total += rows * (ATTENTION + NORM[save] + MLP[save])
        else:
            total += rows * (ATTENTION + 2 * NORM[save] + MLP[save])
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("save", ["full", "eight_bit", "recompute"])
def test_a_step_holds_what_backward_reads_and_one_layer_at_work(layout: str, save: Any) -> None:
    counted = footprint(layout, EngineConfig(blocks="fused", save=save))
    pairs = LAYOUTS[layout] or [(text, text + 12) for text in range(6, 12)]
    wanted = saved(24, [vision for _, vision in pairs], TOKENS, VISION, save)
    wanted += saved(12, [text for text, _ in pairs], LENGTH, TEXT, save)
    rows = BATCH * (TOKENS + PROMPTS) * VISION * 2
    # At work: the hidden rows of one MLP, its input, the stream, and the towers' tokens below the first prompts (what
    # that MLP keeps counts among the saved already, and so does what the last layer will); pre-activations made anew.
    # The hub's weights in bfloat16 and the prompts between the layers do not grow with the rows.
    hub = len(pairs) * 2 * (VISION * TEXT * 2 + BATCH * PROMPTS * VISION * 2)
    at_work = 8.25 if save == "recompute" else 4.25
    most = wanted * 1.01 + at_work * rows + hub
    pieces = sorted(counted.at_peak(), key=lambda piece: -piece.bytes)[:12]
    assert wanted < counted.peak <= most, ((counted.peak - wanted) / rows, pieces)
    assert counted.live < rows


@pytest.mark.parametrize(("layout", "most"), [("late", 550), ("deep", 820)])
def test_launches_of_a_step(layout: str, most: int) -> None:
    counted = footprint(layout, EngineConfig(blocks="fused", save="eight_bit"))
    assert sum(counted.launches.values()) <= most, counted.launches.most_common(10)


@pytest.mark.parametrize(("layout", "gaps"), [("late", 0), ("deep", 11)])
@pytest.mark.parametrize("save", ["full", "eight_bit"])
def test_a_layer_between_two_with_prompts_copies_its_rows_twice(layout: str, gaps: int, save: Any) -> None:
    """Both times gradients: of the tokens alone for the products, and of the buffer put together."""
    counted = footprint(layout, EngineConfig(blocks="fused", save=save))
    rows = BATCH * (TOKENS + PROMPTS) * VISION * 2
    copied = sum(size for (name, _), size in counted.written.items() if name in ("clone", "cat", "copy_"))
    assert copied <= (2 * gaps + 4) * rows, (copied / rows, counted.written.most_common(12))
