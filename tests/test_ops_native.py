"""The compiled way of planned calls: it does what Python does, and hands back to Python what it does not know."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.functional import prompt_attention, prompt_interaction
from epic_fast.ops import library, native
from epic_fast.ops import prompt_attention as attention_operation
from epic_fast.ops import prompt_interaction as interaction_operation
from epic_fast.testing.cases import AttentionCase, InteractionCase
from epic_fast.testing.numerics import assert_bits_equal

if not library.TRITON_INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

from epic_fast.kernels.common import driver, plan  # pyright: ignore[reportMissingImports]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARGUMENTS = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_int, *ARGUMENTS)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Built once, for all processes that test it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EPIC_FAST_NATIVE", raising=False)
        patch.setenv("EPIC_FAST_CACHE", str(tmp_path_factory.getbasetemp().parent / "epic_fast"))
        native.build()
        yield native.find()
    native.find.cache_clear()
    plan.forget()


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    for operation in (attention_operation, interaction_operation):
        assert operation.repeats is not None
        operation.repeats._known.clear()


class Driver:
    """``cuLaunchKernel`` for kernels on the CPU: a function's handle is its place in ``kernels``, from 1."""

    def __init__(self, sizes: list[int], *kernels: Callable[..., None]) -> None:
        self.sizes, self.kernels = sizes, kernels
        self.launched: list[tuple[int, ...]] = []
        self.entered: list[int] = []
        self.stream = 7
        self.statuses: list[int] = []
        self._launch = SIGNATURE(self._launched)

    @property
    def address(self) -> int:
        return ctypes.cast(self._launch, ctypes.c_void_p).value or 0

    def _launched(self, function: int, *given: Any) -> int:
        if self.statuses:
            return self.statuses.pop(0)
        *grid, shared, stream, parameters, extra = given
        assert extra is None
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        values = [
            int.from_bytes(ctypes.string_at(pointers[index], size), "little") for index, size in enumerate(self.sizes)
        ]  # fmt: skip
        self.launched.append((function, *grid, shared, stream))
        self.kernels[function - 1](*values)
        return 0

    def plan(
        self,
        module: Any,
        *,
        given: int,
        made: list[tuple[Any, ...]],
        launches: list[tuple[Any, ...]],
        results: list[int],
        scratch: tuple[int, list[int]] = (0, []),
    ) -> Any:
        return module.Plan(
            "cpu",
            given,
            made,
            *scratch,
            launches,
            results,
            self.address,
            lambda index: self.stream,
            self.entered.append,
        )


def numbers(address: int, count: int) -> Any:
    return (ctypes.c_float * count).from_address(address)


# -- plans ------------------------------------------------------------------------------------------------------------


def add(left: int, right: int, count: int, into: int) -> None:
    for index in range(count):
        numbers(into, count)[index] = numbers(left, count)[index] + numbers(right, count)[index]


def test_a_plan_launches_with_addresses_and_values_where_they_belong(module: Any) -> None:
    """(x + y) goes into scratch, and (x + scratch) into the second of two results."""
    made = Driver([8, 8, 4, 8], add, add)
    run = made.plan(
        module,
        given=2,
        made=[((3,), (1,), torch.float16), ((2, 2), (1, 2), torch.float32)],
        scratch=(512, [0, 256]),
        launches=[(1, 5, 128, 64, [1, 2, -1, 6], [0, 0, 4, 0]), (2, 9, 32, 0, [1, 6, -1, 4], [0, 0, 4, 0])],
        results=[4, 0, 2, 3],
    )
    x, y = torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 30, 40])
    total, nothing, same, half = run.run([x, y])
    # Memory of strides (1, 2), in the order in which it lies.
    assert total.t().flatten().tolist() == [12.0, 24, 36, 48]
    assert (total.shape, total.stride(), total.dtype) == ((2, 2), (1, 2), torch.float32)
    assert nothing is None
    assert same is y
    assert not total.requires_grad
    assert (half.shape, half.dtype) == ((3,), torch.float16)
    assert made.launched == [(1, 5, 1, 1, 128, 1, 1, 64, 7), (2, 9, 1, 1, 32, 1, 1, 0, 7)]


def test_a_thread_without_the_cards_context_enters_it_and_launches_again(module: Any) -> None:
    made = Driver([8, 8, 4, 8], add)
    run = made.plan(
        module,
        given=1,
        made=[((2,), (1,), torch.float32)],
        launches=[(1, 1, 32, 0, [1, 1, -1, 2], [0, 0, 2, 0])],
        results=[2],
    )
    made.statuses = [201]
    assert run.run([torch.tensor([1.0, 2])])[0].tolist() == [2.0, 4]
    assert made.entered == [-1]
    made.statuses = [700]
    assert run.run([torch.tensor([1.0, 2])]) == 700


