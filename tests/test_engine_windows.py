"""Fused Swin blocks against the blocks that they take the place of, alone and in whole models."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from epic_fast import EngineConfig, EpicConfig, MopeConfig, wrap
from epic_fast.backbones import swin
from epic_fast.engine import window_blocks
from epic_fast.engine.blocks import why_not
from epic_fast.engine.graphs import graphed, made_of_weights, prepared, to_bucket
from epic_fast.engine.packed import say_plain
from epic_fast.engine.routes import PromptRoute
from epic_fast.engine.window_blocks import (
    FrozenWindowBlock,
    WindowStream,
    before_routes,
    differs,
    joined,
    parted,
)
from epic_fast.engine.windows import Windows, call_swin_block_with_prompts
from epic_fast.ops import library
from epic_fast.ops import window_prompt_attention as operation
from epic_fast.ops.dispatch import Operation
from epic_fast.testing import tiny_bert, tiny_swin
from epic_fast.testing.numerics import assert_bits_equal, poisoned_empty
from epic_fast.testing.probes import lively, make_batch, perturb

GRIDS = {"whole": (8, 8), "padded": (6, 9), "one window": (4, 4)}
WINDOW = 4
EIGHT_BIT_ERROR = 2e-2


def block_of(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = lively(tiny_swin(image_size=64, window=WINDOW)).to(dtype).requires_grad_(False).eval()
    return model.encoder.layers[0].blocks[1]


def run(
    block: Any, fused: FrozenWindowBlock | None, windows: Windows, save: str, wants: tuple[bool, bool], **how: Any
) -> list[Tensor | None]:
    dtype, width = how.get("dtype", torch.float32), block.layernorm_before.normalized_shape[0]
    random = torch.Generator().manual_seed(1)
    count = windows.grid[0] * windows.grid[1]
    inputs = [torch.randn(3, rows, width, generator=random, dtype=torch.float64).to(dtype) for rows in (count, 5)]
    leaves = [each.requires_grad_(wanted) for each, wanted in zip(inputs, wants, strict=True)]
    if fused is None:
        outputs = call_swin_block_with_prompts(
            block, *leaves, windows.grid, window=windows.window, shift=windows.shift
        )  # fmt: skip
    else:
        outputs = fused(*leaves, windows, save=save)
    weights = [torch.randn(each.shape, generator=random, dtype=torch.float64).to(each.dtype) for each in outputs]
    total = sum((each * weight).sum() for each, weight in zip(outputs, weights, strict=True))
    if any(wants):
        assert isinstance(total, Tensor)
        total.backward()
    return [*(each.detach() for each in outputs), *(each.grad for each in leaves)]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("wants", [(True, True), (False, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("save", ["full", "recompute", "eight_bit"])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_block_and_its_gradients(grid: str, shift: int, save: str, wants: tuple[bool, bool]) -> None:
    if grid == "one window" and shift:
        pytest.skip("one window is not shifted")
    block, windows = block_of(torch.float64), Windows(GRIDS[grid], WINDOW, shift)
    assert why_not(block) is None
    wanted = run(block, None, windows, save, wants, dtype=torch.float64)
    found = run(block, FrozenWindowBlock(block), windows, save, wants, dtype=torch.float64)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            rounded = save == "eight_bit" and index > 1
            assert distance(one, other) <= (EIGHT_BIT_ERROR if rounded else 1e-12), (index, distance(one, other))


@pytest.mark.skipif(not library.TRITON_INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "by operators"])
@pytest.mark.parametrize("tokens", [True, False], ids=["all gradients", "prompts alone"])
def test_by_the_kernels(tokens: bool, direct: bool, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.interpreting():
        pytest.skip("Triton's interpreter is off: a GPU is there")
    block, windows = block_of(), Windows((8, 8), WINDOW, shift)
    wanted = run(block, None, windows, "full", (tokens, True))
    taken = []

    def choose(self: Any, impl: str, *args: Any) -> Any:
        taken.append(self.name)
        return self.triton

    monkeypatch.setattr(type(operation), "choose", choose)
    if not direct:
        monkeypatch.setattr(library, "unwatched", lambda: False)
    found = run(block, FrozenWindowBlock(block), windows, "full", (tokens, True))
    assert "window_prompt_attention" in taken
    assert [each is None for each in found] == [False, False, not tokens, False]
    for one, other in zip(found, wanted, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            assert distance(one, other) <= 1e-5


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
@pytest.mark.parametrize("size", [32, 40])
def test_a_tower_without_prompts(size: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels:
        if not library.TRITON_INSTALLED or not library.interpreting():
            pytest.skip("Triton's interpreter is off")
        monkeypatch.setattr(type(operation), "choose", lambda self, *args: self.triton)
    towers = lively((tiny_swin(image_size=size, depths=(2, 3)), tiny_bert(layers=2)))
    model = wrap(towers, MopeConfig(prompt_length=0), 3, self_check=False, engine=EngineConfig(blocks="fused")).eval()
    tower, pixels = model.backbone.vision, torch.randn(2, 3, size, size)
    seen = watch_alone(monkeypatch)
    wanted = tower.run(tower.start(pixels), tower.num_layers)
    assert not seen
    found = tower.advance(tower.start(pixels), tower.num_layers, model.engine)
    assert seen == tower.window_blocks(model.engine)
    assert (found.layer, found.grid) == (wanted.layer, wanted.grid)
    assert distance(found.hidden, wanted.hidden) <= 1e-5
    # With a gradient to pass on, the blocks' own modules run.
    seen.clear()
    state = tower.start(pixels)
    state.hidden.requires_grad_(True)
    tower.advance(state, tower.num_layers, model.engine).hidden.sum().backward()
    assert not seen
    assert state.hidden.grad is not None
    model.unwrap()


def watch_alone(monkeypatch: pytest.MonkeyPatch) -> list[FrozenWindowBlock]:
    """The blocks that ran without prompts, as they run."""
    seen: list[FrozenWindowBlock] = []
    real = WindowStream.step

    def watched(stream: WindowStream, block: FrozenWindowBlock, *others: Any) -> Any:
        if not stream.parted()[1].numel():
            seen.append(block)
        return real(stream, block, *others)

    monkeypatch.setattr(WindowStream, "step", watched)
    return seen


ROUTED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "the first of equal experts": {"top_k": 2},
    "routed by the text alone": {"router": "complement"},
    "one expert": {"num_experts": 1},
    "no static prompt": {"static_prompts": False},
    "no experts": {"dynamic_prompts": False},
    "no mapped prompt": {"mapped_prompts": 0},
    "two mapped prompts alone": {"mapped_prompts": 2, "static_prompts": False, "dynamic_prompts": False},
    "every layer": {"route_first_block": True},
    "from the second layer": {"first_layer": 1},
    "from the middle of a stage": {"first_layer": 3},
    "many experts": {"num_experts": 20},
}


@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("options", ROUTED.values(), ids=ROUTED)
def test_without_a_graph_prompts_are_made_where_they_lie(
    options: dict[str, Any], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As layer by layer: the routing of every layer, and the logits."""
    towers = lively((tiny_swin(image_size=size, depths=(2, 3)), tiny_bert(layers=2)))
    batch, found = make_batch([3, 5]), []
    batch["pixel_values"] = torch.randn(2, 3, size, size)
    routes: list[Any] = []
    real = WindowStream.step
    monkeypatch.setattr(WindowStream, "step", lambda *args: (routes.extend(args[3:4]), real(*args))[1])
    for engine in (None, EngineConfig(blocks="fused")):
        torch.manual_seed(0)
        # At the temperature of training one expert would have it all.
        config = MopeConfig(prompt_length=2, temperature=2.0, **options)
        model = perturb(wrap(towers, config, 3, self_check=False, engine=engine)).eval()
        routes.clear()
        with torch.no_grad():
            found.append([model(**batch).logits, *model.routing(**batch).values()])
        # Layer 0 has no prompts to write over where it is routed, and then layer by layer it is.
        routed = len(model.routed) - (config.first_layer in model.routed)
        assert sum(each is not None for each in routes) == (0 if engine is None else 2 * routed)
        model.train()
        routes.clear()
        model(**batch)
        assert not any(routes)
        with torch.no_grad():
            model(**batch)
        noisy = model.router is not None
        assert sum(each is not None for each in routes) == (0 if engine is None or noisy else routed)
        model.unwrap()
    assert len(found[0]) == len(found[1])
    assert all(distance(one, other) <= 1e-5 for one, other in zip(*found, strict=True))


