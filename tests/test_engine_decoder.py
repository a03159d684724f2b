"""Fused layers of the LLaMA family against the model's own, alone and in whole models, infused and not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epic_fast
from epic_fast import EngineConfig, MitConfig
from epic_fast.backbones import LlamaTower, load_backbone
from epic_fast.engine import decoder
from epic_fast.engine.decoder import FrozenDecoderLayer, side_by_side, why_not
from epic_fast.ops import dispatch, library
from epic_fast.testing import tiny_llama, tiny_vit
from epic_fast.testing.numerics import poisoned_empty
from epic_fast.testing.probes import lively, make_batch, perturb

FUSED, PLAIN = EngineConfig(blocks="fused"), EngineConfig(blocks="plain", pooled_rows=False)
LENGTHS = [9, 4, 7]
KINDS = [("llama", 4), ("llama", 2), ("llama", 1), ("mistral", 2), ("qwen2", 2), ("qwen3", 2)]
FUSABLE = KINDS[:-1]


def tower_of(kind: str = "llama", kv_heads: int = 2, dtype: torch.dtype = torch.float32, **more: Any) -> LlamaTower:
    model = lively(tiny_llama(kind=kind, kv_heads=kv_heads, **more)).to(dtype)
    tower = load_backbone(model).text
    assert isinstance(tower, LlamaTower)
    return tower


def tokens(tower: LlamaTower, lengths: list[int] | None = None, width: int | None = None) -> Any:
    batch = make_batch(LENGTHS if lengths is None else lengths, width=width)
    return tower.start(batch["input_ids"], batch["attention_mask"]).measured()


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach() - wanted.detach()).norm() / wanted.detach().norm().clamp_min(1e-20))


def model_of(engine: EngineConfig | None, kind: str = "llama", kv_heads: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    given = lively((tiny_vit(), tiny_llama(kind=kind, kv_heads=kv_heads)))
    config = MitConfig(**{"layers": [1, 3], "head_dropout": 0.0, **options})
    return perturb(epic_fast.wrap(given, config, num_labels=4, engine=engine)).train()


def batch_of(seed: int = 0) -> dict[str, Tensor]:
    return {**make_batch(LENGTHS, width=11, seed=seed), "labels": torch.tensor([0, 1, 2])}


def step_of(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    found = model(**batch)
    return found.logits.detach(), list(
        torch.autograd.grad(found.loss, [each for _, each in model.trainable_parameters()])
    )


# -- a layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["full", "recompute"])
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize(("kind", "kv_heads"), FUSABLE)
def test_layers_are_the_models_own(kind: str, kv_heads: int, one_row: bool, save: Any) -> None:
    """The last two layers and their gradient, padded; the sum in between stays open."""
    tower = tower_of(kind, kv_heads, torch.float64)
    # A bias where the family may have one.
    state = tokens(tower, width=11)
    results = []
    for engine in (None, EngineConfig(blocks="fused", save=save, pooled_rows=one_row)):
        hidden = tower.run(state, 2).hidden.detach().requires_grad_()
        found = tower.pool(tower.advance(state.after(hidden, 2), 4, engine, "pooled", more=True))
        weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        results.append((found, torch.autograd.grad((found * weight).sum(), hidden)[0]))
    for one, other in zip(*results, strict=True):
        # The models' norms and tables of angles are in float32.
        assert relative(other, one) < 1e-6


def test_biases_everywhere() -> None:
    tower = tower_of(dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    for layer in tower.layers:
        for path in decoder.LINEARS.values():
            if not path.endswith("k_proj"):
                linear: Any = layer.get_submodule(path)
                linear.bias = nn.Parameter(
                    torch.randn(linear.out_features, dtype=torch.float64, generator=random), requires_grad=False
                )
    state = tokens(tower)
    wanted, found = (tower.pool(tower.advance(state, 4, engine, "pooled")) for engine in (None, FUSED))
    assert relative(found, wanted) < 1e-6


@torch.no_grad()
def test_nothing_runs_twice_and_no_sum_is_lost() -> None:
    tower = tower_of()
    state = tokens(tower)
    open_sum = tower.advance(state, 2, FUSED, more=True)
    assert open_sum.branch is not None
    assert tower.advance(state, 2, FUSED).branch is None
    wanted = tower.run(state, 3).hidden
    for found in (tower.run(open_sum, 3), tower.advance(open_sum, 3, None), tower.advance(open_sum, 3, FUSED)):
        valid = state.valid[:, :, None]
        torch.testing.assert_close(found.hidden * valid, wanted * valid, rtol=1e-4, atol=1e-4)
    assert torch.equal(open_sum.to("cpu").hidden, open_sum.hidden + open_sum.branch)


# -- whole models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["residual", "replace"])
@pytest.mark.parametrize(("kind", "kv_heads"), KINDS)
def test_logits_and_gradients_are_those_of_the_plain_path(kind: str, kv_heads: int, form: Any) -> None:
    batch = batch_of()
    wanted, gradients = step_of(model_of(None, kind, kv_heads, form=form), batch)
    for engine in (FUSED, EngineConfig(blocks="fused", save="recompute", pooled_rows=False)):
        logits, found = step_of(model_of(engine, kind, kv_heads, form=form), batch)
        assert relative(logits, wanted) < 1e-5
        both = [torch.cat([each.flatten() for each in grads]) for grads in (found, gradients)]
        assert relative(*both) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_twenty_steps_end_in_the_same_loss(kind: str) -> None:
    losses = []
    for engine in (None, FUSED):
        model = model_of(engine, kind)
        optimizer = torch.optim.AdamW([each for _, each in model.trainable_parameters()], lr=1e-3)
        first = model(**batch_of()).loss.item()
        for _ in range(20):
            loss = model(**batch_of()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        assert losses[-1] < 0.5 * first
    assert abs(losses[0] - losses[1]) < 1e-4


def test_no_layer_of_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FUSED)
    model(**batch_of())
    kind = type(model.backbone.text.layers[0])
    monkeypatch.setattr(kind, "forward", lambda *given, **named: pytest.fail("a layer of the model's own"))
    step_of(model, batch_of())


def test_the_kernels_give_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """All operations of the step by Triton's interpreter, on memory that was never written."""
    if not library.interpreting():
        pytest.skip("Triton's interpreter is off")
    batch = batch_of()
    wanted, gradients = step_of(model_of(None), batch)
    model, called = model_of(FUSED), set()

    def choose(operation: Any, impl: str, *args: Any) -> Any:
        called.add(operation.name)
        return operation.triton

    monkeypatch.setattr(dispatch.Operation, "choose", choose)
    # The picture's tower is not asked about here.
    monkeypatch.setattr(model.backbone.vision, "runs_fused", lambda engine: False)
    with poisoned_empty():
        logits, found = step_of(model, batch)
    assert called >= {"residual_norm_forward", "residual_norm_backward", "rotate_heads", "join_rotated_back"}
    assert called >= {"infusion_gate", "infused_attention", "infused_swiglu"}
    assert relative(logits, wanted) < 1e-5
    assert relative(*[torch.cat([each.flatten() for each in grads]) for grads in (found, gradients)]) < 2e-5


