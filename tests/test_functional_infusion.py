"""MiT's operations against its equations written out, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.functional import infused_attention, infused_swiglu, infusion_gate
from epic_fast.testing.cases import GateCase, InfusedAttentionCase, SwigluCase, gate_cases, infused_attention_cases

WIDE = torch.float64
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}


def make(case: InfusedAttentionCase | GateCase | SwigluCase, gradients: bool = False) -> dict[str, Tensor]:
    return {
        name: each.to(WIDE).requires_grad_(gradients)
        for name, each in case.make(torch.float32).items()
        if each is not None
    }


def attend(
    given: dict[str, Tensor], key_shift: Tensor, *, form: str, causal: bool, lengths: Tensor | None, scale: float | None
) -> Tensor:
    """One sample, one head, one row at a time, with the vector that is added to the keys."""
    query, key, value, of_key, of_value, shift, gate = given.values()
    batch, heads, rows, head_dim = query.shape
    tokens, group = key.shape[2], heads // key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    samples = []
    for b in range(batch):
        length = tokens if lengths is None else int(lengths[b])
        of_heads = []
        for h in range(heads):
            k = h // group
            infused_key = gate[b, k] * (key[b, k] * of_key[b, k] + key_shift[b, k])
            infused_value = gate[b, k] * (value[b, k] * of_value[b, k] + shift[b, k])
            if form == "residual":
                infused_key, infused_value = key[b, k] + infused_key, value[b, k] + infused_value
            of_rows = []
            for row in range(rows):
                seen = length
                if rows == tokens:
                    seen = 0 if row >= length else min(row + 1, length) if causal and rows > 1 else length
                scores = infused_key[:seen] @ query[b, h, row] * scale
                mixed = scores.softmax(dim=0) @ infused_value[:seen]
                of_rows.append(mixed if seen else torch.zeros_like(mixed))
            of_heads.append(torch.stack(of_rows))
        samples.append(torch.stack(of_heads))
    return torch.stack(samples)


def both(
    case: InfusedAttentionCase, shift_size: float = 2.0
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor]:
    """Output and gradients of the operation and of the definition, and the gradient of the key's vector."""
    ours, theirs, options = make(case, True), make(case, True), case.options()
    key_shift = (torch.randn(ours["key_multiplier"].shape, dtype=WIDE) * shift_size).requires_grad_()
    got, want = infused_attention(**ours, **options), attend(theirs, key_shift, **options)
    sent = torch.randn(want.shape, dtype=WIDE)
    of_ours = torch.autograd.grad(got, list(ours.values()), sent)
    *of_theirs, of_shift = torch.autograd.grad(want, [*theirs.values(), key_shift], sent)
    return [got, *of_ours], [want, *of_theirs], of_shift


@given(case=infused_attention_cases(max_tokens=6, head_dims=(1, 2, 5)))
def test_attention_row_by_row_and_the_vector_added_to_keys_cancels(case: InfusedAttentionCase) -> None:
    found, wanted, of_shift = both(case)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    torch.testing.assert_close(of_shift, torch.zeros_like(of_shift), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["residual", "replace"])
def test_folded_is_naive(form: str) -> None:
    """PyTorch's own attention on keys and values as they are, a rescaled query and an affine map of the output."""
    case = InfusedAttentionCase(2, 6, 2, 7, 5, form=form)
    query, key, value, of_key, of_value, shift, gate = make(case).values()
    base, gate = 1.0 if form == "residual" else 0.0, gate[..., None]
    key_factor, value_factor, shift = base + gate * of_key, base + gate * of_value, gate * shift
    key_factor, value_factor, shift = (
        each.repeat_interleave(3, 1)[:, :, None] for each in (key_factor, value_factor, shift)
    )
    plain = torch.nn.functional.scaled_dot_product_attention(
        query * key_factor, key, value, is_causal=True, enable_gqa=True
    )
    found = infused_attention(**make(case), form=form)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found, plain * value_factor + shift, **EXACT)