def routed_model(size: int = 32, *, fused: bool = True) -> Any:
    engine = EngineConfig(blocks="fused") if fused else None
    torch.manual_seed(0)
    towers = lively((tiny_swin(image_size=size, depths=(2, 3)), tiny_bert(layers=2)))
    config = MopeConfig(prompt_length=2, temperature=2.0)
    return perturb(wrap(towers, config, 3, self_check=False, engine=engine)).eval()


def test_too_many_vectors_and_noise_are_routed_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, routes = make_batch([3, 5]), []
    real = WindowStream.step
    monkeypatch.setattr(WindowStream, "step", lambda *args: (routes.extend(args[3:4]), real(*args))[1])

    def routed(**options: Any) -> tuple[int, Tensor]:
        logits = []
        for engine in (None, EngineConfig(blocks="fused")):
            torch.manual_seed(0)
            towers = lively((tiny_swin(depths=(2, 3)), tiny_bert(layers=2)))
            config = MopeConfig(prompt_length=2, temperature=2.0, **options)
            model = perturb(wrap(towers, config, 3, self_check=False, engine=engine)).eval()
            routes.clear()
            with torch.no_grad():
                logits.append(model(**batch).logits)
        assert distance(logits[1], logits[0]) <= 1e-5
        return sum(each is not None for each in routes), model

    assert routed(router_main_size=17)[0] == 0
    assert routed(router_main_size=16)[0] == 3
    # A router that reads no rows has no vectors.
    found, model = routed(router_main_size=17, router="complement")
    assert found == 3
    # The router alone in training draws its noise, and goes without the fused way.
    model.router.train()
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, model(**batch).logits)
    assert sum(each is not None for each in routes) == 3


