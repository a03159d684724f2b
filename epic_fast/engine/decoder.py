"""Fused frozen layers of a decoder of the LLaMA family, with and without an infusion.

With x the rows, pre-norm with RMSNorm, rotary positions, grouped-query attention and SwiGLU::

    x' = x + W_o attention(rotated W_qkv norm_1(x))
    y  = x' + W_down (silu(W_gate z) ⊙ W_up z ⊙ f)          z = norm_2(x')

A layer takes the sum ``x`` as its two terms and gives back two terms, so that every sum is formed by the norm above
it.  One product makes queries, keys and values, one makes both halves of the MLP; what multiplies and shifts keys,
values and hidden units is folded into attention and activation.  Under causal attention padding on the right needs no
mask: no valid row sees it.

Weights are frozen, so that the graph keeps of each layer the inputs of its norms, QKV, the softmax's statistic and
both halves of the MLP, or in place of these the MLP's input with ``save="recompute"``.  Where the rows need no gradient
nothing is kept but what an infusion's own gradients read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from epic_fast import functional
from epic_fast.engine.blocks import WEIGHT_TYPES, is_plain
from epic_fast.engine.infused import Form, GatedInfusion, SourceInfusion, joint_mlp_multiplier
from epic_fast.engine.packed import ALL_HOOKED, SAME, say_plain
from epic_fast.engine.rows import RowSelection
from epic_fast.hooks import all_hooked, is_hooked
from epic_fast.ops.residual_norm import residual_norm_backward, residual_norm_forward
from epic_fast.ops.rotary import join_rotated_back, rotate_heads

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"first_norm": "input_layernorm", "second_norm": "post_attention_layernorm"}
JOINED = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class DecoderWeights:
    """The weights of one layer; products as (out, in).

    Attributes:
        qkv, gate_up: of queries, keys and values, and of both halves of the MLP, one after the other in memory.
        first_norm, second_norm: weight and epsilon.
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    first_norm: tuple[Tensor, float]
    second_norm: tuple[Tensor, float]


@dataclass(frozen=True)
class DecoderGeometry:
    """What the rows ``(B, N, D)`` are.

    Attributes:
        lengths: ``(B,)`` valid tokens of each sample, which come first; None: all.
        cos, sin: ``(N, head_dim)`` of each position.
        rows: the rows that are read of the result; None: all.
    """

    lengths: Tensor | None
    cos: Tensor
    sin: Tensor
    rows: RowSelection | None = None


def why_not(layer: nn.Module) -> str | None:
    """Why no fused layer can take this layer's place; None where one can."""
    name = type(layer).__name__
    if name not in LAYERS or type(layer).__module__.split(".")[0] != "transformers":
        return f"its layers are {name}; there are fused layers for {', '.join(LAYERS)}"
    parts: dict[str, nn.Module] = {}
    for part, path in (*LINEARS.items(), *NORMS.items()):
        try:
            parts[part] = layer.get_submodule(path)
        except AttributeError:
            return f"{name} has no {path} in this release of transformers"
        if part in LINEARS and type(parts[part]) is not nn.Linear:
            return f"{path} is a {type(parts[part]).__name__}, wanted an unmodified Linear"
        if part in NORMS and not hasattr(parts[part], "variance_epsilon"):
            return f"{path} is a {type(parts[part]).__name__}, wanted an RMSNorm"
    for path, module in layer.named_modules():
        if module.training:
            return f"{path or name} is in training mode"
        if is_hooked(module):
            return f"{path or name} has hooks or a forward of its own"
    if any(tensor.is_inference() for tensor in layer.parameters()):
        return "its weights were made in inference mode, which does not tell of changes"
    if any(tensor.requires_grad for tensor in layer.parameters()):
        return "its weights are trained"
    kinds = {f"{parts[part].weight.dtype} on {parts[part].weight.device}" for part in LINEARS}
    if len(kinds) > 1 or parts["query"].weight.dtype not in WEIGHT_TYPES:
        wanted = "wanted one type of float64, float32, bfloat16 and float16 on one device"
        return f"its weights are {', '.join(sorted(kinds))}; {wanted}"
    return None