@torch.no_grad()
def test_without_a_source_either_form_is_the_layer_itself() -> None:
    tower = tower_of()
    state = tower.with_positions(tokens(tower))
    layer = FrozenDecoderLayer(tower.layers[0])
    one, other = (
        layer(state.hidden, None, tower.geometry(state), (), form=form)[1] for form in ("residual", "replace")
    )
    assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("save", ["full", "recompute"])
def test_a_captured_step_has_the_bits_of_an_eager_one(save: Any) -> None:
    from epic_fast.engine.graphs import CudaBackend, GraphCache

    device = torch.device("cuda", torch.cuda.current_device())
    batch = batch_of()
    wanted, gradients = step_of(model_of(None), batch)
    model = model_of(EngineConfig(blocks="fused", save=save)).to(device)
    given = {name: each.to(device) for name, each in batch.items()}
    given["text_lengths"] = given["attention_mask"].sum(dim=1, dtype=torch.int32)
    logits, found = step_of(model, given)
    assert relative(logits.cpu(), wanted) < 1e-4
    assert relative(*[torch.cat([each.flatten().cpu() for each in grads]) for grads in (found, gradients)]) < 1e-3
    graphs = GraphCache("a step", lambda inputs: step_of(model, inputs), CudaBackend(device), device)
    for _ in range(2):
        replayed, captured = graphs(given)
        assert (graphs.refused, len(graphs)) == (None, 1)
        assert torch.equal(replayed, logits)
        assert all(torch.equal(one, other) for one, other in zip(captured, found, strict=True))