def test_under_autocast_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen products in autocast's type, everything else as without the fused blocks; float64 is the truth."""
    batch = make_batch([3, 5])
    plain, fused = routed_model(fused=False), routed_model()
    types: list[torch.dtype] = []
    product = window_blocks.product
    monkeypatch.setattr(
        window_blocks, "product", lambda rows, *given: (types.append(rows.dtype), product(rows, *given))[1]
    )
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # The first of these compares a block with its modules, in float32.
            fused(**batch)
            types.clear()
            narrow = {"plain": plain(**batch).logits, "fused": fused(**batch).logits}
            routing = {"plain": plain.routing(**batch), "fused": fused.routing(**batch)}
        exact = plain.double()
        wide = {name: each.double() if each.is_floating_point() else each for name, each in batch.items()}
        wanted, scores = exact(**wide).logits, exact.routing(**wide)
    assert set(types) == {torch.bfloat16}
    assert distance(narrow["fused"], wanted) <= 2 * distance(narrow["plain"], wanted)
    for layer, each in scores.items():
        found = {name: distance(given[layer], each) for name, given in routing.items()}
        assert found["fused"] <= 2 * found["plain"] + 2**-9
        assert routing["fused"][layer].dtype == routing["plain"][layer].dtype == torch.float32
    plain.unwrap()
    fused.unwrap()


@pytest.mark.parametrize("kind", ["hook", "hook before", "forward", "hooks on all modules"])
@pytest.mark.parametrize("part", ["experts.1", "router", "router.own.0", "mapper.projections.0"])
def test_hooks_and_other_modules_are_called_without_a_graph_too(part: str, kind: str) -> None:
    model, batch = routed_model(), make_batch([3, 5])
    calls: list[Any] = []
    module = model.get_submodule(part)

    def seen(which: Any, *given: Any) -> None:
        if which is module:
            calls.append(which)

    if kind == "hook":
        hook = module.register_forward_hook(seen)
    elif kind == "hook before":
        hook = module.register_forward_pre_hook(seen)
    elif kind == "forward":
        hook, real = None, module.forward
        module.forward = lambda *given, **options: (seen(module), real(*given, **options))[1]
    else:
        hook = torch.nn.modules.module.register_module_forward_hook(seen)
    logits = model(**batch).logits
    once = len(calls)
    with torch.no_grad():
        assert distance(model(**batch).logits, logits) <= 1e-5
        called = len(calls)
    if hook is not None:
        hook.remove()
    assert once > 0
    assert called == 2 * once
    if part in ("router.own.0", "mapper.projections.0"):
        # Another module in its place.
        parent, name = part.rsplit(".", 1)
        model.get_submodule(parent)[int(name)] = torch.nn.Sequential(module)
        with torch.no_grad():
            assert distance(model(**batch).logits, logits) <= 1e-5
    model.unwrap()


@pytest.mark.parametrize("prompts", [0, 2])
def test_what_a_run_through_the_blocks_hands_back(prompts: int) -> None:
    """Grid, widths and layer behind a stage in its middle, and behind its last layer, where patches are merged."""
    model = routed_model(40)
    tower, pixels = model.backbone.vision, torch.randn(2, 3, 40, 40)
    start = tower.start(pixels)
    given = torch.randn(2, prompts, start.hidden.shape[2])
    # Without the grid, as a prefix that was kept.
    for state in (start, dataclasses.replace(start, grid=None)):
        for stop in (1, 2, 4):
            run = swin.SwinRun(tower, tower.window_blocks(model.engine), state, given)
            plain, own = dataclasses.replace(start), given
            with torch.no_grad():
                for layer in range(stop):
                    run.step(layer)
                    plain, own = tower.run_prompted(plain, layer, own, "full")
            found, left = run.finish()
            assert (found.layer, found.grid) == (stop, plain.grid)
            assert left.shape == own.shape
            assert distance(found.hidden, plain.hidden) <= 1e-5
            assert not prompts or distance(left, own) <= 1e-5
    model.unwrap()


def test_a_run_keeps_no_tokens_that_it_handed_over() -> None:
    model = routed_model()
    tower = model.backbone.vision
    state = tower.start(torch.randn(2, 3, 32, 32))
    tokens = weakref.ref(state.hidden)
    run = swin.SwinRun(tower, tower.window_blocks(model.engine), state, torch.randn(2, 2, state.hidden.shape[2]))
    del state
    with torch.no_grad():
        run.step(0)
    assert tokens() is None
    model.unwrap()