def side_by_side(linears: Sequence[Any]) -> Tensor:
    """The weights of several products of the same rows as one matrix, without a second copy of them.

    Weights that do not lie one after the other in memory are moved so that they do: the parameters stay what they are,
    and so do their numbers, but they become parts of one buffer.
    """
    weights = [each.weight for each in linears]
    rows, columns = sum(len(each) for each in weights), weights[0].shape[1]
    first, address = weights[0], weights[0].data_ptr()
    storage = first.untyped_storage()
    together = True
    for each in weights:
        together &= each.is_contiguous() and each.data_ptr() == address
        together &= each.untyped_storage().data_ptr() == storage.data_ptr()
        address += each.numel() * each.element_size()
    if together:
        return first.detach().as_strided((rows, columns), (columns, 1), first.storage_offset())
    whole = torch.cat([each.detach() for each in weights])
    start = 0
    for each in weights:
        each.data = whole[start : start + len(each)]
        start += len(each)
    return whole


class FrozenDecoderLayer:
    """One layer, computed from its own weights.

    Args:
        layer: of which :func:`why_not` says None.
    """

    def __init__(self, layer: Any):
        self._layer = layer
        self._modules = list(layer.modules())
        self._children = [(parent._modules, name, child) for parent in self._modules
                          for name, child in parent.named_children()]  # fmt: skip
        self._parts: dict[str, Any] = {
            name: layer.get_submodule(path) for name, path in (*LINEARS.items(), *NORMS.items())
        }
        attention = layer.self_attn
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scaling
        self.heads = self._parts["query"].out_features // self.head_dim
        self.kv_heads = self._parts["key"].out_features // self.head_dim
        self.mlp_width: int = self._parts["down"].in_features
        self._tensors = [(each._parameters, name) for each in self._parts.values() for name in ("weight", "bias")]
        numbers = [(self._parts[name], "variance_epsilon") for name in NORMS]
        numbers += [(attention, "scaling"), (attention, "head_dim")]
        self._numbers = [(each, name, getattr(each, name)) for each, name in numbers]
        self._made: tuple[Any, DecoderWeights] | None = None
        self._vectors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def unchanged(self) -> bool:
        """Whether the layer still is what it was when it was read: no module replaced, hooked or trained, no other
        epsilon or scale."""
        return (
            all(map(is_plain, self._modules))
            and all(modules.get(name) is child for modules, name, child in self._children)
            and not any(
                parameters[name] is not None and parameters[name].requires_grad
                for parameters, name in self._tensors
                if name in parameters
            )
            and all(getattr(each, name, None) == value for each, name, value in self._numbers)
        )

    def weights(self) -> DecoderWeights:
        """The weights, read anew when a tensor of the layer changed."""
        if self._made is None or self._made[0] != self._key():
            with torch.inference_mode(False), torch.no_grad():
                made = self._read()
            # Reading may have moved weights.
            self._made = self._key(), made
        return self._made[1]

    def made(self) -> Any:
        """What it has made of its weights, and beside them."""
        return self._made, dict(self._vectors)

    def _nothing(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What infuses nothing: ``(1, 1, head_dim)`` zeros and ``(1, F)`` ones."""
        if device not in self._vectors:
            with torch.inference_mode(False):
                self._vectors[device] = (
                    torch.zeros(1, 1, self.head_dim, device=device),
                    torch.ones(1, self.mlp_width, device=device),
                )
        return self._vectors[device]

    def _key(self) -> Any:
        given = [parameters.get(name) for parameters, name in self._tensors]
        return [(each.data_ptr(), each._version, each.dtype, each.device) for each in given if each is not None]

    def _read(self) -> DecoderWeights:
        parts = self._parts
        named: dict[str, Any] = {}
        for name, members in JOINED.items():
            linears = [parts[each] for each in members]
            named[name] = side_by_side(linears)
            biases = [each.bias for each in linears]
            if any(each is not None for each in biases):
                zeros = [each.weight.new_zeros(each.out_features) for each in linears]
                biases = [zero if each is None else each.detach() for each, zero in zip(biases, zeros, strict=True)]
                named[f"{name}_bias"] = torch.cat(biases)
            else:
                named[f"{name}_bias"] = None
        for name in ("output", "down"):
            bias = parts[name].bias
            named[name] = parts[name].weight.detach()
            named[f"{name}_bias"] = None if bias is None else bias.detach()
        for name in NORMS:
            named[name] = (parts[name].weight.detach(), parts[name].variance_epsilon)
        return DecoderWeights(**named)

    def __call__(
        self,
        stream: Tensor,
        branch: Tensor | None,
        geometry: DecoderGeometry,
        sources: Sequence[SourceInfusion],
        *,
        form: Form = "residual",
        save: str = "full",
    ) -> tuple[Tensor, Tensor]:
        """The layer on ``stream + branch``, ``(B, N, D)``.

        Args:
            branch: None: nothing.
            sources: what goes into the layer, of each source; none: the layer itself.
            form: of :func:`epic_fast.functional.infused_attention`.
            save: ``"recompute"`` keeps the MLP's input alone; others keep both halves of the MLP.

        Returns:
            The two terms of the result, ``(B, N, D)``, or ``(B, 1, D)`` where ``geometry.rows`` selects a row.
        """
        weights = self.weights()
        total, normed = norm(stream, branch, *weights.first_norm)
        inner, cos, sin = self.heads * self.head_dim, geometry.cos, geometry.sin
        if geometry.rows is None:
            shape = (self.heads, self.kv_heads, self.head_dim)
            query, key, value = _Heads.apply(normed, weights.qkv, weights.qkv_bias, cos, sin, *shape)
        else:
            bias = (None, None) if weights.qkv_bias is None else weights.qkv_bias.split([inner, 2 * self._kv_inner])
            shape = (0, self.kv_heads, self.head_dim)
            key, value = _Heads.apply(normed, weights.qkv[inner:], bias[1], cos, sin, *shape)
            total, normed = (_Row.apply(each, geometry.rows.index) for each in (total, normed))
            query = linear(normed, weights.qkv[:inner], bias[0]).unflatten(-1, (self.heads, self.head_dim))
            query = _turned(query.transpose(1, 2), cos, sin, geometry.rows.index)
        batch = len(stream)
        if sources:
            gated = GatedInfusion.of(sources, value, geometry.lengths)
            multiplier = joint_mlp_multiplier(sources)
        else:
            zeros, ones = self._nothing(value.device)
            vectors = zeros.expand(batch, self.kv_heads, self.head_dim)
            # A residual infusion with a gate of zero is the layer itself.
            form, gated = "residual", GatedInfusion(vectors, vectors, vectors, vectors[:, :, 0])
            multiplier = ones.expand(batch, -1)
        mixed = gated.attention(query, key, value, form=form, lengths=geometry.lengths, scale=self.scale)
        branch = linear(mixed.transpose(1, 2).flatten(2), weights.output, weights.output_bias)
        total, normed = norm(total, branch, *weights.second_norm)

        def units(rows: Tensor, multiplier: Tensor) -> Tensor:
            gate, up = _Pair.apply(rows, weights.gate_up, weights.gate_up_bias)  # pyright: ignore
            return functional.infused_swiglu(gate, up, multiplier)

        if save == "recompute" and torch.is_grad_enabled() and normed.requires_grad:
            hidden = checkpoint(units, normed, multiplier, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = units(normed, multiplier)
        return total, linear(hidden, weights.down, weights.down_bias)  # pyright: ignore[reportArgumentType]

    @property
    def _kv_inner(self) -> int:
        return self.kv_heads * self.head_dim


class FrozenDecoder:
    """The fused layers of a decoder, where each of its layers has one.

    Args:
        layers: in order.
        name: of the tower, for messages.
        compare: how far the first of these fused layers is from its own layer, relative.
    """

    def __init__(self, layers: Sequence[nn.Module], name: str, compare: Callable[[FrozenDecoderLayer], float]):
        self._layers = list(layers)
        self._name = name
        self._compare = compare
        self._fused: list[FrozenDecoderLayer] | None = None
        self._error = 0.0

    def layers(self, start: int, stop: int) -> list[FrozenDecoderLayer] | None:
        """All layers, read anew where one of those from ``start`` to ``stop - 1``, which are to run, was changed; None,
        saying why once, where a layer cannot be fused."""
        if all_hooked():
            say_plain(self._name, ALL_HOOKED)
            return None
        if self._fused is None or not all(each.unchanged() for each in self._fused[start:stop]):
            self._fused = None
            for layer in self._layers:
                reason = why_not(layer)
                if reason is not None:
                    say_plain(self._name, reason)
                    return None
            fused = [FrozenDecoderLayer(layer) for layer in self._layers]
            self._error = self._compare(fused[0]) if fused else 0.0
            self._fused = fused
        if not self._error <= SAME:
            name = type(self._layers[0]).__name__
            say_plain(self._name, f"this release's {name} differs from its fused layer by {self._error:.1e}")
            return None
        return self._fused

    def made(self) -> list[Any]:
        """What the layers have made of their weights, which a captured graph has to hold."""
        return [each.made() for each in self._fused or ()]


def norm(stream: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``stream + branch`` and its RMS norm, in the type of ``stream``; gradients of both terms are one tensor."""
    if branch is None:
        return stream, _Norm.apply(stream, weight, eps)  # pyright: ignore[reportReturnType]
    return _SumNorm.apply(stream, branch, weight, eps)  # pyright: ignore[reportReturnType]


class _SumNorm(torch.autograd.Function):
    """Keeps the sum and a number a row."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed, _, rstd, _ = residual_norm_forward(stream, branch, weight, None, eps, normed_dtype=stream.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, rstd)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total, weight, rstd = ctx.saved_tensors
        grad = grad_total
        if grad_normed is not None:
            grad = residual_norm_backward(grad_normed, grad_total, total, weight, None, rstd)
        return grad, grad, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, normed, _, rstd, _ = residual_norm_forward(stream, None, weight, None, eps)
        ctx.save_for_backward(stream, weight, rstd)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        stream, weight, rstd = ctx.saved_tensors
        return residual_norm_backward(grad, None, stream, weight, None, rstd), None, None


class _Heads(torch.autograd.Function):
    """Rows ``(B, N, D)`` to rotated queries (where there are any), rotated keys, and values, in one buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, cos, sin)
        packed = linear(rows, weight, bias).unflatten(-1, (heads + 2 * kv_heads, head_dim))
        ctx.shape = heads, kv_heads, packed.shape
        packed = rotate_heads(packed, cos, sin, heads + kv_heads).detach().transpose(1, 2)
        query, key, value = packed.split([heads, kv_heads, kv_heads], dim=1)
        return (query, key, value) if heads else (key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, cos, sin = ctx.saved_tensors
        heads, kv_heads, (batch, tokens, _, head_dim) = ctx.shape
        counts = (heads, kv_heads, kv_heads) if heads else (kv_heads, kv_heads)
        query, key, value = (None, None, *(
            weight.new_zeros(batch, count, tokens, head_dim) if grad is None else grad
            for grad, count in zip(grads, counts, strict=True)
        ))[-3:]  # fmt: skip
        packed = join_rotated_back(query, key, value, cos, sin)  # pyright: ignore[reportArgumentType]
        return packed.flatten(2) @ weight, *(None,) * 7


class _Pair(torch.autograd.Function):
    """Rows ``(B, N, D)`` to both halves of an MLP, ``(B, N, F)`` each, in one buffer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        first, second = linear(rows, weight, bias).detach().chunk(2, dim=-1)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_first, of_second = ctx.saved_tensors[0].chunk(2)
        found = first.flatten(0, 1) @ of_first
        found.addmm_(second.flatten(0, 1), of_second)
        return found.view(*first.shape[:2], -1), None, None


class _Row(torch.autograd.Function):
    """One row of each sample, ``(B, N, D)`` to ``(B, 1, D)``; the first where ``index`` is None."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor | None) -> Tensor:
        ctx.index, ctx.shape = index, rows.shape
        return RowSelection(index).take(rows, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = grad.new_zeros(ctx.shape)
        if ctx.index is None:
            found[:, 0] = grad[:, 0]
        else:
            found[torch.arange(len(grad), device=grad.device), ctx.index] = grad[:, 0]
        return found, None


def _turned(query: Tensor, cos: Tensor, sin: Tensor, index: Tensor | None) -> Tensor:
    """One query a sample, ``(B, H, 1, D)``, rotated by its position, in float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    cos, sin = ((each[:1] if index is None else each[index]).to(wide)[:, None, None] for each in (cos, sin))
    first, second = query.to(wide).chunk(2, dim=-1)
    return (query.to(wide) * cos + torch.cat([-second, first], dim=-1) * sin).to(query.dtype)