# -- what it keeps ----------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' graphs: PyTorch's specification of an operation keeps much more."""
    if not library.interpreting():
        pytest.skip("Triton's interpreter is off")
    monkeypatch.setattr(dispatch.Operation, "choose", lambda operation, impl, *given: operation.triton)


def saved_bytes(model: Any, batch: dict[str, Tensor]) -> int:
    """Of what a graph holds beside parameters, storages counted once."""
    model.backbone.vision.runs_fused = lambda engine: False
    with torch.no_grad():
        # Weights are moved where they are first used.
        model(**batch)
    frozen = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


@pytest.mark.usefixtures("kernels")
def test_less_is_kept_than_by_the_models_own_layers() -> None:
    engines = (PLAIN, FUSED, EngineConfig(blocks="fused", save="recompute"))
    sizes = [saved_bytes(model_of(engine, layers=[1, 2, 3]), batch_of()) for engine in engines]
    assert sizes[1] < 0.7 * sizes[0]
    assert sizes[2] < 0.8 * sizes[1]


@pytest.mark.usefixtures("kernels")
def test_below_the_first_infused_layer_nothing_is_kept() -> None:
    late, early = (saved_bytes(model_of(FUSED, layers=layers), batch_of()) for layers in ([3], [0, 3]))
    assert late < 0.3 * early