@pytest.mark.parametrize("form", ["residual", "replace"])
def test_several_modalities_add_up_into_one_call(form: str) -> None:
    """The sums of gated vectors with a gate of ones, which costs no memory, and gradients through both."""
    case = InfusedAttentionCase(2, 2, 2, 5, 4, form=form, lengths=(5, 3))
    given, options = make(case, True), case.options()
    query, key, value, *_ = given.values()
    vectors = torch.randn(2, 4, 2, 2, 4, dtype=WIDE).requires_grad_()  # modality, vector, sample, head, channel
    gates = torch.rand(2, 2, 2, dtype=WIDE).requires_grad_()
    key_shift = torch.zeros_like(vectors[0, 0])

    def naive() -> Tensor:
        one = torch.ones(2, 2, dtype=WIDE)
        update = (gates[:, None, :, :, None] * vectors).sum(0)
        infused = {"query": query, "key": key, "value": value, "a": update[0], "b": update[1], "c": update[2], "d": one}
        return attend(infused, key_shift, **options)

    def ours() -> Tensor:
        update = (gates[:, None, :, :, None] * vectors).sum(0)
        ones = gates.new_ones(1, 1).expand(2, 2)
        return infused_attention(query, key, value, update[0], update[1], update[2], ones, **options)

    sent = torch.randn(query.shape, dtype=WIDE)
    results = [(each(), [query, key, value, vectors, gates]) for each in (ours, naive)]
    (one, leaves), (other, _) = results
    torch.testing.assert_close(one, other, **EXACT)
    for mine, theirs in zip(
        torch.autograd.grad(one, leaves, sent), torch.autograd.grad(other, leaves, sent), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("causal", [True, False])
def test_one_row_is_the_last_valid_tokens(causal: bool) -> None:
    case = InfusedAttentionCase(3, 4, 2, 6, 5, lengths=(6, 2, 1), causal=causal)
    given, options = make(case), case.options()
    whole = infused_attention(**given, **options)
    last = options["lengths"].long() - 1
    given["query"] = given["query"][torch.arange(3), :, last][:, :, None]
    found = infused_attention(**given, **options)
    torch.testing.assert_close(found[:, :, 0], whole[torch.arange(3), :, last], **EXACT)
    options["lengths"] = torch.tensor([6, 0, 1])
    assert not infused_attention(**given, **options)[1].any()


def test_multipliers_of_zero_change_nothing_bit_for_bit() -> None:
    case = InfusedAttentionCase(2, 4, 2, 6, 5)
    given: dict[str, Any] = case.make(torch.float32)
    zeros = torch.zeros_like(given["value_shift"])
    query, key, value = given["query"], given["key"], given["value"]
    gates = (torch.full((2, 2), 0.7), torch.rand(2, 2))
    found = [infused_attention(query, key, value, zeros, zeros, zeros, gate, impl="reference") for gate in gates]
    assert torch.equal(*found)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found[0], plain)


@given(case=gate_cases(max_tokens=6, head_dims=(1, 2, 5)))
def test_the_gate_is_the_cosine_of_what_is_valid(case: GateCase) -> None:
    given = make(case)
    value, shift, bias = given.values()
    found = infusion_gate(**given, **case.options())
    for b in range(case.batch):
        length = case.tokens if case.lengths is None else case.lengths[b]
        for h in range(case.key_heads):
            flat, tiled = value[b, h, :length].flatten(), shift[b, h].repeat(length)
            cosine = (
                torch.nn.functional.cosine_similarity(flat, tiled, dim=0) if length else torch.zeros((), dtype=WIDE)
            )
            torch.testing.assert_close(found[b, h], torch.sigmoid(bias[h] + cosine), **EXACT)
            if length:
                cheap = value[b, h, :length].sum(0) @ shift[b, h] / math.sqrt(length) / flat.norm() / shift[b, h].norm()
                torch.testing.assert_close(cosine, cheap, **EXACT)