@pytest.mark.parametrize("size", [32, 40])
def test_prompts_are_made_where_they_lie_by_the_kernels(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.TRITON_INSTALLED or not library.interpreting():
        pytest.skip("Triton's interpreter is off")
    batch = make_batch([3, 5]) | {"pixel_values": torch.randn(2, 3, size, size)}
    plain, fused = routed_model(size, fused=False), routed_model(size)
    seen: list[str] = []
    with torch.no_grad():
        wanted = plain(**batch).logits
        monkeypatch.setattr(Operation, "choose", lambda self, *given: (seen.append(self.name), self.triton)[1])
        assert distance(fused(**batch).logits, wanted) <= 1e-5
    assert set(seen) >= {"moved_norm_forward", "route_prompts", "probe_through"}
    plain.unwrap()
    fused.unwrap()


def test_the_sums_of_a_block_do_not_outlive_it() -> None:
    """While the MLP runs, nothing of the last block's rows is left."""
    model, batch = routed_model(), make_batch([3, 5])
    alive: list[int] = []
    terms: list[Any] = []
    with torch.no_grad():
        # The blocks are compared with their modules once.
        model(**batch)
    norm, product = window_blocks.moved_norm_forward, window_blocks.activated_product

    def noting(stream: Tensor, branch: Tensor | None, *others: Any, **options: Any) -> Any:
        terms.extend(weakref.ref(each) for each in (stream, branch) if each is not None)
        return norm(stream, branch, *others, **options)

    def counting(*given: Any) -> Any:
        alive.append(sum(each() is not None for each in terms))
        terms.clear()
        return product(*given)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(window_blocks, "moved_norm_forward", noting)
        patch.setattr(window_blocks, "activated_product", counting)
        model(**batch)
    # Each block's first sum is its second norm's stream.
    assert alive == [0] * 5
    model.unwrap()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("towers", "trained"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_towers_and_what_is_trained_may_be_of_different_types(
    towers: torch.dtype, trained: torch.dtype, autocast: bool
) -> None:
    found = []
    for engine in (None, EngineConfig(blocks="fused")):
        torch.manual_seed(0)
        pair = lively((tiny_swin(depths=(2, 3)), tiny_bert(layers=2)))
        config = MopeConfig(prompt_length=2, temperature=2.0)
        model = perturb(
            wrap(tuple(each.to(towers) for each in pair), config, 3, self_check=False, engine=engine)
        ).eval()
        for _, each in model.trainable_parameters():
            each.data = each.data.to(trained)
        model.router.embeddings = model.router.embeddings.to(trained)
        batch = make_batch([3, 5])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(model(**batch).logits)
        model.unwrap()
    exact = towers == torch.float64 or (towers == torch.float32 and not autocast)
    assert found[0].isfinite().all()
    assert distance(found[1], found[0]) <= (1e-5 if exact else 0.05)


PLAIN_PROCESS = """
import torch
from epic_fast import EngineConfig, MopeConfig, wrap
from epic_fast.ops import library
from epic_fast.testing import tiny_bert, tiny_swin
from epic_fast.testing.probes import lively, make_batch, perturb

assert not library.interpreting()
towers, found = lively((tiny_swin(image_size=40, depths=(2, 3)), tiny_bert(layers=2))), []
batch = {**make_batch([3, 5]), "pixel_values": torch.randn(2, 3, 40, 40)}
for engine in (None, EngineConfig(blocks="fused")):
    torch.manual_seed(0)
    config = MopeConfig(prompt_length=2, temperature=2.0)
    model = perturb(wrap(towers, config, 3, self_check=False, engine=engine)).eval()
    with torch.no_grad():
        found.append(model(**batch).logits)
    model(**batch, labels=torch.tensor([0, 1])).loss.backward()
    model.unwrap()
print(float((found[0] - found[1]).norm() / found[0].norm()))
"""


def test_without_the_interpreter_a_cpu_runs_fused_blocks_too() -> None:
    """As on a user's machine: in these tests Triton's interpreter would run a kernel that is called by mistake."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", PLAIN_PROCESS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) <= 1e-5


# -- prompts that end ------------------------------------------------------------------------------------------------


def fused_mope(
    size: int = 32,
    *,
    depths: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.float32,
    vision: Any = None,
    engine: EngineConfig | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """A MoPE with fused blocks, and a batch for it."""
    vision = tiny_swin(image_size=size, depths=depths) if vision is None else vision
    torch.manual_seed(0)
    config = MopeConfig(**{"prompt_length": 2, "temperature": 2.0, **options})
    engine = EngineConfig(blocks="fused") if engine is None else engine
    towers = lively((vision, tiny_bert(layers=2)))
    model = perturb(wrap(towers, config, 3, self_check=False, engine=engine)).eval().to(dtype)
    batch = make_batch([3, 5])
    batch["pixel_values"] = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4)).to(dtype)
    if hasattr(model.backbone.vision, "window_blocks"):
        # The first block is compared with its modules once.
        model.backbone.vision.window_blocks(engine)
    return model, batch


def ends_before(model: Any) -> list[int]:
    """Layers whose prompts end: those before a layer that asks a router's vectors, in the same stage."""
    if model.router is None or model.router.own is None:
        return []
    starts = {stage.start for stage in model.backbone.vision.stages}
    first = model.config.first_layer
    return [layer - 1 for layer in model.routed if layer > first and layer not in starts]


def steps_of(model: Any, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[bool]]:
    """Tokens and prompts behind each layer, as a look at them finds them, then all scores and the logits; and behind
    which layers prompts had ended."""
    found: list[Tensor] = []
    ended: list[bool] = []
    real = WindowStream.step

    def step(stream: WindowStream, *given: Any) -> Any:
        scores = real(stream, *given)
        ended.append(stream._ended is not None)
        # Below the first prompts there are none.
        found.extend(each.clone() for each in stream.parted() if each.numel())
        found.extend([] if scores is None else [scores])
        return scores

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(WindowStream, "step", step)
        logits = model(**batch).logits
    return [*found, logits], ended


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("options", ROUTED.values(), ids=ROUTED)
def test_prompts_that_end_change_nothing(
    options: dict[str, Any], size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind every layer the same tokens and prompts, and the same routing, as with all products done."""
    model, batch = fused_mope(size, dtype=dtype, **options)
    # What ended rows leave unwritten nobody reads.
    with poisoned_empty():
        found, ended = steps_of(model, batch)
    first, last = model.config.first_layer, model.backbone.vision.num_layers
    assert len(ended) == last
    assert [layer for layer in range(last) if ended[layer]] == ends_before(model)
    assert not any(ended[:first])
    monkeypatch.setattr(swin, "before_routes", lambda *given: {})
    wanted, nothing = steps_of(model, batch)
    assert not any(nothing)
    assert len(found) == len(wanted) > 2 * last - first
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert distance(one, other) <= (1e-12 if dtype == torch.float64 else 2e-6), number
    model.unwrap()


@pytest.mark.parametrize("size", [32, 40])
def test_a_run_cut_short_gives_prompts_that_had_ended(size: int) -> None:
    """In the middle of a stage, before the layer that would have replaced them."""
    model, batch = fused_mope(size, dtype=torch.float64)
    tower = model.backbone.vision
    state = tower.start(batch["pixel_values"])
    given = torch.randn(2, model.config.rows, state.hidden.shape[2], dtype=torch.float64)
    with torch.no_grad():
        other = torch.randn(2, 24, dtype=torch.float64)
        projected, mapped = model.router.project(other), model.mapper(other)
        routes = {1: model._route(1, projected, mapped)}
        run = swin.SwinRun(tower, tower.window_blocks(model.engine), state, given, routes)
        plain = swin.SwinRun(tower, tower.window_blocks(model.engine), state, given)
        run.step(0)
        plain.step(0)
        assert run._stream is not None
        assert run._stream._ended is not None
        for one, other in zip(run._stream.parted(), plain._stream.parted(), strict=True):
            assert distance(one, other) <= 1e-12
        (found, left), (wanted, own) = run.finish(), plain.finish()
        assert distance(left, own) <= 1e-12
        assert distance(found.hidden, wanted.hidden) <= 1e-12
        # To have looked at them changes nothing of what comes.
        assert run.step(1) is not None
    model.unwrap()


@pytest.mark.parametrize("depths", [(2, 3), (3, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"route_first_block": True}, {"first_layer": 1}, {"router": "complement"}, {"num_experts": 1}],
    ids=["as it is", "every layer", "from the second layer", "routed by the text alone", "one expert"],
)
@pytest.mark.parametrize("size", [32, 40])
def test_the_last_product_is_done_for_rows_that_somebody_reads(
    size: int, options: dict[str, Any], depths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = size * 2 ** (len(depths) - 2)
    model, batch = fused_mope(size, depths=depths, **options)
    tower = model.backbone.vision
    rows: list[int] = []
    places = {
        block.parts.weights(None, backward=False).down.data_ptr(): index
        for index, block in enumerate(tower.window_blocks(model.engine))
    }
    real = window_blocks.product

    def counting(hidden: Tensor, weight: Any, bias: Any) -> Any:
        if weight.data_ptr() in places:
            assert places[weight.data_ptr()] == len(rows)
            rows.append(len(hidden))
        return real(hidden, weight, bias)

    monkeypatch.setattr(window_blocks, "product", counting)
    with torch.no_grad():
        model(**batch)
    ends, wanted = ends_before(model), []
    side = size // 4
    for stage in tower.stages:
        for layer in range(stage.start, stage.stop):
            prompts = 0 if layer < model.config.first_layer or layer in ends else model.config.rows
            wanted.append(2 * (side * side + prompts))
        side = (side + 1) // 2
    assert rows == wanted
    # Never in the last layer of a stage or of the tower.
    assert not {stage.stop - 1 for stage in tower.stages} & set(ends)
    assert bool(ends) == ("router" not in options and "num_experts" not in options)
    model.unwrap()


def test_what_prompts_ended_with_is_let_go_behind_the_next_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fused_mope()
    with torch.no_grad():
        model(**batch)
    kept: list[StorageWeakRef] = []
    before: list[int] = []
    behind: list[int] = []
    up, norm, attend = window_blocks.activated_product, window_blocks.moved_norm_forward, window_blocks._attend

    def alive() -> int:
        return sum(not each.expired() for each in kept)

    def noting(*given: Any) -> Any:
        found = up(*given)
        kept.append(StorageWeakRef(found[0].untyped_storage()))
        return found

    def first(*given: Any, **options: Any) -> Any:
        if "branch_at" not in options:
            before.append(alive())
        return norm(*given, **options)

    def then(*given: Any, **options: Any) -> Any:
        behind.append(alive())
        return attend(*given, **options)

    monkeypatch.setattr(window_blocks, "activated_product", noting)
    monkeypatch.setattr(window_blocks, "moved_norm_forward", first)
    monkeypatch.setattr(window_blocks, "_attend", then)
    with torch.no_grad():
        model(**batch)
    assert [layer - 1 for layer, each in enumerate(before) if each] == ends_before(model) == [0, 2, 3]
    assert behind == [0] * 5
    assert alive() == 0
    model.unwrap()


@pytest.mark.parametrize("autocast", [False, True])
def test_what_goes_before_routes_is_of_the_block_before(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for the layers of a stage, however they are named; and the weights that products are done with."""
    model, _ = fused_mope(depths=(3, 1, 3))
    blocks = model.backbone.vision.window_blocks(model.engine)
    widths = [block.parts.weights(None, backward=False).down.shape[0] for block in blocks]

    def route(layer: int, probe: bool = True) -> PromptRoute:
        random = torch.Generator().manual_seed(layer)
        rows = torch.randn(2, widths[layer], generator=random) if probe else None
        return PromptRoute(None, None, None, probe=rows)

    routes = {layer: route(layer) for layer in (6, 1, 5, 2)}
    calls: list[int] = []
    real = window_blocks.probe_through

    def counting(probes: Any, weights: Any) -> Tensor:
        calls.append(len(probes))
        return real(probes, weights)

    monkeypatch.setattr(window_blocks, "probe_through", counting)
    dtype = torch.bfloat16 if autocast else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = before_routes(blocks, {**routes, 3: route(3, probe=False)}, torch.empty(1))
    assert sorted(calls) == [2, 2]
    assert sorted(found) == [0, 1, 4, 5]
    for layer, each in routes.items():
        weight = blocks[layer - 1].parts.weights(dtype, backward=False).down
        assert weight.dtype == dtype
        assert found[layer - 1].dtype == torch.float32
        assert each.probe is not None
        assert distance(found[layer - 1], each.probe.double() @ weight.double()) <= 1e-6
    assert before_routes(blocks, {3: route(3, probe=False)}, torch.empty(1)) == {}
    assert before_routes(blocks, {}, torch.empty(1)) == {}
    model.unwrap()


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"mapped_prompts": 2}], ids=["all", "two", "mapped"])
@pytest.mark.parametrize("size", [32, 40])
def test_gpu_a_replay_has_the_bits_of_a_call(size: int, options: dict[str, Any], autocast: bool) -> None:
    """Of new pictures and texts each time."""
    model = fused_mope(size, engine=EngineConfig(blocks="fused", graphs=True), **options)[0].cuda()
    call = graphed(model)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        for seed in range(4):
            given = {**make_batch([3, 5], seed=seed), "pixel_values": torch.randn(2, 3, size, size)}
            given = {name: each.cuda() for name, each in given.items()}
            found = call(**given).logits.clone()
            wanted = model(**prepared(model, to_bucket(given, 16))).logits
            assert_bits_equal(found, wanted, f"batch {seed}")
    assert call.cache.refused is None
    assert call.cache.captures == 1
    model.unwrap()


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"num_experts": 1}], ids=["all", "two", "one"])
def test_gpu_prompts_are_made_where_they_lie(options: dict[str, Any], size: int, captured: bool) -> None:
    towers = lively((tiny_swin(image_size=size, depths=(2, 3)), tiny_bert(layers=2)))
    batch, logits = make_batch([3, 5]), {}
    batch["pixel_values"] = torch.randn(2, 3, size, size)
    for name, engine, dtype in (
        ("exact", None, torch.float64),
        ("plain", None, torch.bfloat16),
        ("fused", EngineConfig(blocks="fused", graphs=captured), torch.bfloat16),
    ):
        torch.manual_seed(0)
        own = tuple(copy.deepcopy(each).to(dtype) for each in towers)
        config = MopeConfig(prompt_length=2, temperature=2.0, **options)
        model = perturb(wrap(own, config, 3, self_check=False, engine=engine))
        model = (model.double() if dtype == torch.float64 else model).cuda().eval()
        given = {key: each.cuda() for key, each in batch.items()}
        with torch.no_grad():
            logits[name] = model(**given).logits.clone()
            assert torch.equal(model(**given).logits, logits[name])
        model.unwrap()
    assert distance(logits["fused"], logits["exact"]) <= 2 * distance(logits["plain"], logits["exact"])


