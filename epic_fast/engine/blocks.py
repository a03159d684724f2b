"""Reading a transformer layer: which modules a fused block may take the place of, and their weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from epic_fast.engine.products import FrozenWeight
from epic_fast.hooks import is_hooked
from epic_fast.ops.frozen_linear import (
    EightBitWeight,  # pyright: ignore[reportAttributeAccessIssue]
    quantise_rows,
    quantise_weight,
)

# Where the parts of a layer are, by the class of the layer.
_PRE_NORM_MLP = {"up": "mlp.fc1", "down": "mlp.fc2", "activation": "mlp.activation_fn"}
_CLIP = {
    "attention": "self_attn",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.out_proj",
    "first_norm": "layer_norm1",
    "second_norm": "layer_norm2",
    **_PRE_NORM_MLP,
}
LAYOUTS: dict[str, dict[str, str]] = {
    "CLIPEncoderLayer": _CLIP,
    "SiglipEncoderLayer": _CLIP,
    "ViTLayer": {
        "attention": "attention",
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "output": "attention.o_proj",
        "first_norm": "layernorm_before",
        "second_norm": "layernorm_after",
        **_PRE_NORM_MLP,
    },
    "SwinLayer": {
        "attention": "attention",
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "output": "attention.o_proj",
        "first_norm": "layernorm_before",
        "second_norm": "layernorm_after",
        "position": "attention.relative_position_bias",
        # The identity, or what drops whole paths in training.
        "drop_path": "drop_path",
        **_PRE_NORM_MLP,
    },
    "BertLayer": {
        "attention": "attention.self",
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "first_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "activation": "intermediate.intermediate_act_fn",
        "second_norm": "output.LayerNorm",
    },
}
POST_NORM = frozenset({"BertLayer"})
HEADS = ("num_heads", "num_attention_heads")
SCALES = ("scale", "scaling")
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LINEARS = ("query", "key", "value", "output", "up", "down")
NORMS = ("first_norm", "second_norm")
PRODUCTS = ("qkv", "output", "up", "down")


@dataclass(frozen=True)
class Weights:
    """The weights of one layer in the type of its products, or in 8 bits; the norms keep their own.

    Attributes:
        dtype: of what the products give, and of the biases.
        inner: width of the queries.
        eight_bit: None; or ``"fp8"`` or ``"int8"``, and the four products' weights are in 8 bits.
        backward: whether they can be had for backward products too.
    """

    dtype: torch.dtype
    inner: int
    qkv: FrozenWeight
    qkv_bias: Tensor | None
    output: FrozenWeight
    output_bias: Tensor | None
    up: FrozenWeight
    up_bias: Tensor | None
    down: FrozenWeight
    down_bias: Tensor | None
    first_norm: tuple[Tensor, Tensor, float]
    second_norm: tuple[Tensor, Tensor, float]
    eight_bit: str | None = None
    backward: bool = True
    _parts: dict[bool, EightBitWeight] = field(default_factory=dict, repr=False, compare=False)

    def query(self) -> tuple[FrozenWeight, Tensor | None]:
        """Weight and bias of the queries alone."""
        return self._part(True)

    def key_value(self) -> tuple[FrozenWeight, Tensor | None]:
        """Weight and bias of keys and values alone."""
        return self._part(False)

    def _part(self, first: bool) -> tuple[FrozenWeight, Tensor | None]:
        rows = slice(self.inner) if first else slice(self.inner, None)
        bias = None if self.qkv_bias is None else self.qkv_bias[rows]
        if not isinstance(self.qkv, EightBitWeight):
            return self.qkv[rows], bias
        if first not in self._parts:
            whole = self.qkv
            # The transposed form has a scale a row, of which a part of the columns needs no larger one.
            transposed = None if whole.transposed is None else whole.transposed[:, rows].contiguous()
            self._parts[first] = EightBitWeight(
                whole.kind, whole.data[rows], whole.scale[rows], transposed, whole.transposed_scale
            )
        return self._parts[first], bias


class LayerParts:
    """The modules of a layer that a fused block computes with.

    Args:
        layer: a layer of which :func:`why_not` says None.
    """

    def __init__(self, layer: nn.Module):
        layout = LAYOUTS[type(layer).__name__]
        self.post_norm = type(layer).__name__ in POST_NORM
        self.parts: dict[str, Any] = {name: layer.get_submodule(path) for name, path in layout.items()}
        attention = self.parts["attention"]
        self.heads: int = next(getattr(attention, name) for name in HEADS if hasattr(attention, name))
        self.scale: float = next(getattr(attention, name) for name in SCALES if hasattr(attention, name))
        self.activation = activation_kind(self.parts["activation"])
        self._children = [
            (parent._modules, name, child)
            for parent in layer.modules()
            for name, child in parent.named_children()
        ]  # fmt: skip
        self._layer = layer
        holders = [self.parts[name] for name in (*LINEARS, *NORMS)]
        self._tensors = [(each._parameters, name) for each in holders for name in ("weight", "bias")]
        if "position" in self.parts:
            self._tensors.append((self.parts["position"]._parameters, "relative_position_bias_table"))
        numbers = [(self.parts[name], "eps") for name in NORMS]
        numbers += [(attention, name) for name in (*HEADS, *SCALES) if hasattr(attention, name)]
        self._numbers = [(each, name, getattr(each, name)) for each, name in numbers]
        self._cache: dict[tuple[torch.dtype, str | None], tuple[Any, Weights]] = {}

    def unchanged(self) -> bool:
        """Whether the layer still is what it was when it was read: no module replaced, hooked or trained, no other
        epsilon, scale or number of heads."""
        return (
            is_plain(self._layer)
            and all(modules.get(name) is child and is_plain(child) for modules, name, child in self._children)
            and all(
                name in parameters and (parameters[name] is None or not parameters[name].requires_grad)
                for parameters, name in self._tensors
            )
            and all(getattr(each, name, None) == value for each, name, value in self._numbers)
        )

    def weights(
        self, dtype: torch.dtype | None = None, eight_bit: str | None = None, *, backward: bool = True
    ) -> Weights:
        """The weights with products in ``dtype`` (None: as they are), made anew when a tensor of the layer changed.

        Args:
            dtype: of what the products give.
            eight_bit: None; or ``"fp8"`` or ``"int8"``, what the products' weights are kept as.
            backward: in 8 bits, also the transposed weights of backward products; once made they stay.
        """
        wanted = (self.parts["query"].weight.dtype if dtype is None else dtype, eight_bit)
        key = tuple(
            (each.data_ptr(), each._version, each.dtype, each.device)
            for each in (parameters[name] for parameters, name in self._tensors)
            if each is not None
        )
        found = self._cache.get(wanted)
        if found is None or found[0] != key or (backward and not found[1].backward):
            with torch.inference_mode(False), torch.no_grad():
                if found is not None and found[0] == key:
                    found = (key, self._with_transposed(found[1]))
                else:
                    found = (key, self._read(*wanted))
                    if backward and eight_bit is not None:
                        found = (key, self._with_transposed(found[1]))
            self._cache = {kept: each for kept, each in self._cache.items() if each[0] == key} | {wanted: found}
        return found[1]

    def _read(self, dtype: torch.dtype, eight_bit: str | None) -> Weights:
        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype)

        named: dict[str, Any] = {"dtype": dtype, "eight_bit": eight_bit, "backward": eight_bit is None}
        three = [self.parts[name] for name in ("query", "key", "value")]
        named["inner"] = len(three[0].weight)
        bias = None
        if any(each.bias is not None for each in three):
            bias = cast(torch.cat([each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias
                                   for each in three]))  # fmt: skip
        named["qkv_bias"] = bias
        for name in PRODUCTS:
            if eight_bit is None:
                named[name] = self._joined(name, dtype)
            else:
                named[name] = quantise_weight(self._joined(name, None), eight_bit, backward=False)
        for name in ("output", "up", "down"):
            named[f"{name}_bias"] = cast(self.parts[name].bias)
        for name in NORMS:
            norm = self.parts[name]
            named[name] = (norm.weight.detach(), norm.bias.detach(), norm.eps)
        return Weights(**named)

    def _with_transposed(self, weights: Weights) -> Weights:
        """With 8 bits for backward products, beside those that there are for forward ones."""
        made: dict[str, EightBitWeight] = {}
        for name in PRODUCTS:
            weight = getattr(weights, name)
            data, scale = quantise_rows(self._joined(name, None).t().contiguous(), weight.kind)
            made[name] = replace(weight, transposed=data, transposed_scale=scale)
        return replace(weights, **made, backward=True, _parts={})  # pyright: ignore[reportArgumentType]

    def _joined(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """The weight of one of ``PRODUCTS``, (out, in), in ``dtype`` (None: its own)."""
        names = ("query", "key", "value") if name == "qkv" else (name,)
        parts = [self.parts[each].weight.detach() for each in names]
        parts = parts if dtype is None else [each.to(dtype) for each in parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def is_plain(module: nn.Module) -> bool:
    """Whether a module is in evaluation mode and computes what its class says."""
    return not (module.training or is_hooked(module))


def activation_kind(module: nn.Module) -> str | None:
    """``quick_gelu``, ``gelu`` or ``gelu_tanh``; None for another activation."""
    name = type(module).__name__
    if name == "QuickGELUActivation":
        return "quick_gelu"
    if name in ("GELUTanh", "PytorchGELUTanh", "NewGELUActivation"):
        return "gelu_tanh"
    if name == "GELUActivation":
        return "gelu"
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return None


def why_not(layer: nn.Module) -> str | None:
    """Why no fused block can take this layer's place; None where one can."""
    name = type(layer).__name__
    if name not in LAYOUTS or type(layer).__module__.split(".")[0] != "transformers":
        return f"its layers are {name}; there are fused blocks for {', '.join(LAYOUTS)}"
    parts: dict[str, nn.Module] = {}
    for part, path in LAYOUTS[name].items():
        try:
            parts[part] = layer.get_submodule(path)
        except AttributeError:
            return f"{name} has no {path} in this release of transformers"
    expected = dict.fromkeys(LINEARS, nn.Linear) | dict.fromkeys(NORMS, nn.LayerNorm)
    for part, kind in expected.items():
        if type(parts[part]) is not kind:
            return f"{LAYOUTS[name][part]} is a {type(parts[part]).__name__}, wanted an unmodified {kind.__name__}"
    if activation_kind(parts["activation"]) is None:
        return f"its activation is {type(parts['activation']).__name__}; wanted QuickGELU or GELU"
    known = {id(each) for each in parts.values()}
    for path, module in layer.named_modules():
        kind = type(module)
        if module.training:
            return f"{path or name} is in training mode"
        if is_hooked(module):
            return f"{path or name} has hooks or a forward of its own"
        stranger = id(module) not in known and kind is not nn.Dropout
        if stranger and (next(module.children(), None) is None or kind.__module__.split(".")[0] != "transformers"):
            return f"{path} is a {kind.__name__}, which the fused block does not know"
    if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
        return f"{name} is a decoder"
    attention = parts["attention"]
    if not any(hasattr(attention, each) for each in HEADS) or not any(hasattr(attention, each) for each in SCALES):
        return f"{type(attention).__name__} does not say its heads and its scale as it used to"
    if any(parts[part].weight is None or parts[part].bias is None for part in NORMS):
        return "a norm has no weight or bias"
    if any(tensor.is_inference() for tensor in layer.parameters()):
        return "its weights were made in inference mode, which does not tell of changes"
    if any(tensor.requires_grad for tensor in layer.parameters()):
        return "its weights are trained"
    kinds = {(tensor.dtype, tensor.device) for tensor in (parts[part].weight for part in LINEARS)}
    if len(kinds) > 1 or next(iter(kinds))[0] not in WEIGHT_TYPES:
        return f"its weights are {', '.join(sorted(str(kind[0]) for kind in kinds))} or on several devices"
    return None