@pytest.mark.parametrize("zero", ["value", "value_shift", "both", "length"])
@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
def test_a_gate_of_zeros_is_the_bias_with_finite_gradients(zero: str, dtype: torch.dtype) -> None:
    given: dict[str, Any] = GateCase(2, 2, 3, 4).make(dtype)
    for name in ("value", "value_shift"):
        if zero in (name, "both"):
            given[name] = torch.zeros_like(given[name])
    lengths = torch.tensor([0, 3]) if zero == "length" else None
    leaves = [each.requires_grad_() for each in given.values()]
    gate = infusion_gate(**given, lengths=lengths)
    samples = 1 if zero == "length" else 2
    torch.testing.assert_close(gate[:samples], given["head_bias"].sigmoid().expand(samples, -1))
    assert all(each.isfinite().all() for each in torch.autograd.grad(gate.sum(), leaves))


@pytest.mark.parametrize("lengths", [None, (3, 1)])
def test_gradcheck(lengths: tuple[int, ...] | None) -> None:
    attention, gate = InfusedAttentionCase(2, 2, 1, 3, 2, lengths=lengths), GateCase(2, 2, 3, 2, lengths=lengths)
    for function, case in (
        (infused_attention, attention),
        (infusion_gate, gate),
        (infused_swiglu, SwigluCase(2, 2, 3)),
    ):
        given, options = make(case, True), case.options()  # pyright: ignore[reportArgumentType]
        assert torch.autograd.gradcheck(lambda *each, f=function, o=options: f(*each, **o), tuple(given.values()))