def test_memory_that_is_not_there_is_an_error_and_nothing_is_launched(module: Any) -> None:
    made = Driver([8], add)
    run = made.plan(
        module, given=1, made=[((2**60,), (1,), torch.uint8)], launches=[(1, 1, 32, 0, [2], [0])], results=[2]
    )
    with pytest.raises(RuntimeError, match="memory"):
        run.run([torch.ones(1)])
    assert not made.launched


def test_a_prepared_launch_says_in_numbers_what_it_hands_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(cuFuncGetParamInfo=None, cuLaunchKernel=None)
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(driver, "_sizes", lambda info, function: [8, 4, 4, 8, 8, 8])
    kinds = {"a": "*bf16", "n": "i32", "eps": "fp32", "far": "i64", "WIDE": "constexpr"}
    metadata = SimpleNamespace(num_warps=4, shared=64)
    compiled = SimpleNamespace(function=77, metadata=metadata, src=SimpleNamespace(signature=kinds))
    launch = driver.prepared(compiled, 0, 6, [3], [-2, 0.5, 2**40, 16], driver.Places(4))
    assert launch is not None
    half = int.from_bytes(bytes(ctypes.c_float(0.5)), "little")
    wanted = driver.Fields(77, 6, 128, 64, [3, -1, -1, -1, -1, -1], [0, 2**32 - 2, half, 2**40, 0, 0])
    assert launch.fields == wanted


# -- calls ------------------------------------------------------------------------------------------------------------