@pytest.mark.parametrize(
    ("config", "below", "without_graph"),
    [
        (MopeConfig(first_layer=2, prompt_length=2), [0, 1], [0, 1]),
        (EpicConfig(layer_pairs=[(0, 2), (1, 4)]), [0, 1], [0, 1, 3]),
        (MopeConfig(), [], []),
    ],
    ids=["MoPE in the upper stage", "EPIC at two layers", "MoPE"],
)
def test_layers_without_prompts_run_fused(
    config: Any, below: list[int], without_graph: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    towers = lively((tiny_swin(image_size=32, depths=(2, 3)), tiny_bert(layers=2)))
    batch, found = make_batch([3, 5]), {}
    seen = watch_alone(monkeypatch)
    for engine in (None, EngineConfig(blocks="fused")):
        torch.manual_seed(0)
        model = perturb(wrap(towers, config, 3, self_check=False, engine=engine)).eval()
        blocks = model.backbone.vision.window_blocks(engine)
        logits = model(**batch).logits
        # In a graph, the layers between those with prompts are the backbone's own.
        assert seen == ([] if blocks is None else [blocks[layer] for layer in below])
        seen.clear()
        logits.sum().backward()
        with torch.no_grad():
            again = model(**batch).logits
        assert seen == ([] if blocks is None else [blocks[layer] for layer in without_graph])
        seen.clear()
        grads = [each.grad for each in model.parameters() if each.grad is not None]
        found[engine is not None] = [logits.detach(), again, *grads]
        model.zero_grad()
        model.unwrap()
    assert len(found[True]) == len(found[False]) > 5
    assert all(distance(one, other) <= 1e-4 for one, other in zip(found[True], found[False], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("size", [32, 40])
def test_gpu_a_tower_without_prompts(size: int, captured: bool) -> None:
    towers = lively((tiny_swin(image_size=size, depths=(2, 3)), tiny_bert(layers=2)))
    model = wrap(towers, MopeConfig(prompt_length=0), 3, self_check=False, engine=EngineConfig(blocks="fused")).eval()
    exact = copy.deepcopy(model.backbone.vision.model).double()
    model.to("cuda", torch.bfloat16)
    tower, pixels = model.backbone.vision, torch.randn(4, 3, size, size)
    given = pixels.to("cuda", torch.bfloat16)

    def features() -> Tensor:
        return tower.pool(tower.advance(tower.start(given), tower.num_layers, model.engine))

    with torch.no_grad():
        wanted = exact(given.double().cpu()).pooler_output
        plain = tower.pool(tower.run(tower.start(given), tower.num_layers))
        found = features()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = features()
            graph.replay()
            assert torch.equal(replayed, found)
    assert distance(found.cpu(), wanted) <= 2 * distance(plain.cpu(), wanted)
    model.unwrap()


def test_the_bias_is_that_of_the_table() -> None:
    block = block_of()
    fused = FrozenWindowBlock(block)
    before = fused.bias()
    assert torch.equal(before, block.attention.relative_position_bias()[0])
    assert fused.bias() is before
    block.attention.relative_position_bias.relative_position_bias_table.add_(1.0)
    assert torch.equal(fused.bias(), before + 1.0)


def test_a_trained_table_is_no_frozen_block() -> None:
    block = block_of()
    fused = FrozenWindowBlock(block)
    assert fused.parts.unchanged()
    block.attention.relative_position_bias.relative_position_bias_table.requires_grad_(True)
    assert not fused.parts.unchanged()
    assert why_not(block) == "its weights are trained"


def test_a_model_made_in_inference_mode_runs_its_own_blocks() -> None:
    with torch.inference_mode():
        block = tiny_swin().eval().encoder.layers[0].blocks[0].requires_grad_(False)
    assert "inference mode" in str(why_not(block))


def test_without_a_graph_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    block, windows = block_of(), Windows((8, 8), WINDOW, 2)
    fused = FrozenWindowBlock(block)
    kept: list[Any] = []
    real = window_blocks.activated_product

    def watched(*args: Any) -> Any:
        kept.append(args[-1])
        return real(*args)

    monkeypatch.setattr(window_blocks, "activated_product", watched)
    run(block, fused, windows, "eight_bit", (False, False))
    assert kept == ["none"]
    with torch.no_grad():
        run_inputs = [torch.randn(2, rows, 16, requires_grad=True) for rows in (64, 5)]
        assert not any(each.requires_grad for each in fused(*run_inputs, windows, save="eight_bit"))
    assert kept == ["none"] * 2
    run(block, fused, windows, "eight_bit", (False, True))
    assert kept[2:] == ["eight_bit"]


def test_a_graph_holds_the_rows_that_it_gathers() -> None:
    """Replays read the very tensors of the capture, however many sizes came since."""
    block, windows = FrozenWindowBlock(block_of()), Windows((8, 8), WINDOW, 2)
    hidden, prompts = torch.randn(2, 64, 16), torch.randn(2, 3, 16)
    block(hidden, prompts, windows)
    used = windows.rows(2, 3, hidden.device), windows.mask(hidden.device)
    held = block.made()[-1]
    for batch in range(3, 3 + 2 * window_blocks.MOST_READ):
        block(torch.randn(batch, 64, 16), torch.randn(batch, 3, 16), windows)
        # What is used again stays.
        block(torch.randn(3, 64, 16), torch.randn(3, 3, 16), windows)
    assert any(key[1].batch == 3 for key in block.made()[-1])
    (rows, mask), *others = held.values()
    assert rows.place is used[0].place
    assert mask is used[1]
    assert not others
    assert len(block.made()[-1]) == window_blocks.MOST_READ


def test_outputs_are_nobodys_views_and_gradients_keep_no_others() -> None:
    block, windows = FrozenWindowBlock(block_of()), Windows((8, 8), WINDOW, 2)
    hidden = torch.randn(2, 64, 16, requires_grad=True)
    prompts = torch.randn(2, 3, 16, requires_grad=True)
    tokens, own = block(hidden, prompts, windows)
    wanted = (tokens * 2).sum() + (own * 3).sum()
    tokens.mul_(2)
    own.mul_(3)
    assert torch.equal(tokens.sum() + own.sum(), wanted)
    (tokens.sum() + own.sum()).backward()
    assert prompts.grad is not None
    assert prompts.grad.untyped_storage().nbytes() == prompts.grad.nbytes


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (4, 12)])
@pytest.mark.parametrize("prompts", [0, 3])
def test_rows_are_cut_and_joined_all_at_once(grid: tuple[int, int], shift: int, prompts: int) -> None:
    """By one gather what padding, rolling and cutting do to tokens; prompts stay behind them."""
    windows, batch, tokens = Windows.of(grid, WINDOW, shift), 2, grid[0] * grid[1]
    hidden, own = torch.randn(batch, tokens, 5), torch.randn(batch, prompts, 5)
    order = windows.rows(batch, prompts, hidden.device)
    rows = joined(hidden, own)
    cut = order.cut(rows)
    wanted = windows.cut(hidden).flatten(0, 1)
    assert torch.equal(cut[: order.cut_tokens], wanted)
    assert torch.equal(cut[order.cut_tokens :], own.flatten(0, 1))
    assert (order.source is None) == any(side % WINDOW for side in grid)
    assert torch.equal(cut[order.place], rows)
    for found, given in zip(parted(rows, hidden, own), (hidden, own), strict=True):
        assert torch.equal(found, given)


def test_rows_are_joined_in_memory_of_their_own() -> None:
    """Whatever is written into tokens or prompts later, what a block saved of them stays; without prompts it is the
    tokens that are saved, and autograd sees who writes into them."""
    rows = torch.randn(2 * 6 + 2 * 3, 5)
    hidden, own = parted(rows, torch.empty(2, 6, 5), torch.empty(2, 3, 5))
    for others in (own, own.clone(), own.transpose(0, 1).clone().transpose(0, 1), own[:, :2]):
        found = joined(hidden, others)
        assert found.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr()
        assert torch.equal(found[:12], hidden.reshape(-1, 5))
        assert torch.equal(found[12:], others.reshape(-1, 5))
    assert joined(hidden, own[:, :0]).data_ptr() == hidden.data_ptr()
    apart = hidden.transpose(0, 1).clone().transpose(0, 1)
    assert torch.equal(joined(apart, own[:, :0]), hidden.reshape(-1, 5))


def test_a_graph_holds_what_the_blocks_made() -> None:
    _, model = models(MopeConfig(num_experts=2, prompt_length=2))
    assert made_of_weights(model)[1] == []
    model(**make_batch([3, 9], width=12))
    held = made_of_weights(model)[1]
    biases = [block._bias for block in model.backbone.vision.window_blocks(model.engine)]
    assert len(biases) == 5
    assert all(any(each is bias for each in held) for bias in biases)


def test_a_block_that_computes_something_else_is_found() -> None:
    block = block_of()
    assert differs(block, FrozenWindowBlock(block)) < 1e-5
    other = copy.deepcopy(block)
    other.attention.scaling *= 2
    assert differs(other, FrozenWindowBlock(block)) > 0.01


def models(config: Any, **engine: Any) -> list[Any]:
    made = []
    for each in (None, EngineConfig(blocks="fused", **engine)):
        torch.manual_seed(0)
        backbone = (lively(tiny_swin(depths=(2, 3))), tiny_bert())
        made.append(perturb(wrap(backbone, config, 3, engine=each)).train())
    return made


@pytest.mark.parametrize("save", ["full", "recompute"])
@pytest.mark.parametrize(
    "config",
    [
        MopeConfig(num_experts=3, prompt_length=2, prompt_dropout=0.0, router_noise_std=0.0),
        EpicConfig(prompt_length=2, num_layer_pairs=2, head_dropout=0.0),
    ],
    ids=["mope", "epic"],
)
def test_a_model_with_fused_blocks_is_the_plain_one(config: Any, save: str) -> None:
    batch = make_batch([3, 9, 5], width=12)
    results = []
    for model in models(config, save=save):
        output = model(**batch, labels=torch.tensor([0, 2, 1]))
        output.loss.backward()
        grads = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
        results.append((output.logits.detach(), grads))
    (wanted, wanted_grads), (found, grads) = results
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for name, grad in wanted_grads.items():
        if grad is None:
            assert grads[name] is None
        else:
            torch.testing.assert_close(
                grads[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_the_fused_blocks_run_and_a_changed_layer_does_not(caplog: pytest.LogCaptureFixture) -> None:
    config = MopeConfig(num_experts=2, prompt_length=2)
    _, model = models(config)
    ran: list[str] = []
    for kind in {type(layer) for layer in model.backbone.vision.layers}:
        assert kind.__name__ == "SwinLayer"
    layer = model.backbone.vision.layers[0]
    blocks = model.backbone.vision.window_blocks(model.engine)
    assert len(blocks) == 5
    assert model.backbone.vision.window_blocks(model.engine) is blocks
    say_plain.cache_clear()
    handle = layer.register_forward_hook(lambda *_: ran.append("hook"))
    with caplog.at_level("INFO", logger="epic_fast"):
        assert model.backbone.vision.window_blocks(model.engine) is None
    assert "has hooks" in caplog.text
    handle.remove()
    assert model.backbone.vision.window_blocks(model.engine) is not None
    assert model.backbone.vision.window_blocks(None) is None


def test_windows_in_eight_bits_are_said_not_to_be(caplog: pytest.LogCaptureFixture) -> None:
    _, exact = models(MopeConfig(num_experts=2, prompt_length=2))
    _, model = models(MopeConfig(num_experts=2, prompt_length=2), weights="fp8")
    swin.say_exact.cache_clear()
    with caplog.at_level("INFO", logger="epic_fast"):
        assert model.backbone.vision.window_blocks(model.engine) is not None
    assert "windows have no 8 bits" in caplog.text
    swin.say_exact.cache_clear()
    caplog.clear()
    exact.backbone.vision.window_blocks(exact.engine)
    assert not caplog.text
