"""The activations and their derivatives as functions of a tile in float32, for whichever kernel applies them."""

# pyright: basic, reportArgumentType=false, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl

from epic_fast.kernels.activation.reference import DERIVATIVE_STEPS, DERIVATIVE_ZERO

_STEPS = tl.constexpr(float(DERIVATIVE_STEPS))
_ZERO = tl.constexpr(float(DERIVATIVE_ZERO))
_TO_INTEGER = tl.constexpr(8388608.0)  # 2^23: added to a number of [0, 2^23), it leaves its nearest integer in the bits
_LOG2E = tl.constexpr(1.4426950408889634)
_QUICK = tl.constexpr(1.702)
_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_TANH_CUBE = tl.constexpr(0.044715)
_GAUSS = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
# Φ(-|x|) = exp(-x² / 2) t poly(t), t = 1 / (1 + _NEAR |x|); README.md has where the numbers come from.
_NEAR = tl.constexpr(0.29)
_C0 = tl.constexpr(0.11541899293661118)
_C1 = tl.constexpr(0.11979620903730392)
_C2 = tl.constexpr(0.0795462504029274)
_C3 = tl.constexpr(0.1816919595003128)
_C4 = tl.constexpr(-0.1480533629655838)
_C5 = tl.constexpr(0.30518588423728943)
_C6 = tl.constexpr(-0.19308505952358246)
_C7 = tl.constexpr(0.039499152451753616)


@triton.jit
def bell(x):
    """exp(-x² / 2)."""
    return tl.exp2(x * x * (-0.5 * _LOG2E))


@triton.jit
def normal_distribution(x):
    """Φ(x): without a branch, and sharing its exponential with the derivative."""
    t = 1.0 / (1.0 + _NEAR * tl.abs(x))
    poly = _C7 * t + _C6
    poly = poly * t + _C5
    poly = poly * t + _C4
    poly = poly * t + _C3
    poly = poly * t + _C2
    poly = poly * t + _C1
    poly = poly * t + _C0
    tail = poly * t * bell(x)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def gate_of(x, KIND: tl.constexpr):
    """What the activation multiplies ``x`` by: a sigmoid, or the normal distribution's Φ."""
    if KIND == "gelu":
        gate = normal_distribution(x)
    elif KIND == "quick_gelu":
        gate = 1.0 / (1.0 + tl.exp2(x * (-_QUICK * _LOG2E)))
    else:
        tl.static_assert(KIND == "gelu_tanh")
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        gate = 1.0 / (1.0 + tl.exp2((x + _TANH_CUBE * x * x * x) * (-_TANH_SCALE * _LOG2E)))
    return gate


@triton.jit
def slope_of(x, gate, KIND: tl.constexpr):
    """The derivative, given the gate."""
    if KIND == "gelu":
        slope = gate + x * bell(x) * _GAUSS
    elif KIND == "quick_gelu":
        slope = gate + _QUICK * x * gate * (1.0 - gate)
    else:
        slope = gate + x * gate * (1.0 - gate) * (_TANH_SCALE + 3.0 * _TANH_CUBE * _TANH_SCALE * x * x)
    return slope


@triton.jit
def activate(x, KIND: tl.constexpr):
    """act(x) for a tile ``x`` in float32."""
    return x * gate_of(x, KIND)


@triton.jit
def derivative(x, KIND: tl.constexpr):
    """act'(x) for a tile ``x`` in float32."""
    return slope_of(x, gate_of(x, KIND), KIND)


@triton.jit
def activate_with_derivative(x, KIND: tl.constexpr):
    """(act(x), act'(x)), which share the gate."""
    gate = gate_of(x, KIND)
    return x * gate, slope_of(x, gate, KIND)


@triton.jit
def encode_derivative(slope):
    """uint8 codes, the nearest; README.md has the grid."""
    return ((slope * _STEPS + _ZERO) + _TO_INTEGER).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def decode_derivative(code):
    """The derivative in float32 that a uint8 code stands for."""
    whole = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (_TO_INTEGER + _ZERO)
    return whole * (1.0 / _STEPS)