class Product:
    """y = w x and z = w + x, which saves both and y; its kernels are Python, its plans compiled."""

    generation = 0

    def __init__(self, module: Any) -> None:
        self.python: list[str] = []
        self.needs: list[tuple[bool, ...]] = []
        self.factors: list[float] = []
        forward = Driver([8, 8, 8, 8], self._forward)
        backward = Driver([8, 8, 8, 8, 8, 8, 8], self._backward)
        self.drivers = forward, backward
        made = [((4,), (1,), torch.float32)] * 2
        self.plans = {
            "forward": forward.plan(
                module, given=2, made=made, launches=[(1, 1, 1, 1, [1, 2, 3, 4], [0] * 4)], results=[3, 4]
            )
        }
        # Of both gradients, and of that of y alone.
        for both in (True, False):
            given = 5 if both else 4
            places = [1, 2 if both else 0, given - 2, given - 1, given, given + 1, given + 2]
            launches = [(1, 1, 1, 1, places, [0] * 7)]
            self.plans[f"backward {both}"] = backward.plan(
                module, given=given, made=made, launches=launches, results=[given + 1, 0, given + 2]
            )

    @staticmethod
    def _forward(w: int, x: int, y: int, z: int) -> None:
        for index in range(4):
            numbers(y, 4)[index] = numbers(w, 4)[index] * numbers(x, 4)[index]
            numbers(z, 4)[index] = numbers(w, 4)[index] + numbers(x, 4)[index]

    @staticmethod
    def _backward(dy: int, dz: int, w: int, x: int, y: int, dw: int, dx: int) -> None:
        for index in range(4):
            more = numbers(dz, 4)[index] if dz else 0.0
            # By y = w x, so that what is saved of the results is read.
            numbers(dw, 4)[index] = numbers(dy, 4)[index] * numbers(y, 4)[index] / numbers(w, 4)[index] + more
            numbers(dx, 4)[index] = numbers(dy, 4)[index] * numbers(y, 4)[index] / numbers(x, 4)[index] + more

    @contextmanager
    def noting(self) -> Iterator[list[Any]]:
        self.noted: list[Any] = []
        yield self.noted

    def _run(self, which: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        self.python.append(which)
        made = SimpleNamespace(native=self.plans.get(which), is_ready=True)
        results = made.native.run(tensors)
        if isinstance(results, int):
            raise RuntimeError(f"error {results}")
        self.noted.append((made, results))
        return results

    def forward(self, ctx: Any, w: Tensor, absent: None, x: Tensor, factor: float, known: Any, direct: bool) -> Any:
        y, z = self._run("forward", [w, x])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, x, y, None)
        ctx.factor, ctx.known = factor, known
        return y, None, z

    def backward(self, ctx: Any, dy: Tensor | None, nothing: None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        assert nothing is None
        self.factors.append(ctx.factor)
        assert ctx.saved_tensors[3] is None
        grads = [each for each in (dy, dz) if each is not None]
        if torch.is_grad_enabled():
            return torch.autograd.function.once_differentiable(self._gradients)(ctx, *grads)
        return self._gradients(ctx, *grads)

    def _gradients(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        self.needs.append(ctx.needs_input_grad)
        w, x, y, _ = ctx.saved_tensors
        contiguous = [each.contiguous() for each in grads]
        if any(a is not b for a, b in zip(grads, contiguous, strict=True)):
            # A plan that copies first is none that the compiled part can run.
            found = self._run(f"backward {len(grads) == 2}", [*contiguous, w, x, y])
            self.noted[-1][0].native = None
        else:
            found = self._run(f"backward {len(grads) == 2}", [*grads, w, x, y])
        return tuple([each if need else None for each, need in zip(found, self.needs[-1], strict=True)])


class Known:
    def __init__(self) -> None:
        self.calls: dict[Any, Any] = {}


@pytest.fixture
def product(module: Any, monkeypatch: pytest.MonkeyPatch) -> Product:
    made = Product(module)
    monkeypatch.setattr(native, "_plan_module", lambda: made)
    return made


def call(product: Product, known: Any, w: Tensor, x: Tensor, factor: float = 3.0) -> tuple[Tensor, Tensor]:
    found = native.applied(product, known, (w, None, x), (factor,), gradients=3)
    assert found is not None
    assert found[1] is None
    y, _, z = found
    assert y is not None
    assert z is not None
    return y, z


def leaves() -> tuple[Tensor, Tensor]:
    return torch.tensor([1.0, 2, 3, 4], requires_grad=True), torch.tensor([5.0, 6, 7, 8], requires_grad=True)


def plans(known: Any) -> tuple[bool, int]:
    (made,) = known.calls.values()
    return made._native.plans()


def test_after_the_first_time_python_is_left_out(product: Product) -> None:
    known = Known()
    for time in range(3):
        w, x = leaves()
        y, z = call(product, known, w, x)
        assert (y.tolist(), z.tolist()) == ([5.0, 12, 21, 32], [6.0, 8, 10, 12])
        torch.autograd.backward([y, z], [torch.full((4,), 2.0), torch.full((4,), 0.5)])
        assert w.grad is not None
        assert x.grad is not None
        assert w.grad.tolist() == [10.5, 12.5, 14.5, 16.5]
        assert x.grad.tolist() == [2.5, 4.5, 6.5, 8.5]
        assert product.python == ["forward", "backward True"], time
        assert plans(known) == (True, 1), time
    assert [len(each.launched) for each in product.drivers] == [3, 3]


def test_gradients_that_arrive_otherwise_are_another_plan(product: Product) -> None:
    known = Known()
    for _repeat in range(2):
        for which, arrive in enumerate((["y"], ["y", "z"])):
            w, x = leaves()
            y, z = call(product, known, w, x)
            outputs = [y, z][: len(arrive)]
            torch.autograd.backward(outputs, [torch.ones(4)] * len(arrive))
            assert w.grad is not None
            assert w.grad.tolist() == [5.0 + which, 6.0 + which, 7.0 + which, 8.0 + which]
    assert product.python == ["forward", "backward False", "backward True"]
    # Strides that the plan was not made for go to Python, every time, because it has to copy them.
    for _ in range(2):
        w, x = leaves()
        call(product, known, w, x)[0].backward(torch.ones(1).expand(4))
        assert w.grad is not None
        assert w.grad.tolist() == [5.0, 6, 7, 8]
    assert product.python[3:] == ["backward False"] * 2
    assert plans(known) == (True, 2)


def test_only_what_needs_a_gradient_gets_one(product: Product) -> None:
    known = Known()
    for _ in range(2):
        w, x = leaves()
        x.requires_grad_(False)
        call(product, known, w, x)[0].backward(torch.ones(4))
        assert w.grad is not None
        assert x.grad is None
        w, x = leaves()
        (found,) = torch.autograd.grad(call(product, known, w, x)[0], x, torch.ones(4))
        assert found.tolist() == [1.0, 2, 3, 4]
    assert product.needs == [(True, False, False), (False, False, True)]
    assert product.python == ["forward", "backward False", "backward False"]


def test_an_odd_address_goes_to_python(product: Product) -> None:
    known = Known()
    call(product, known, *leaves())
    w = torch.arange(5.0)[1:].requires_grad_()
    assert w.data_ptr() % 16
    y, _ = call(product, known, w, leaves()[1])
    assert y.tolist() == [5.0, 12, 21, 32]
    assert product.python == ["forward", "forward"]
    y.backward(torch.ones(4))
    assert product.python[2:] == ["backward False"]
    assert plans(known) == (True, 0)


def test_a_changed_input_is_noticed(product: Product) -> None:
    known = Known()
    for _ in range(2):
        w, x = leaves()
        y, _ = call(product, known, w, x)
        with torch.no_grad():
            w += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    y, _ = call(product, known, *leaves())
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_a_second_derivative_is_refused_and_not_wrong(product: Product) -> None:
    known = Known()
    for _ in range(2):
        w, x = leaves()
        y, _ = call(product, known, w, x)
        (first,) = torch.autograd.grad(y, w, torch.ones(4, requires_grad=True), create_graph=True)
        assert first.tolist() == [5.0, 6, 7, 8]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_hooks_on_saved_tensors_are_asked(product: Product) -> None:
    known = Known()
    call(product, known, *leaves())[0].backward(torch.ones(4))
    packed: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor.reshape(2, 2).t()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.t().reshape(4).clone()):
        w, x = leaves()
        y, _ = call(product, known, w, x)
    y.backward(torch.ones(4))
    assert packed == [(4,)] * 3
    assert w.grad is not None
    assert w.grad.tolist() == [5.0, 6, 7, 8]
    # A hook that gives other tensors back than were saved.
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor.double().float()[:4]):
        y, _ = call(product, known, *leaves())
    y.backward(torch.ones(4))