def test_swiglu_by_hand() -> None:
    gate, up, multiplier = make(SwigluCase(2, 3, 4)).values()
    found = infused_swiglu(gate, up, multiplier)
    for b in range(2):
        for n in range(3):
            for f in range(4):
                g = float(gate[b, n, f])
                want = g / (1 + math.exp(-g)) * float(up[b, n, f]) * float(multiplier[b, f])
                assert math.isclose(float(found[b, n, f]), want, rel_tol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_padding_reaches_nobody_and_further_padding_changes_nothing(bad: float) -> None:
    lengths = torch.tensor([4, 2])
    short = make(InfusedAttentionCase(2, 4, 2, 4, 3))
    long = {name: each.detach().clone() for name, each in short.items()}
    for name in ("query", "key", "value"):
        rows = torch.full((*short[name].shape[:2], 3, 3), bad, dtype=WIDE)
        long[name] = torch.cat([short[name], rows], dim=2)
        long[name][1, :, 2:4] = bad
    bias = torch.zeros(2, dtype=WIDE)
    leaves = [[each.requires_grad_() for each in made.values()] for made in (short, long)]
    found = []
    for made, tokens in ((short, leaves[0]), (long, leaves[1])):
        gate = infusion_gate(made["value"], made["value_shift"], bias, lengths=lengths)
        output = infused_attention(*tokens[:6], gate, lengths=lengths)
        gradients = torch.autograd.grad(output.sin().sum(), tokens[:6])
        found.append([output, *gradients])
    for one, other in zip(*found, strict=True):
        assert other.isfinite().all()
        if one.dim() == 4:
            torch.testing.assert_close(other[:, :, :4], one, **EXACT)
            assert not other[:, :, 4:].any()
            assert not other[1, :, 2:].any()
        else:
            torch.testing.assert_close(other, one, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_types(dtype: torch.dtype, autocast: bool) -> None:
    """Vectors in float32 beside tokens in half: results in the tokens' type, gradients in each one's own."""
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        for function, case in (
            (infused_attention, InfusedAttentionCase(2, 4, 2, 5, 8, wide_vectors=True)),
            (infusion_gate, GateCase(2, 2, 5, 8, wide_vectors=True)),
            (infused_swiglu, SwigluCase(2, 5, 8, wide_vectors=True)),
        ):
            given: dict[str, Any] = case.make(dtype)
            if autocast and function is infused_attention:
                given["query"] = given["query"].float()
            leaves = [each.requires_grad_() for each in given.values()]
            found = function(**given)
            assert found.dtype == (torch.float32 if function is infusion_gate else dtype)
            for each, gradient in zip(leaves, torch.autograd.grad(found.float().sum(), leaves), strict=True):
                assert gradient.dtype == each.dtype


ATTENTION: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"key": torch.zeros(2, 6, 8)}, r"key has shape \(2, 6, 8\); wanted \(batch, key heads, tokens, head_dim\)"),
    "value": ({"value": torch.zeros(2, 2, 5, 8)}, r"value has shape \(2, 2, 5, 8\); wanted key's \(2, 2, 6, 8\)"),
    "heads": (
        {"query": torch.zeros(2, 3, 6, 8)},
        r"query has shape .*; wanted \(2, a multiple of 2 heads, 6 or 1, 8\)",
    ),
    "rows": ({"query": torch.zeros(2, 4, 2, 8)}, r"query has shape \(2, 4, 2, 8\); wanted .* 6 or 1"),
    "vector": ({"value_shift": torch.zeros(2, 4, 8)}, r"value_shift has shape \(2, 4, 8\); wanted \(2, 2, 8\)"),
    "gate": ({"gate": torch.zeros(2, 4)}, r"gate has shape \(2, 4\); wanted \(2, 2\)"),
    "type": ({"key": torch.zeros(2, 2, 6, 8).half()}, r"key has type torch\.float16; wanted query's torch\.float32"),
    "integers": ({"gate": torch.zeros(2, 2).long()}, r"gate has type torch\.int64; wanted a floating-point type"),
    "device": ({"gate": torch.zeros(2, 2, device="meta")}, "gate is on meta; wanted cpu, as query"),
    "stride": ({"key": torch.zeros(2, 2, 8, 6).mT}, r"key has last stride 6; wanted 1 \(call .contiguous\(\)\)"),
    "form": ({"form": "add"}, "form='add'; wanted 'residual' or 'replace'"),
    "lengths": ({"lengths": torch.tensor([1, 7])}, "lengths run from 1 to 7; wanted 0 to the 6 tokens of key"),
    "lengths' shape": ({"lengths": torch.tensor([1])}, r"lengths has shape \(1,\); wanted \(2,\)"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_errors_of_attention(name: str) -> None:
    changes, message = ATTENTION[name]
    given: dict[str, Any] = InfusedAttentionCase(2, 4, 2, 6, 8).make()
    with pytest.raises(ConfigError, match=f"^infused_attention: .*{message}"):
        infused_attention(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"value": torch.zeros(2, 2, 8)},
            r"value has shape \(2, 2, 8\); wanted \(batch, key heads, tokens, head_dim\)",
        ),
        ({"value_shift": torch.zeros(2, 8)}, r"value_shift has shape \(2, 8\); wanted \(2, 2, 8\)"),
        ({"head_bias": torch.zeros(())}, r"head_bias has shape \(\); wanted \(2,\)"),
        ({"lengths": torch.tensor([1.0, 2.0])}, r"lengths has type torch\.float32; wanted an integer type"),
        ({"lengths": torch.tensor([1, 9])}, "lengths run from 1 to 9; wanted 0 to the 6 tokens of value"),
    ],
)
def test_errors_of_the_gate(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = GateCase(2, 2, 6, 8).make()
    with pytest.raises(ConfigError, match=f"^infusion_gate: {message}"):
        infusion_gate(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gate_projection": torch.zeros(2, 8)},
            r"gate_projection has shape \(2, 8\); wanted \(batch, tokens, width\)",
        ),
        ({"up_projection": torch.zeros(2, 6, 4)}, r"up_projection has shape \(2, 6, 4\); wanted gate_projection's"),
        ({"multiplier": torch.zeros(2, 6, 8)}, r"multiplier has shape \(2, 6, 8\); wanted \(2, 8\)"),
        ({"up_projection": torch.zeros(2, 6, 8).half()}, r"up_projection has type torch\.float16; wanted gate_proj"),
    ],
)
def test_errors_of_swiglu(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = SwigluCase(2, 6, 8).make()
    with pytest.raises(ConfigError, match=f"^infused_swiglu: {message}"):
        infused_swiglu(**{**given, **changes})