def test_weights_lie_side_by_side_without_a_second_copy() -> None:
    tower = tower_of("qwen2", 1)
    attention: Any = tower.layers[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    before, parameters = [each.weight.clone() for each in linears], [each.weight for each in linears]
    whole = side_by_side(linears)
    assert all(each.weight is one for each, one in zip(linears, parameters, strict=True))
    assert torch.equal(whole, torch.cat(before))
    assert all(torch.equal(each.weight, one) for each, one in zip(linears, before, strict=True))
    assert {each.weight.untyped_storage().data_ptr() for each in linears} == {whole.untyped_storage().data_ptr()}
    again = side_by_side(linears)
    assert (again.data_ptr(), again.shape) == (whole.data_ptr(), whole.shape)
    # In another order they do not lie so.
    assert torch.equal(side_by_side(linears[::-1]), torch.cat(before[::-1]))
    assert all(torch.equal(each.weight, one) for each, one in zip(linears, before, strict=True))


def test_the_backbone_comes_back_with_its_numbers(tmp_path: Any) -> None:
    given = lively(tiny_llama())
    before = {name: each.clone() for name, each in given.state_dict().items()}
    model = epic_fast.wrap((tiny_vit(), given), MitConfig(layers=[1, 3]), engine=FUSED)
    model(**make_batch(LENGTHS))
    _, back = model.unwrap()
    assert back is given
    assert all(torch.equal(each, before[name]) for name, each in back.state_dict().items())
    back.save_pretrained(tmp_path)
    again = type(back).from_pretrained(tmp_path)
    assert all(torch.equal(each, before[name]) for name, each in again.state_dict().items())


# -- when it does not -------------------------------------------------------------------------------------------


def test_a_changed_weight_is_read_anew() -> None:
    tower = tower_of()
    state = tokens(tower)
    first = tower.advance(state, 4, FUSED).hidden
    with torch.no_grad():
        tower.layers[2].mlp.gate_proj.weight.mul_(2)  # pyright: ignore
    second = tower.advance(state, 4, FUSED).hidden
    valid = state.valid[:, :, None]
    torch.testing.assert_close(second * valid, tower.run(state, 4).hidden * valid, rtol=1e-4, atol=1e-4)
    assert relative(second, first) > 1e-3
    tower.layers[2].mlp.gate_proj.weight = nn.Parameter(torch.zeros(64, 32), requires_grad=False)  # pyright: ignore
    third = tower.advance(state, 4, FUSED).hidden
    torch.testing.assert_close(third * valid, tower.run(state, 4).hidden * valid, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["epsilon", "scale"])
def test_another_number_in_a_layer_counts(which: str) -> None:
    tower = tower_of()
    state = tokens(tower)
    first = tower.advance(state, 4, FUSED).hidden
    layer: Any = tower.layers[2]
    if which == "scale":
        layer.self_attn.scaling *= 3
    else:
        layer.post_attention_layernorm.variance_epsilon = 1.0
    second = tower.advance(state, 4, FUSED).hidden
    valid = state.valid[:, :, None]
    torch.testing.assert_close(second * valid, tower.run(state, 4).hidden * valid, rtol=1e-4, atol=1e-4)
    assert relative(second, first) > 1e-3


def test_hooks_on_all_modules_are_called() -> None:
    tower, seen = tower_of(), []
    state = tokens(tower)
    wanted = tower.advance(state, 4, FUSED).hidden
    hook = nn.modules.module.register_module_forward_hook(lambda module, *given: seen.append(module))
    try:
        found = tower.advance(state, 4, FUSED).hidden
    finally:
        hook.remove()
    assert set(tower.layers) <= set(seen)
    valid = state.valid[:, :, None]
    torch.testing.assert_close(found * valid, wanted * valid, rtol=1e-4, atol=1e-4)


def test_what_is_not_known_runs_its_own_layers() -> None:
    tower = tower_of()
    layer: Any = tower.layers[1]
    assert why_not(layer) is None
    assert "there are fused layers for Llama" in str(why_not(tower_of("qwen3").layers[0]))
    handle = layer.mlp.register_forward_hook(lambda *given: None)
    assert why_not(layer) == "mlp has hooks or a forward of its own"
    handle.remove()
    layer.mlp.up_proj.weight.requires_grad_()
    assert why_not(layer) == "its weights are trained"
    layer.mlp.up_proj.weight.requires_grad_(False)
    layer.mlp.down_proj.bfloat16()
    assert why_not(layer) == (
        "its weights are torch.bfloat16 on cpu, torch.float32 on cpu; wanted one type of float64, float32, bfloat16 "
        "and float16 on one device"
    )
    layer.self_attn.q_proj = nn.Identity()
    assert why_not(layer) == "self_attn.q_proj is a Identity, wanted an unmodified Linear"


@pytest.mark.parametrize("why", ["autocast", "window", "irregular", "another release"])
def test_the_models_own_layers_take_its_place(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tower_of("mistral, narrow window" if why == "window" else "llama")
    state = tokens(tower)
    if why == "irregular":
        batch = make_batch(LENGTHS)
        state = tower.start(batch["input_ids"], batch["attention_mask"].flip(1)).measured()
    if why == "another release":
        monkeypatch.setattr(decoder, "rotate_heads", lambda rows, *given: rows.zero_())
    ran = []
    kind = type(tower.layers[0])
    monkeypatch.setattr(kind, "forward", lambda self, *a, real=kind.forward, **k: ran.append(1) or real(self, *a, **k))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
        tower.advance(state, 2, FUSED)
    assert len(ran) >= 2


def test_a_fused_layer_far_from_its_own_is_seen() -> None:
    tower = tower_of()
    layer = FrozenDecoderLayer(tower.layers[0])
    assert tower._fused_error(layer) < 1e-5
    layer.scale *= 2
    assert tower._fused_error(layer) > 1e-3
    with torch.no_grad():
        tower.layers[0].mlp.down_proj.weight.fill_(math.nan)  # pyright: ignore
    assert tower._fused_error(layer) == math.inf