def test_a_hook_that_gives_other_strides_goes_to_python(product: Product) -> None:
    known = Known()
    call(product, known, *leaves())[0].backward(torch.ones(4))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: torch.stack([tensor] * 2, 1)):
        y, _ = call(product, known, *leaves())
    with pytest.raises(AssertionError, match="a hook's"):
        product_backward_sees(product, y)
    assert product.python == ["forward", "backward False"]


def product_backward_sees(product: Product, y: Tensor) -> None:
    def seen(ctx: Any, *grads: Any) -> None:
        assert ctx.saved_tensors[0].dim() == 1, "a hook's"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "backward", seen)
        y.backward(torch.ones(4))


def test_options_and_precision_and_plans_are_part_of_the_kind(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    known = Known()
    for factor in (3.0, 4.0, 3.0, 4.0):
        call(product, known, *leaves(), factor)[0].backward(torch.ones(4))
    assert product.python == ["forward", "backward False"] * 2
    assert product.factors == [3.0, 4.0]
    # Everything that was planned is forgotten.
    monkeypatch.setattr(product, "generation", 1)
    call(product, known, *leaves())[0].backward(torch.ones(4))
    y, _ = call(product, known, *leaves())
    assert product.python[4:] == ["forward", "backward False"]
    # Products in float32 are to be made otherwise from now on, in a backward pass as well.
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        y.backward(torch.ones(4))
        call(product, known, *leaves())
        assert product.python[6:] == ["backward False", "forward"]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    # A scale that is another one at every step does not fill the memory.
    for step in range(100):
        call(product, known, *leaves(), float(step))
    assert len(known.calls) <= native.MOST_CALLS


def test_a_refused_launch_is_pythons_error(product: Product) -> None:
    known = Known()
    call(product, known, *leaves())[0].backward(torch.ones(4))
    forward, backward = product.drivers
    forward.statuses = [700, 700]
    with pytest.raises(RuntimeError, match="error 700"):
        call(product, known, *leaves())
    y, _ = call(product, known, *leaves())
    backward.statuses = [700, 700]
    with pytest.raises(RuntimeError, match="error 700"):
        y.backward(torch.ones(4))


def test_whoever_watches_sees_python(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known()
    w, x = leaves()
    y, _ = call(product, known, w, x)
    y.backward(torch.ones(4))
    y, _ = call(product, known, w, x)
    monkeypatch.setattr(library, "unwatched", lambda: False)
    y.backward(torch.ones(4))
    assert product.python == ["forward", "backward False", "backward False"]
    monkeypatch.setattr(native, "_is_watched", lambda: True)
    assert native.applied(product, known, (w, None, x), (3.0,), gradients=3) is None


def test_a_node_keeps_what_it_needs_and_nothing_longer(product: Product) -> None:
    known = Known()
    w, x = leaves()
    y = call(product, known, w, x)[0]
    (made,) = known.calls.values()
    kind, gone = weakref.ref(made._kind), weakref.ref(known)
    del known, made
    gc.collect()
    assert gone() is None
    assert kind() is not None
    y.backward(torch.ones(4))
    assert w.grad is not None
    assert w.grad.tolist() == [5.0, 6, 7, 8]
    del y
    gc.collect()
    assert kind() is None


def test_errors_keep_their_types(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise ConfigError("not this one")

    known = Known()
    y, _ = call(product, known, *leaves())
    monkeypatch.setattr(product, "backward", refuse)
    with pytest.raises(ConfigError, match="not this one"):
        y.sum().backward()
    monkeypatch.setattr(product, "forward", refuse)
    with pytest.raises(ConfigError, match="not this one"):
        call(product, Known(), *leaves())


def test_several_threads_at_once(product: Product) -> None:
    known = Known()
    call(product, known, *leaves())[0].backward(torch.ones(4))
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for _ in range(50):
            w, x = (each.detach().mul(seed).requires_grad_() for each in leaves())
            call(product, known, w, x)[0].backward(torch.ones(4))
            assert w.grad is not None
            if w.grad.tolist() != [seed * each for each in (5.0, 6, 7, 8)]:
                wrong.append(w.grad)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3, 4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    assert product.python == ["forward", "backward False"]


# -- the operations ---------------------------------------------------------------------------------------------------

ATTENTION = [
    ({}, AttentionCase(2, 2, 9, 3, 16)),
    ({"causal": True}, AttentionCase(2, 2, 9, 3, 16, prefix_tuning=True)),
    ({"prompt_mask": "prefix"}, AttentionCase(2, 2, 9, 3, 16, shared=True)),
]
CALLS = [(prompt_attention, *each) for each in ATTENTION] + [(prompt_interaction, {}, InteractionCase(2, 4, 4, 16, 32))]


@pytest.mark.parametrize(("function", "options", "case"), CALLS)
def test_operations_give_the_same_bits(module: Any, function: Any, options: dict[str, Any], case: Any) -> None:
    plan.forget()
    operation = attention_operation if function is prompt_attention else interaction_operation
    found = []
    for wanted in (False, True, True, True):
        inputs = case.make(torch.float32, DEVICE, seed=0)
        given = [each for each in inputs.values() if each is not None]
        for each in given:
            if each.is_floating_point():
                each.requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            if not wanted:
                patch.setattr(native, "find", lambda: None)
            function(**inputs, impl="triton", **options)
            outputs = [each for each in function(**inputs, impl="triton", **options) if each is not None]
        # The second call of each kind is made by the compiled part.
        assert all(("CppFunction" in repr(each.grad_fn)) == wanted for each in outputs)
        wishes = [each for each in given if each.requires_grad]
        gradients = torch.autograd.grad(outputs, wishes, [torch.sin(each.detach()) for each in outputs])
        found.append([*outputs, *gradients])
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            assert_bits_equal(left, right)
    if DEVICE == "cuda":
        assert operation.repeats is not None
        (kinds,) = operation.repeats._known.values()
        (made,) = kinds[0].calls.values()
        # The shares of a shared prompt's gradient are added by a torch operation, and such plans stay in Python.
        assert made._native.plans() == (True, 0 if getattr(case, "shared", False) else 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("function", "options", "case"), CALLS)
def test_operations_give_the_same_bits_on_a_gpu(
    module: Any, function: Any, options: dict[str, Any], case: Any
) -> None:  # fmt: skip
    """There the compiled part launches as well."""
    test_operations_give_the_same_bits(module, function, options, case)


def test_without_a_compiler_or_headers_building_says_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("EPIC_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ImplementationError, match=r"'no-such-compiler' did not start.*name it in CXX"):
        native.build()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ImplementationError, match=r"could not compile.*native.cpp"):
        native.build()
    assert not list((tmp_path / "native").iterdir())


def test_what_does_not_load_is_left_out_and_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EPIC_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("EPIC_FAST_NATIVE", raising=False)
    native.path().parent.mkdir()
    native.path().write_bytes(b"no library")
    native.find.cache_clear()
    try:
        assert native.find() is None
        assert native.find() is None
        assert len(caplog.records) == 1
        native.path().chmod(0o666)
        native.find.cache_clear()
        assert native.find() is None
        assert "can be written by everybody" in caplog.text
        monkeypatch.delenv("EPIC_FAST_CACHE")
        monkeypatch.setattr(native, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        native.find.cache_clear()
        assert native.find() is None
    finally:
        native.find.cache_clear()


def test_a_switch_leaves_it_out(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPIC_FAST_NATIVE", "0")
    assert native.find.__wrapped__() is None
    monkeypatch.delenv("EPIC_FAST_NATIVE")
    assert native.find.__wrapped__() is not None
