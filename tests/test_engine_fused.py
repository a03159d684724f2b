"""Fused frozen blocks against the layers that they take the place of, alone and in whole models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from epic_fast import EpicConfig, wrap
from epic_fast.engine import EngineConfig, call_layer_with_prompts, prompted_visibility
from epic_fast.engine.blocks import LayerParts, why_not
from epic_fast.engine.fused import FrozenBlock, Geometry, run_blocks
from epic_fast.engine.packed import SAME, FrozenTower, say_plain
from epic_fast.engine.rows import RowSelection
from epic_fast.ops import dispatch, frozen_linear, library
from epic_fast.testing import tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.numerics import poisoned_empty
from epic_fast.testing.probes import lively, make_batch, perturb

TOKENS = 6
LENGTHS = torch.tensor([6, 2, 4])
INDEX = torch.tensor([5, 1, 3])
EIGHT_BIT_ERROR = 1e-2


def siglip() -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(2)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = SiglipVisionConfig(**sizes, image_size=32, patch_size=8, hidden_act="gelu_pytorch_tanh")
    return SiglipVisionModel(config).eval()


def siglip_layers() -> Any:
    model = siglip()
    return getattr(model, "vision_model", model).encoder.layers, model


FAMILIES: dict[str, Callable[[], tuple[Any, nn.Module]]] = {
    "clip vision": lambda: (lambda model: (model.vision_model.encoder.layers, model))(tiny_clip()),
    "clip text": lambda: (lambda model: (model.text_model.encoder.layers, model))(tiny_clip()),
    "siglip": siglip_layers,
    "vit": lambda: (lambda model: (model.layers, model))(tiny_vit()),
    "bert": lambda: (lambda model: (model.encoder.layer, model))(tiny_bert()),
}


def layers_of(family: str, count: int = 1) -> list[nn.Module]:
    layers, model = FAMILIES[family]()
    lively(model).requires_grad_(False)
    return list(layers[:count])


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach() - wanted.detach()).norm() / wanted.detach().norm().clamp_min(1e-20))


def check_layer(
    family: str, prompts: int, geometry: Geometry, *, saves: tuple[str, ...], dtype: torch.dtype, tolerance: float
) -> None:
    (layer,) = layers_of(family)
    layer = layer.to(dtype)
    assert why_not(layer) is None
    block = FrozenBlock(layer)
    width = block.parts.parts["query"].in_features
    random = torch.Generator().manual_seed(prompts)
    tokens = torch.randn(3, TOKENS, width, generator=random).to(dtype)
    start = torch.randn(3, prompts, width, generator=random).to(dtype)
    lengths = torch.full((3,), TOKENS) if geometry.lengths is None else geometry.lengths
    valid = torch.arange(TOKENS) < lengths[:, None]
    counts = torch.cat([valid.new_ones(3, prompts), valid], dim=1)[:, :, None]
    mask = prompted_visibility(valid, prompts, causal=geometry.causal, prompt_mask=geometry.prompt_mask)

    def read(rows: Tensor) -> Tensor:
        if geometry.rows is None:
            return torch.where(counts, rows, 0.0)
        return rows

    for tokens_need_gradients in (False, True):
        if not (tokens_need_gradients or prompts):
            continue
        inputs = [tokens.clone().requires_grad_(tokens_need_gradients), start.clone().requires_grad_(prompts > 0)]
        after, prompts_after = call_layer_with_prompts(layer, *inputs, mask)
        wanted = torch.cat([prompts_after, after], dim=1)
        wanted = read(wanted if geometry.rows is None else geometry.rows.take(wanted, prompts))
        needed = [each for each in inputs if each.requires_grad]
        grad = read(torch.randn(wanted.shape, generator=random).to(dtype))
        wanted_grads = torch.autograd.grad(wanted, needed, grad)
        for save in saves:
            found = block(inputs[0], geometry, prompts=inputs[1] if prompts else None, save=save)
            assert relative(read(found), wanted) <= tolerance, save
            bound = EIGHT_BIT_ERROR if save == "eight_bit" else tolerance
            for got, gradient in zip(torch.autograd.grad(found, needed, grad), wanted_grads, strict=True):
                assert relative(got, gradient) <= bound, save
        with torch.no_grad():
            before = tokens.clone()
            assert relative(read(block(tokens, geometry, prompts=start)), wanted) <= tolerance
            assert torch.equal(tokens, before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", [0, 1, 8])
@pytest.mark.parametrize("prompt_mask", ["full", "prefix"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_block_is_its_layer(family: str, prompts: int, prompt_mask: str, padded: bool) -> None:
    geometry = Geometry(prompts, LENGTHS if padded else None, prompt_mask, family == "clip text")
    saves = ("full", "recompute", "eight_bit")
    check_layer(family, prompts, geometry, saves=saves, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("reads_prompts", [False, True])
@pytest.mark.parametrize("index", [None, INDEX], ids=["first", "index"])
def test_a_block_that_computes_a_few_rows(family: str, prompts: int, reads_prompts: bool, index: Tensor | None) -> None:
    rows = RowSelection(index, reads_prompts)
    for prompt_mask in ("full", "prefix"):
        geometry = Geometry(prompts, LENGTHS, prompt_mask, family == "clip text", rows)
        check_layer(family, prompts, geometry, saves=("full", "recompute"), dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_exact_in_float64(family: str) -> None:
    geometry = Geometry(2, LENGTHS, "full", family == "clip text")
    check_layer(family, 2, geometry, saves=("full", "recompute"), dtype=torch.float64, tolerance=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_of_blocks_is_its_layers_one_after_the_other(family: str) -> None:
    blocks = [FrozenBlock(layer) for layer in layers_of(family, 2)]
    hidden = torch.randn(3, TOKENS, blocks[0].parts.parts["query"].in_features)
    for rows in (None, RowSelection(INDEX)):
        geometry = Geometry(0, LENGTHS, "full", family == "clip text", rows)
        whole = Geometry(0, LENGTHS, "full", family == "clip text")
        wanted = blocks[1](blocks[0](hidden.clone().requires_grad_(), whole), geometry)
        before = hidden.clone()
        assert relative(run_blocks(blocks, hidden, geometry), wanted) <= 1e-6
        assert torch.equal(hidden, before)


# -- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(compute: Callable[[], Tensor]) -> int:
    """Bytes of the different tensors that a graph keeps."""
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(kept.values())


@pytest.mark.parametrize("family", ["clip vision", "bert"])
def test_a_block_saves_what_backward_needs(family: str) -> None:
    batch, rows, prompts = 2, 40, 8
    (layer,) = layers_of(family)
    block = FrozenBlock(layer)
    width, heads = block.parts.parts["query"].in_features, block.parts.heads
    hidden = torch.randn(batch, rows, width, requires_grad=True)
    unit = batch * rows * width * 4
    statistics = 4 * batch * rows * 4 + batch * rows * heads * 4
    # Inputs of the two norms, QKV and the attention's output; the MLP is twice as wide as the tokens.
    always = 6 * unit + statistics
    # In 8 bits, a quarter of what the norms read and of the activation's derivative.
    for save, less in (("full", -2 * unit), ("eight_bit", 2 * unit - 4 * unit // 4), ("recompute", 0)):
        found = saved_bytes(lambda save=save: block(hidden, Geometry(prompts), save=save))
        assert found == always - less, save
    # Where prompts join tokens without gradients, the input is kept in the prompts' rows alone (post-norm: nowhere).
    tokens, start = hidden.detach()[:, prompts:], hidden.detach()[:, :prompts].requires_grad_()
    joined = saved_bytes(lambda: block(tokens, Geometry(prompts), prompts=start, save="recompute"))
    if family == "clip vision":
        share = rows - prompts
        assert joined == always - share * unit // rows - 2 * batch * share * 4
    else:
        assert joined == always
    # Of the last layer: keys and values of all rows, one row of everything else.
    one = saved_bytes(lambda: block(hidden, Geometry(prompts, rows=RowSelection()), save="full"))
    assert one < 4 * unit
    plain = saved_bytes(lambda: layer(hidden, None))
    assert always + 2 * unit < 0.8 * plain


def test_without_gradients_nothing_is_saved_and_the_stream_stays_in_place() -> None:
    blocks = [FrozenBlock(layer) for layer in layers_of("clip vision", 2)]
    hidden = torch.randn(2, 9, 48)
    assert saved_bytes(lambda: run_blocks(blocks, hidden, Geometry())) == 0
    found = run_blocks(blocks, hidden, Geometry(), owned=True)
    assert found.data_ptr() == hidden.data_ptr()


# -- which layers, and when they change -------------------------------------------------------------------------------


def test_weights_are_made_once_and_again_when_they_change() -> None:
    (layer,) = layers_of("clip vision")
    parts = LayerParts(layer)
    first = parts.weights()
    assert parts.weights() is first
    assert first.qkv.shape == (144, 48)
    half = parts.weights(torch.bfloat16)
    assert half.qkv.dtype == half.up.dtype == torch.bfloat16
    assert parts.weights() is first
    with torch.no_grad():
        layer.get_submodule("self_attn.k_proj").weight.mul_(2)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert parts.weights() is not first
    assert torch.equal(parts.weights().qkv[48:96], 2 * first.qkv[48:96])
    layer.double()
    assert parts.weights().qkv.dtype == torch.float64


class Doubling(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, rows: Tensor) -> Tensor:
        return self.inner(rows) * 2


def give_hook(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda module, args, output: output * 2)


def give_adapter(layer: Any) -> None:
    layer.self_attn.q_proj = Doubling(layer.self_attn.q_proj)


def give_forward(layer: Any) -> None:
    layer.mlp.fc1.forward = lambda rows: nn.Linear.forward(layer.mlp.fc1, rows) * 2


def give_parametrization(layer: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(layer.mlp.fc2, "weight", Doubling(nn.Identity()))


def give_training(layer: Any) -> None:
    layer.self_attn.train()


def give_gradients(layer: Any) -> None:
    layer.layer_norm1.weight.requires_grad_(True)


def give_activation(layer: Any) -> None:
    layer.mlp.activation_fn = nn.ReLU()


CHANGES = [
    give_hook,
    give_adapter,
    give_forward,
    give_parametrization,
    give_training,
    give_gradients,
    give_activation,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_layers_that_are_something_else_are_refused(change: Callable[[Any], None]) -> None:
    (layer,) = layers_of("clip vision")
    parts = LayerParts(layer)
    assert parts.unchanged()
    change(layer)
    assert why_not(layer)
    assert not parts.unchanged()


@pytest.mark.parametrize("which", ["layer_norm1.eps", "layer_norm2.eps", "self_attn.scale"])
def test_another_number_in_a_layer_counts(which: str) -> None:
    batch = make_batch([4, 6])
    models = [model_of("clip", each) for each in (EngineConfig(blocks="fused"), None)]
    before = models[0](**batch).logits
    for model in models:
        holder, _, name = f"backbone.vision.layers.1.{which}".rpartition(".")
        part = functools.reduce(lambda each, step: each[int(step)] if step.isdigit() else getattr(each, step),
                                holder.split("."), model)  # fmt: skip
        setattr(part, name, 0.5)
    found, wanted = (model(**batch).logits for model in models)
    assert relative(found, wanted) <= 1e-5
    assert relative(found, before) > 1e-3
    assert models[0].backbone.vision.frozen.blocks() is not None


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 2 * SAME])
def test_a_block_that_is_not_like_its_layer_is_not_taken(error: float) -> None:
    layers = layers_of("clip vision", 2)
    assert FrozenTower(layers, "vision", compare=lambda *given: SAME).blocks() is not None
    tower = FrozenTower(layers, "vision", compare=lambda *given: error)
    assert tower.blocks() is None
    assert tower.blocks() is None


def test_hooks_on_all_modules_are_called(caplog: pytest.LogCaptureFixture) -> None:
    batch, seen = make_batch([4, 6]), []
    model = model_of("clip", EngineConfig(blocks="fused"))
    wanted = model(**batch).logits
    say_plain.cache_clear()
    with caplog.at_level("INFO", logger="epic_fast"):
        hook = nn.modules.module.register_module_forward_hook(lambda module, *given: seen.append(module))
        try:
            found = model(**batch).logits
        finally:
            hook.remove()
    assert set(model.backbone.vision.layers) <= set(seen)
    assert relative(found, wanted) <= 1e-5
    assert "hooks on all modules" in caplog.text
    assert model.backbone.vision.frozen.blocks() is not None


def test_a_stranger_is_refused_with_the_layers_that_are_known() -> None:
    assert "BertLayer" in str(why_not(nn.TransformerEncoderLayer(8, 2)))


def test_a_changed_layer_takes_the_plain_path_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    batch = make_batch([4, 6])
    engine = EngineConfig(blocks="fused")
    models = [model_of("clip", each) for each in (engine, None)]
    for model in models:
        # The blocks are made here, and found to be outdated below.
        model(**batch)
        model.backbone.vision.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    say_plain.cache_clear()
    with caplog.at_level("INFO", logger="epic_fast"):
        found, again = (models[0](**batch).logits for _ in range(2))
    assert torch.equal(found, again)
    assert relative(found, models[1](**batch).logits) <= 1e-5
    said = [each.getMessage() for each in caplog.records if "own layers" in each.getMessage()]
    assert len(said) == 1
    assert "vision tower" in said[0]
    assert "hooks" in said[0]


def test_a_release_that_computes_something_else_takes_the_plain_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The modules' names and classes are those of a known layer, but the layer's class calls them in another way."""
    batch = make_batch([4, 6])
    model = model_of("clip", EngineConfig(blocks="fused"))
    kind = type(model.backbone.text.layers[0])
    original = kind.forward

    def forward(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden + 0.8 * (original(layer, hidden, *args, **kwargs) - hidden)

    monkeypatch.setattr(kind, "forward", forward)
    say_plain.cache_clear()
    with caplog.at_level("INFO", logger="epic_fast"):
        found = model(**batch).logits
    assert relative(found, model_of("clip", None)(**batch).logits) <= 1e-5
    assert sum("differs from its fused block" in each.getMessage() for each in caplog.records) == 2


# -- whole models -----------------------------------------------------------------------------------------------------


def backbone_of(kind: str) -> Any:
    return tiny_clip() if kind == "clip" else (tiny_vit(), tiny_bert())


def model_of(kind: str, engine: EngineConfig | None, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = EpicConfig(head_dropout=0.0, **fields)
    model = wrap(lively(backbone_of(kind)), config, 3, engine=engine, self_check=False)
    return perturb(model).to(dtype)


def step_of(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**batch, labels=torch.tensor([0, 1, 2, 1])[: len(batch["input_ids"])])
    output.loss.backward()
    return output.logits.detach(), {name: each.grad.clone() for name, each in model.trainable_parameters()}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "one prompt": {"prompt_length": 1},
    "no prompts": {"prompt_length": 0},
    "one pair": {"num_layer_pairs": 1},
    "pairs with layers between": {"layer_pairs": [(0, 1), (2, 3)]},
    "pairs far apart": {"layer_pairs": [(0, 0), (2, 3)]},
    "pairs that end early": {"layer_pairs": [(0, 0), (1, 2)], "head_reads_prompts": True},
    "prefix": {"prompt_mask": "prefix"},
    "no interaction": {"interaction": False},
    "activation": {"activation": "gelu_layernorm"},
    "prompts read": {"head_reads_prompts": True},
    "similarity read": {"head_reads_similarity": True},
    "mean": {"text_head_input": "mean", "vision_head_input": "mean+cls"},
    "own projections": {"gate": "channel", "shared_projections": False},
    "own vision prompt": {"vision_prompt_init": "gaussian"},
}
ENGINES = {
    "fused": EngineConfig(blocks="fused"),
    "recompute": EngineConfig(blocks="fused", save="recompute", pooled_rows=False),
    "all rows": EngineConfig(blocks="fused", pooled_rows=False, trim_text=False),
    "plain": EngineConfig(blocks="plain"),
}


@pytest.mark.parametrize("kind", ["clip", "vit+bert"])
@pytest.mark.parametrize("fields", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_step_is_the_plain_step(kind: str, fields: dict[str, Any]) -> None:
    batch = make_batch([3, 9, 5, 4], width=12)
    exact = {**batch, "pixel_values": batch["pixel_values"].double()}
    wanted, wanted_grads = step_of(model_of(kind, None, torch.float64, **fields), exact)
    _, plain_grads = step_of(model_of(kind, None, **fields), batch)
    for name, engine in ENGINES.items():
        logits, grads = step_of(model_of(kind, engine, torch.float64, **fields), exact)
        assert relative(logits, wanted) <= 1e-10, name
        assert max(relative(grads[each], wanted_grads[each]) for each in wanted_grads) <= 1e-8, name
        model = model_of(kind, engine, **fields)
        logits, grads = step_of(model, batch)
        assert logits.dtype == torch.float32
        assert relative(logits.double(), wanted) <= 1e-5, name
        for each, gradient in wanted_grads.items():
            # A gradient that is a small difference of large numbers has fewer digits on the plain path, too.
            bound = max(1e-5, 4 * relative(plain_grads[each].double(), gradient))
            assert relative(grads[each].double(), gradient) <= bound, (name, each)
        with torch.no_grad():
            assert relative(model(**batch).logits.double(), wanted) <= 1e-5, name


@pytest.mark.parametrize("kind", ["clip", "vit+bert"])
def test_eight_bits_of_what_backward_reads_cost_little(kind: str) -> None:
    batch = make_batch([3, 9, 5, 4], width=12)
    logits, grads = step_of(model_of(kind, EngineConfig(blocks="fused", save="eight_bit")), batch)
    wanted, wanted_grads = step_of(model_of(kind, None), batch)
    assert relative(logits, wanted) <= 1e-5
    whole = [torch.cat([each.flatten() for each in found.values()]) for found in (grads, wanted_grads)]
    assert 1e-6 < relative(*whole) <= EIGHT_BIT_ERROR


@pytest.mark.parametrize("kind", ["clip", "vit+bert"])
@pytest.mark.parametrize("save", ["full", "recompute"])
def test_twenty_steps_of_training_end_in_the_same_loss(kind: str, save: Any) -> None:
    batches = [make_batch([3, 9, 5, 4], width=12, seed=seed) for seed in range(4)]
    labels = torch.tensor([0, 1, 2, 1])
    losses: list[list[float]] = []
    for engine in (None, EngineConfig(blocks="fused", save=save)):
        model = model_of(kind, engine).train()
        start = float(model(**batches[0], labels=labels).loss.detach())
        optimizer = torch.optim.AdamW([each for _, each in model.trainable_parameters()], lr=1e-3)
        for step in range(20):
            optimizer.zero_grad()
            loss = model(**batches[step % 4], labels=labels).loss
            loss.backward()
            optimizer.step()
        losses.append([float(model(**batch, labels=labels).loss.detach()) for batch in batches])
        assert abs(losses[-1][0] - start) > 0.05
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["clip", "vit+bert"])
def test_autocast_errs_no_more_than_the_plain_path(kind: str) -> None:
    batch = make_batch([3, 9, 5, 4], width=12)
    exact = {**batch, "pixel_values": batch["pixel_values"].double()}
    wanted, wanted_grads = step_of(model_of(kind, None, torch.float64), exact)

    def errors(engine: EngineConfig | None) -> tuple[float, float]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, grads = step_of(model_of(kind, engine), batch)
        found = torch.cat([each.flatten() for each in grads.values()]).double()
        return relative(logits.double(), wanted), relative(
            found, torch.cat([each.flatten() for each in wanted_grads.values()])
        )

    plain, fused = errors(None), errors(EngineConfig(blocks="fused"))
    assert plain[0] > 1e-4
    assert fused[0] <= 2 * plain[0]
    assert fused[1] <= 3 * plain[1]


def test_bfloat16_weights() -> None:
    batch = make_batch([3, 9, 5, 4], width=12)
    half = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    logits, grads = step_of(model_of("clip", EngineConfig(blocks="fused"), torch.bfloat16), half)
    plain, plain_grads = step_of(model_of("clip", None, torch.bfloat16), half)
    wanted, _ = step_of(model_of("clip", None, torch.float64), {**batch, "pixel_values": half["pixel_values"].double()})
    assert relative(logits.double(), wanted) <= 2 * relative(plain.double(), wanted)
    assert all(grads[name].dtype == gradient.dtype for name, gradient in plain_grads.items())


@pytest.mark.parametrize("kind", ["clip", "vit+bert"])
def test_the_backbone_comes_back_as_it_was(kind: str) -> None:
    backbone = lively(backbone_of(kind))
    models = backbone if isinstance(backbone, tuple) else (backbone,)
    before = [{name: each.clone() for name, each in model.state_dict().items()} for model in models]
    requires = [[each.requires_grad for each in model.parameters()] for model in models]
    model = perturb(wrap(backbone, EpicConfig(), 3, engine=EngineConfig(blocks="fused")))
    step_of(model, make_batch([3, 9, 5, 4]))
    assert not any("backbone" in name or "frozen" in name for name in model.state_dict())
    assert model.unwrap() is backbone or isinstance(backbone, tuple)
    for each, state, wanted in zip(models, before, requires, strict=True):
        assert [parameter.requires_grad for parameter in each.parameters()] == wanted
        for name, tensor in each.state_dict().items():
            assert torch.equal(tensor, state[name])


def test_prompts_and_tokens_stay_in_their_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between consecutive pairs nothing is copied but the prompts themselves, forward and backward."""
    model = model_of("clip", EngineConfig(blocks="fused", pooled_rows=False), num_layer_pairs=3)
    copied: list[tuple[int, ...]] = []
    buffers: list[Any] = []
    from epic_fast.engine import packed

    original = packed._Exchange.backward

    def watched(ctx: Any, *grads: Any) -> Any:
        result: Any = original(ctx, *grads)
        buffers.append([given.data_ptr() == made.data_ptr() for given, made in zip(grads, result[:2], strict=True)])
        return result

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (
                torch.ops.aten.cat.default,
                torch.ops.aten.clone.default,
                torch.ops.aten.slice_backward.default,
            ):
                whole = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
                copied.append(tuple(whole.shape))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(packed._Exchange, "backward", staticmethod(watched))
    batch = make_batch([4, 6, 5])
    prefix = model.extract(**batch)
    with Watch():
        logits = model(prefix=prefix).logits
    assert all(shape[1] == 8 for shape in copied if len(shape) == 3)
    logits.sum().backward()
    assert buffers == [[True, True], [True, True]]


@pytest.mark.parametrize("save", ["full", "eight_bit"])
@pytest.mark.parametrize("pairs", [[(0, 0), (1, 1)], [(0, 0), (1, 2)]], ids=["consecutive", "a layer between"])
def test_a_step_by_the_kernels_is_the_plain_step(
    pairs: list[tuple[int, int]], save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All operations of the step by Triton's interpreter, on memory that was never written."""
    if not library.interpreting():
        pytest.skip("Triton's interpreter is off")
    backbone = tiny_clip(text_layers=2, vision_layers=pairs[-1][1] + 1)
    config = EpicConfig(head_dropout=0.0, layer_pairs=pairs, prompt_length=3)
    models = []
    for engine in (None, EngineConfig(blocks="fused", save=save)):
        torch.manual_seed(0)
        model = wrap(lively(copy.deepcopy(backbone)), config, 3, engine=engine, self_check=False)
        models.append(perturb(model))
    batch = make_batch([3, 5])
    wanted, wanted_grads = step_of(models[0], batch)
    called: set[str] = set()

    def choose(operation: Any, impl: str, *args: Any) -> Any:
        called.add(operation.name)
        return operation.triton

    takes = frozen_linear._takes_kernel

    def takes_kernel(name: str, impl: str, *args: Any, **kwargs: Any) -> bool:
        called.add(name)
        return takes(name, "triton", *args, **kwargs)

    monkeypatch.setattr(dispatch.Operation, "choose", choose)
    monkeypatch.setattr(frozen_linear, "_takes_kernel", takes_kernel)
    with poisoned_empty():
        logits, grads = step_of(models[1], batch)
    both = ("packed_attention", "residual_norm", "linear")
    assert called >= {f"{name}_{way}" for name in both for way in ("forward", "backward")} | {"prompt_interaction"}
    assert relative(logits, wanted) <= 1e-5
    bound = EIGHT_BIT_ERROR if save == "eight_bit" else 2e-5
    found = [torch.cat([each.flatten() for each in set_.values()]) for set_ in (grads, wanted_grads)]
    assert relative(*found) <= bound
