"""Calls of the operations: shapes, flags and memory layouts, drawn at random or met in production."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LAYOUTS = ("heads", "tokens", "packed")
"""Memory order: ``(B,H,N,D)``, ``(B,N,H,D)``, or views into one buffer ``(B, P+N, 3, H, D)`` of a QKV projection."""


@dataclass(frozen=True)
class AttentionCase:
    """One call of :func:`epic_fast.functional.prompt_attention`.

    Attributes:
        batch, heads, tokens, prompts, head_dim: the sizes B, H, N, P, D.
        prompt_mask, causal, scale: as in the call.
        lengths: valid tokens of each sample, or None.
        shared: the prompts have batch 1.
        prefix_tuning: there is no ``prompt_query``.
        layout: one of :data:`LAYOUTS`.
        name: a short one, for tables.
    """

    batch: int
    heads: int
    tokens: int
    prompts: int
    head_dim: int = 64
    prompt_mask: str = "full"
    causal: bool = False
    lengths: tuple[int, ...] | None = None
    scale: float | None = None
    shared: bool = False
    prefix_tuning: bool = False
    layout: str = "heads"
    name: str = ""

    outputs: ClassVar[tuple[str, ...]] = ("output", "prompt_output")

    @property
    def reductions(self) -> dict[str, int]:
        """The longest sum behind an element of each output and of each input's gradient.

        Over the keys, the channels or, for a gradient of keys and values, the rows: those of the whole batch where
        the batch shares them.
        """
        rows = self.prompts + self.tokens
        once, summed = max(rows, self.head_dim), max(rows * (self.batch if self.shared else 1), self.head_dim)
        own: dict[str, int] = dict.fromkeys((*self.outputs, "query", "key", "value"), once)
        return own | dict.fromkeys(("prompt_query", "prompt_key", "prompt_value"), summed)

    def make(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Random tensors by parameter name, standard normal, made in ``dtype``."""
        device = torch.device(device)
        random = _generator(device, seed)
        rows, prompt_batch = self.prompts + self.tokens, 1 if self.shared else self.batch

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device).to(dtype)

        if self.layout == "packed" and not self.shared:
            packed = draw(self.batch, rows, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
            prompts = [each[:, :, : self.prompts] for each in packed]
            tokens = [each[:, :, self.prompts :] for each in packed]
        elif self.layout == "heads":
            tokens = [draw(self.batch, self.heads, self.tokens, self.head_dim) for _ in range(3)]
            prompts = [draw(prompt_batch, self.heads, self.prompts, self.head_dim) for _ in range(3)]
        else:
            tokens = [draw(self.batch, self.tokens, self.heads, self.head_dim).transpose(1, 2) for _ in range(3)]
            prompts = [draw(prompt_batch, self.prompts, self.heads, self.head_dim).transpose(1, 2) for _ in range(3)]
        return {
            "query": tokens[0],
            "key": tokens[1],
            "value": tokens[2],
            "prompt_query": None if self.prefix_tuning else prompts[0],
            "prompt_key": prompts[1],
            "prompt_value": prompts[2],
        }

    def options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The other arguments of the call."""
        lengths = None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int32, device=device)
        return {"prompt_mask": self.prompt_mask, "causal": self.causal, "lengths": lengths, "scale": self.scale}

    def flops(self, mode: str = "forward") -> float:
        """Floating-point operations of the two (forward) or five (backward) products over what is visible."""
        lengths = self.lengths or (self.tokens,) * self.batch
        visible = 0
        for length in lengths:
            visible += length * self.prompts + (length * (length + 1) // 2 if self.causal else length * length)
            if not self.prefix_tuning:
                visible += self.prompts * (self.prompts + (length if self.prompt_mask == "full" else 0))
        products = {"forward": 2, "backward": 5, "forward+backward": 7}[mode]
        return 2.0 * products * self.heads * self.head_dim * visible

    def bytes_moved(self, dtype: torch.dtype, mode: str = "forward") -> float:
        """Bytes if q, k, v and the output went over the bus once; in the backward pass, they and their gradients."""
        tokens = self.batch * self.tokens
        prompts = (1 if self.shared else self.batch) * self.prompts
        prompt_rows = 0 if self.prefix_tuning else self.batch * self.prompts
        inputs = 3 * tokens + (2 if self.prefix_tuning else 3) * prompts
        output = tokens + prompt_rows
        values = {"forward": inputs + output, "backward": 2 * inputs + 2 * output}
        values["forward+backward"] = values["forward"] + values["backward"]
        return float(values[mode] * self.heads * self.head_dim * dtype.itemsize)

    def row(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class InteractionCase:
    """One call of :func:`epic_fast.functional.prompt_interaction`.

    Attributes:
        batch, text_prompts, vision_prompts, text_width, vision_width: the sizes B, Pt, Pv, Dt, Dv.
        channel_gates: the gates have one value a channel.
        temperature: its value.
        name: a short one, for tables.
    """

    batch: int
    text_prompts: int
    vision_prompts: int
    text_width: int = 768
    vision_width: int = 1024
    channel_gates: bool = False
    temperature: float = 0.1
    name: str = ""

    outputs: ClassVar[tuple[str, ...]] = ("next_text_prompt", "next_vision_prompt")

    @property
    def reductions(self) -> dict[str, int]:
        """The longest sum behind an element of each output and of each input's gradient.

        Over a width, or, for what the batch shares, over all rows (a scalar: and their channels).
        """
        rows = self.batch * max(self.text_prompts, self.vision_prompts)
        width = max(self.text_width, self.vision_width)
        prompts = dict.fromkeys((*self.outputs, "text_prompt", "vision_prompt"), width)
        weights = ("text_to_vision_weight", "text_to_vision_bias", "vision_to_text_weight", "vision_to_text_bias")
        gates = dict.fromkeys(("text_gate", "vision_gate"), rows * (1 if self.channel_gates else width))
        return prompts | dict.fromkeys(weights, max(rows, width)) | gates | {"temperature": rows * width}

    def make(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Random tensors by parameter name, made in ``dtype``; weights as ``nn.Linear`` draws their size."""
        device = torch.device(device)
        random = _generator(device, seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

        text, vision = self.text_width, self.vision_width
        return {
            "text_prompt": draw(self.batch, self.text_prompts, text),
            "vision_prompt": draw(self.batch, self.vision_prompts, vision),
            "text_to_vision_weight": draw(vision, text, scale=text**-0.5),
            "text_to_vision_bias": draw(vision, scale=0.1),
            "vision_to_text_weight": draw(text, vision, scale=vision**-0.5),
            "vision_to_text_bias": draw(text, scale=0.1),
            "text_gate": draw(*([text] if self.channel_gates else []), scale=0.5),
            "vision_gate": draw(*([vision] if self.channel_gates else []), scale=0.5),
            "temperature": torch.tensor(self.temperature, dtype=dtype, device=device),
        }

    def options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The other arguments of the call: none."""
        return {}

    def flops(self, mode: str = "forward") -> float:
        """Floating-point operations of the two projections (the rest is small beside them)."""
        rows = self.batch * (self.text_prompts + self.vision_prompts)
        products = {"forward": 1, "backward": 2, "forward+backward": 3}[mode]
        return 2.0 * products * rows * self.text_width * self.vision_width

    def bytes_moved(self, dtype: torch.dtype, mode: str = "forward") -> float:
        """Bytes if prompts, weights and results went over the bus once (twice the reading with gradients)."""
        prompts = self.batch * (self.text_prompts * self.text_width + self.vision_prompts * self.vision_width)
        weights = 2 * self.text_width * self.vision_width + self.text_width + self.vision_width
        values = {"forward": 2 * prompts + weights, "backward": 3 * prompts + 2 * weights}
        values["forward+backward"] = values["forward"] + values["backward"]
        return float(values[mode] * dtype.itemsize)

    def row(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class WindowCase:
    """One call of :func:`epic_fast.functional.window_prompt_attention`.

    Attributes:
        batch, windows, heads, tokens, prompts, head_dim: the sizes B, nW, H, M, P, D.
        bias, mask: whether there are a bias of relative positions and a mask.
        bias_gradient: the bias is one of the differentiable tensors.
        scale: as in the call.
        layout: one of :data:`LAYOUTS`; packed are the windows' tokens, ``(B * nW, M, 3, H, D)``.
        name: a short one, for tables.
    """

    batch: int
    windows: int
    heads: int
    tokens: int
    prompts: int
    head_dim: int = 32
    bias: bool = True
    mask: bool = False
    bias_gradient: bool = False
    scale: float | None = None
    layout: str = "tokens"
    name: str = ""

    outputs: ClassVar[tuple[str, ...]] = ("output", "prompt_output")

    @property
    def reductions(self) -> dict[str, int]:
        """The longest sum behind an element of each output and of each input's gradient.

        Over the keys, the channels or the rows; for what a prompt gets also over windows, for the bias over the batch.
        """
        rows = max(self.prompts + self.tokens, self.head_dim)
        own: dict[str, int] = dict.fromkeys(("output", "query", "key", "value"), rows)
        prompts = dict.fromkeys(("prompt_output", "prompt_query", "prompt_key", "prompt_value"), self.windows * rows)
        return own | prompts | {"relative_position_bias": self.batch * self.windows * self.head_dim}

    def make(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Random tensors by parameter name, standard normal, made in ``dtype``."""
        device = torch.device(device)
        random = _generator(device, seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device).to(dtype)

        def parts(batch: int, rows: int) -> list[Tensor]:
            if self.layout == "packed":
                return list(draw(batch, rows, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4))
            if self.layout == "heads":
                return [draw(batch, self.heads, rows, self.head_dim) for _ in range(3)]
            return [draw(batch, rows, self.heads, self.head_dim).transpose(1, 2) for _ in range(3)]

        tokens, prompts = parts(self.batch * self.windows, self.tokens), parts(self.batch, self.prompts)
        names = ("query", "key", "value", "prompt_query", "prompt_key", "prompt_value")
        made: dict[str, Tensor | None] = dict(zip(names, [*tokens, *prompts], strict=True))
        if self.bias_gradient:
            made["relative_position_bias"] = self._bias(device, dtype)
        return made

    def options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The other arguments of the call.

        The bias is in bfloat16, so that every type holds it as it is; the mask hides a third of the pairs and nobody
        from itself, in the last half of the windows (as a shift does).
        """
        device = torch.device(device)
        found: dict[str, Any] = {"window_mask": None, "scale": self.scale}
        if not self.bias_gradient:
            found["relative_position_bias"] = self._bias(device, torch.bfloat16)
        if self.mask:
            random = _generator(device, 5)
            pairs = (self.windows, self.tokens, self.tokens)
            if device.type == "meta":
                found["window_mask"] = torch.empty(pairs, dtype=torch.bool, device=device)
            else:
                seen = torch.rand(pairs, generator=random, device=device) < 0.66
                seen[: self.windows // 2] = True
                found["window_mask"] = seen | torch.eye(self.tokens, dtype=torch.bool, device=device)
        return found

    def _bias(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        if not self.bias:
            return None
        shape = (self.heads, self.tokens, self.tokens)
        return torch.randn(shape, generator=_generator(device, 3), device=device).to(dtype)

    def flops(self, mode: str = "forward") -> float:
        """Floating-point operations of the two (forward) or five (backward) products; the mask counts for nothing."""
        products = {"forward": 2, "backward": 5, "forward+backward": 7}[mode]
        rows = self.prompts + self.tokens
        return 2.0 * products * self.batch * self.windows * self.heads * self.head_dim * rows * rows

    def bytes_moved(self, dtype: torch.dtype, mode: str = "forward") -> float:
        """Bytes if q, k, v and the output went over the bus once; backward, q, k, v, and the gradients of all four."""
        rows = self.batch * (self.windows * self.tokens + self.prompts)
        values = {"forward": 4 * rows, "backward": 7 * rows, "forward+backward": 11 * rows}[mode]
        pairs = self.tokens * self.tokens * (self.heads * self.bias * 2 + self.windows * self.mask)
        return float(values * self.heads * self.head_dim * dtype.itemsize + pairs)

    def row(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class MixCase:
    """One call of :func:`epic_fast.functional.mix_prompt_experts`.

    Attributes:
        batch, experts, length, width: the sizes B, E, L, C.
        temperature, top_k: as in the call.
        name: a short one, for tables.
    """

    batch: int
    experts: int
    length: int
    width: int
    temperature: float = 0.1
    top_k: int | None = None
    name: str = ""

    outputs: ClassVar[tuple[str, ...]] = ("prompts", "scores")

    @property
    def reductions(self) -> dict[str, int]:
        """The longest sum behind an element of each output and of each input's gradient."""
        values = self.length * self.width
        return {"prompts": self.experts, "scores": self.experts, "router_logits": values, "experts": self.batch}

    def make(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Random tensors by parameter name, made in ``dtype``; logits that leave several experts a weight."""
        device = torch.device(device)
        random = _generator(device, seed)
        logits = torch.randn(self.batch, self.experts, generator=random, device=device) * self.temperature
        experts = torch.randn(self.experts, self.length, self.width, generator=random, device=device)
        return {"router_logits": logits.to(dtype), "experts": experts.to(dtype)}

    def options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The other arguments of the call."""
        return {"temperature": self.temperature, "top_k": self.top_k}

    def flops(self, mode: str = "forward") -> float:
        """Floating-point operations of the one (forward) or two (backward) products."""
        products = {"forward": 1, "backward": 2, "forward+backward": 3}[mode]
        return 2.0 * products * self.batch * self.experts * self.length * self.width

    def bytes_moved(self, dtype: torch.dtype, mode: str = "forward") -> float:
        """Bytes if experts and prompts went over the bus once; backward, both, and the experts' gradient."""
        experts, prompts = self.experts * self.length * self.width, self.batch * self.length * self.width
        logits = 2 * self.batch * self.experts
        values = {"forward": experts + prompts + logits, "backward": 2 * experts + prompts + 2 * logits}
        values["forward+backward"] = values["forward"] + values["backward"]
        return float(values[mode] * dtype.itemsize)

    def row(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class InfusedAttentionCase:
    """One call of :func:`epic_fast.functional.infused_attention`.

    Attributes:
        batch, heads, key_heads, tokens, head_dim: the sizes B, H, Hk, N, D.
        form, causal, scale: as in the call.
        last: the query is the last valid token's row alone.
        lengths: valid tokens of each sample, or None.
        layout: one of :data:`LAYOUTS`; packed are the tokens, ``(B, N, H + 2 Hk, D)``.
        wide_vectors: multipliers, shift and gate are float32 whatever the tokens are, as trainable modules give them.
        name: a short one, for tables.
    """

    batch: int
    heads: int
    key_heads: int
    tokens: int
    head_dim: int = 128
    form: str = "residual"
    causal: bool = True
    scale: float | None = None
    last: bool = False
    lengths: tuple[int, ...] | None = None
    layout: str = "tokens"
    wide_vectors: bool = False
    name: str = ""

    outputs: ClassVar[tuple[str, ...]] = ("output",)

    @property
    def rows(self) -> int:
        """The query's."""
        return 1 if self.last else self.tokens

    @property
    def reductions(self) -> dict[str, int]:
        """The longest sum behind an element of each output and of each input's gradient.

        Over keys, channels or, for keys and values, the rows of a group of query heads; for vectors over what a row's
        gradient sums as well, for the gate over channels too.
        """
        once, group = max(self.tokens, self.head_dim), self.heads // self.key_heads
        summed = group * self.rows * once
        vectors = dict.fromkeys(("key_multiplier", "value_multiplier", "value_shift"), summed)
        own = {"output": once, "query": once, "key": group * once, "value": group * once}
        return own | vectors | {"gate": summed * self.head_dim}

    def make(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Random tensors by parameter name, made in ``dtype``: tokens standard normal, vectors of half that size (views
        of one buffer, as one product gives them), gates between 0.3 and 0.9."""
        device = torch.device(device)
        random = _generator(device, seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device).to(dtype)

        heads = (self.heads, self.key_heads, self.key_heads)
        if self.layout == "packed" and not self.last:
            packed = draw(self.batch, self.tokens, sum(heads), self.head_dim).transpose(1, 2)
            tokens = list(packed.split(heads, dim=1))
        else:
            tokens = []
            for count, rows in zip(heads, (self.rows, self.tokens, self.tokens), strict=True):
                if self.layout == "heads":
                    tokens.append(draw(self.batch, count, rows, self.head_dim))
                else:
                    tokens.append(draw(self.batch, rows, count, self.head_dim).transpose(1, 2))
        of_vectors = torch.float32 if self.wide_vectors else dtype
        vectors = torch.randn(self.batch, 3, self.key_heads, self.head_dim, generator=random, device=device)
        vectors = (vectors * 0.5).to(of_vectors)
        gate = 0.3 + 0.6 * torch.rand(self.batch, self.key_heads, generator=random, device=device)
        names = ("query", "key", "value", "key_multiplier", "value_multiplier", "value_shift", "gate")
        return dict(zip(names, [*tokens, *vectors.unbind(1), gate.to(of_vectors)], strict=True))

    def options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The other arguments of the call."""
        lengths = None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int32, device=device)
        return {"form": self.form, "causal": self.causal, "lengths": lengths, "scale": self.scale}

    def flops(self, mode: str = "forward") -> float:
        """Floating-point operations of the two (forward) or six (backward) products over what is visible."""
        visible = 0
        for length in self.lengths or (self.tokens,) * self.batch:
            square = length * (length + 1) // 2 if self.causal else length * length
            visible += length if self.last else square
        products = {"forward": 2, "backward": 6, "forward+backward": 8}[mode]
        return 2.0 * products * self.heads * self.head_dim * visible

    def bytes_moved(self, dtype: torch.dtype, mode: str = "forward") -> float:
        """Bytes if q, k, v and the output went over the bus once; backward, q, k, v, and the gradients of all four."""
        query, keys = self.heads * self.rows, 2 * self.key_heads * self.tokens
        values = {"forward": 2 * query + keys, "backward": 3 * query + 2 * keys}
        values["forward+backward"] = values["forward"] + values["backward"]
        return float(values[mode] * self.batch * self.head_dim * dtype.itemsize)

    def row(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class GateCase:
    """One call of :func:`epic_fast.functional.infusion_gate`.

    Attributes:
        batch, key_heads, tokens, head_dim: the sizes B, Hk, N, D.
        lengths: valid tokens of each sample, or None.
        layout: ``"heads"`` or ``"tokens"`` of :data:`LAYOUTS`.
        wide_vectors: shift and bias are float32 whatever the value is.
        name: a short one, for tables.
    """

    batch: int
    key_heads: int
    tokens: int
    head_dim: int = 128
    lengths: tuple[int, ...] | None = None
    layout: str = "tokens"
    wide_vectors: bool = False
    name: str = ""

    outputs: ClassVar[tuple[str, ...]] = ("gate",)

    @property
    def reductions(self) -> dict[str, int]:
        """The longest sum behind an element of each output and of each input's gradient: sums over values come divided
        by their norm, so only that over the batch counts."""
        return dict.fromkeys(("gate", "value", "value_shift"), 1) | {"head_bias": self.batch}

    def make(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Random tensors by parameter name, made in ``dtype``; values that lean towards the shift."""
        device = torch.device(device)
        random = _generator(device, seed)
        of_vectors = torch.float32 if self.wide_vectors else dtype
        shift = torch.randn(self.batch, self.key_heads, self.head_dim, generator=random, device=device)
        value = torch.randn(
            self.batch, self.tokens, self.key_heads, self.head_dim, generator=random, device=device
        ).transpose(1, 2)
        value = (value + 0.3 * shift[:, :, None]).to(dtype)
        bias = torch.randn(self.key_heads, generator=random, device=device)
        return {
            "value": value.contiguous() if self.layout == "heads" else value,
            "value_shift": shift.to(of_vectors),
            "head_bias": bias.to(of_vectors),
        }

    def options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The other arguments of the call."""
        lengths = None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int32, device=device)
        return {"lengths": lengths}

    def flops(self, mode: str = "forward") -> float:
        """Floating-point operations: a sum and a square of each value, and as much for its gradient."""
        passes = {"forward": 1, "backward": 1, "forward+backward": 2}[mode]
        return 3.0 * passes * self.batch * self.key_heads * self.tokens * self.head_dim

    def bytes_moved(self, dtype: torch.dtype, mode: str = "forward") -> float:
        """Bytes if the values went over the bus once; backward, they and their gradient."""
        passes = {"forward": 1, "backward": 2, "forward+backward": 3}[mode]
        return float(passes * self.batch * self.key_heads * self.tokens * self.head_dim * dtype.itemsize)

    def row(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class SwigluCase:
    """One call of :func:`epic_fast.functional.infused_swiglu`.

    Attributes:
        batch, tokens, width: the sizes B, N, F.
        packed: the projections are the halves of one ``(B, N, 2F)``.
        wide_vectors: the multiplier is float32 whatever the projections are.
        name: a short one, for tables.
    """

    batch: int
    tokens: int
    width: int
    packed: bool = False
    wide_vectors: bool = False
    name: str = ""

    outputs: ClassVar[tuple[str, ...]] = ("hidden",)

    @property
    def reductions(self) -> dict[str, int]:
        """The longest sum behind an element of each output and of each input's gradient."""
        return dict.fromkeys(("hidden", "gate_projection", "up_projection"), 1) | {"multiplier": self.tokens}

    def make(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Random tensors by parameter name, made in ``dtype``, standard normal; multipliers around 1."""
        device = torch.device(device)
        random = _generator(device, seed)
        both = torch.randn(self.batch, self.tokens, 2 * self.width, generator=random, device=device).to(dtype)
        projections = list(both.chunk(2, dim=-1))
        if not self.packed:
            projections = [each.contiguous() for each in projections]
        multiplier = 1 + 0.5 * torch.randn(self.batch, self.width, generator=random, device=device)
        return {
            "gate_projection": projections[0],
            "up_projection": projections[1],
            "multiplier": multiplier.to(torch.float32 if self.wide_vectors else dtype),
        }

    def options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The other arguments of the call: none."""
        return {}

    def flops(self, mode: str = "forward") -> float:
        """Floating-point operations, a sigmoid counted as four."""
        each = {"forward": 7, "backward": 16, "forward+backward": 23}[mode]
        return float(each * self.batch * self.tokens * self.width)

    def bytes_moved(self, dtype: torch.dtype, mode: str = "forward") -> float:
        """Bytes if both projections and the result went over the bus once; backward, with two gradients more."""
        tensors = {"forward": 3, "backward": 5, "forward+backward": 8}[mode]
        return float(tensors * self.batch * self.tokens * self.width * dtype.itemsize)

    def row(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def _generator(device: torch.device, seed: int) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class RouteCase:
    """One call of :func:`epic_fast.ops.route_prompts.route_prompts`.

    Attributes:
        batch, experts, length, width: the sizes B, E, L, C.
        tokens, old_prompts: rows T and O of the products.
        own, other: numbers J and D of a query; own 0: no products, other 0: no router.
        static, dynamic, mapped: whether there are static and mixed rows, and how many mapped ones.
        temperature, top_k: as in the call.
        name: a short one, for tables.
    """

    batch: int
    experts: int
    length: int
    width: int
    tokens: int = 196
    old_prompts: int = 13
    own: int = 2
    other: int = 8
    static: bool = True
    dynamic: bool = True
    mapped: int = 1
    temperature: float = 0.1
    top_k: int | None = None
    name: str = ""

    outputs: ClassVar[tuple[str, ...]] = ("out", "normed", "scores")

    @property
    def rows(self) -> int:
        return self.length * (self.static + self.dynamic) + self.mapped

    def make(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> dict[str, Any]:
        """Random arguments by parameter name but the two tensors to write, rows in ``dtype``; a router of the size that
        leaves several experts a weight."""
        device = torch.device(device)
        random = _generator(device, seed)

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

        wide, own = torch.float32, self.own if self.other else 0
        query = self.temperature / max(own + self.other, 1) ** 0.5
        count = max(self.tokens + self.old_prompts, 1)
        dots = query * count**0.5  # of which the mean is taken
        return {
            "norm_weight": 1 + draw(self.width, scale=0.3),
            "norm_bias": draw(self.width, scale=0.3),
            "eps": 1e-5,
            "token_dots": draw(self.batch, self.tokens, own, scale=dots, dtype=wide) if own else None,
            "prompt_dots": draw(self.batch, self.old_prompts, own, scale=dots, dtype=wide) if own else None,
            "count": count,
            "router_bias": draw(own, scale=query) if own else None,
            "projected": draw(self.batch, self.other, scale=query) if self.other else None,
            "embeddings": draw(own + self.other, self.experts) if self.other else None,
            "static": draw(self.length, self.width) if self.static else None,
            "experts": draw(self.experts, self.length, self.width) if self.dynamic else None,
            "mapped": draw(self.batch, self.mapped, self.width) if self.mapped else None,
        }

    def targets(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """``out`` and ``normed``, to be written: NaN until then."""
        shape = (self.batch, self.rows, self.width)
        out, normed = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
        return out, normed

    def options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The other arguments of the call."""
        return {"temperature": self.temperature, "top_k": self.top_k}


@dataclass(frozen=True)
class MergeCase:
    """One call of :func:`epic_fast.ops.merge_patches.merge_patches`.

    Attributes:
        batch, rows, columns, prompts, width: samples B, the grid of a sample's tokens, prompts P, columns C.
        branch: whether there is a second term.
        name: a short one, for tables.
    """

    batch: int
    rows: int
    columns: int
    prompts: int
    width: int
    branch: bool = True
    name: str = ""

    @property
    def count(self) -> int:
        """Rows of the stream."""
        return self.batch * (self.rows * self.columns + self.prompts)

    @property
    def merged(self) -> int:
        """Groups of tokens of all samples."""
        return self.batch * -(-self.rows // 2) * -(-self.columns // 2)

    def make(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> dict[str, Any]:
        """Random arguments by parameter name, rows and parameters in ``dtype``."""
        device = torch.device(device)
        random = _generator(device, seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

        return {
            "stream": draw(self.count, self.width),
            "branch": draw(self.count, self.width) if self.branch else None,
            "batch": self.batch,
            "grid": (self.rows, self.columns),
            "weight": 1 + draw(4 * self.width, scale=0.3),
            "bias": draw(4 * self.width, scale=0.3),
            "eps": 1e-5,
        }


InfusionCase = InfusedAttentionCase | GateCase | SwigluCase
Case = AttentionCase | InteractionCase | WindowCase | MixCase | InfusionCase

ATTENTION_MEASURED = (
    AttentionCase(64, 16, 257, 16, name="vision L/14"),
    AttentionCase(32, 16, 577, 16, name="vision L/14@336"),
    AttentionCase(64, 12, 77, 16, causal=True, name="text L"),
    AttentionCase(32, 16, 512, 32, causal=True, name="long text"),
    AttentionCase(256, 16, 257, 16, name="vision L/14, large batch"),
)
"""The five cases that today's alternatives were measured at; the text cases have the prompt-visible causal mask."""

ATTENTION_PRODUCTION = tuple(
    AttentionCase(4, heads, tokens, prompts, causal=causal, name=f"{tower}, P={prompts}")
    for tower, heads, tokens, causal in (
        ("vision B/32", 12, 50, False),
        ("vision B/16", 12, 197, False),
        ("vision L/14", 16, 257, False),
        ("vision L/14@336", 16, 577, False),
        ("text", 8, 77, True),
    )
    for prompts in (8, 16, 32)
)
"""CLIP's lengths with 8, 16 and 32 prompts, at a small batch: for numerics and for ahead-of-time compilation."""

ATTENTION_SMOKE = (
    AttentionCase(2, 2, 9, 3, 16, name="smoke"),
    AttentionCase(2, 2, 5, 2, 16, causal=True, lengths=(5, 3), name="smoke, causal, lengths"),
)

INTERACTION_MEASURED = (
    InteractionCase(64, 8, 8, name="L, B=64, P=8"),
    InteractionCase(8, 8, 8, name="L, B=8, P=8"),
    InteractionCase(64, 16, 16, name="L, B=64, P=16"),
    InteractionCase(8, 16, 16, name="L, B=8, P=16"),
)
"""The hub between CLIP-L's towers, 768 and 1024 wide, at the sizes that today's alternatives were measured at."""

INTERACTION_PRODUCTION = tuple(
    InteractionCase(4, prompts, prompts, text, vision, channel_gates=gates, name=f"{tower}, P={prompts}")
    for tower, text, vision in (("B", 512, 768), ("L", 768, 1024))
    for prompts, gates in ((8, False), (16, True), (32, False))
)

INTERACTION_SMOKE = (
    InteractionCase(2, 3, 4, 16, 24, name="smoke"),
    InteractionCase(3, 2, 2, 16, 16, channel_gates=True, name="smoke, channel gates"),
)

WINDOW_MEASURED = tuple(
    WindowCase(64, windows, heads, 49, 13, mask=mask, name=f"Swin-B, stage {stage}{', shifted' if mask else ''}")
    for stage, windows, heads in ((0, 64, 4), (1, 16, 8), (2, 4, 16))
    for mask in (False, True)
)
"""MoPE's 13 prompts in the windows of a Swin-B at 224 pixels; the fourth stage has one window and no shift."""

WINDOW_PRODUCTION = (
    *(
        replace(each, batch=4, layout=layout, name=f"{each.name}{', packed' if layout == 'packed' else ''}")
        for each, layout in zip(WINDOW_MEASURED, ("tokens", "packed") * 3, strict=True)
    ),
    WindowCase(4, 1, 32, 49, 13, name="Swin-B, stage 3"),
    WindowCase(2, 16, 4, 144, 13, mask=True, name="Swin-B at 384, stage 1"),
    WindowCase(2, 4, 4, 49, 64, mask=True, name="64 prompts"),
)

WINDOW_SMOKE = (
    WindowCase(2, 3, 2, 9, 3, 16, name="smoke"),
    WindowCase(2, 4, 2, 9, 2, 16, mask=True, layout="packed", name="smoke, shifted"),
)

MIX_MEASURED = tuple(
    MixCase(64, experts, 6, width, name=f"Swin-B, C={width}, E={experts}")
    for width, experts in ((128, 4), (512, 4), (512, 16), (1024, 16))
)
"""MoPE's experts in the stages of a Swin-B, four a block as published and sixteen."""

MIX_PRODUCTION = (
    *(replace(each, batch=16) for each in MIX_MEASURED),
    MixCase(16, 16, 6, 512, top_k=2, name="top 2 of 16"),
    MixCase(7, 3, 5, 100, temperature=0.7, name="odd sizes"),
    MixCase(5, 1, 4, 64, name="one expert"),
)

MIX_SMOKE = (MixCase(3, 4, 2, 16, name="smoke"), MixCase(3, 5, 2, 16, top_k=2, name="smoke, top 2"))

ROUTE_PRODUCTION = (
    *(
        RouteCase(64, 4, 6, width, tokens, name=f"Swin-B, C={width}")
        for width, tokens in ((128, 3136), (256, 784), (512, 196), (1024, 49))
    ),
    RouteCase(64, 64, 6, 512, top_k=2, name="top 2 of 64"),
    RouteCase(16, 4, 6, 512, own=0, name="the other modality alone"),
    RouteCase(16, 4, 6, 512, other=0, name="no router"),
    RouteCase(7, 3, 5, 100, temperature=0.7, name="odd sizes"),
    RouteCase(16, 4, 6, 4096, name="C=4096"),
    RouteCase(16, 4, 6, 8192, name="C=8192"),
)
"""The routed layers of MoPE in the stages of a Swin-B, and what its options change."""

MERGE_MEASURED = tuple(
    MergeCase(64, side, side, 13, width, name=f"Swin-B, C={width}") for side, width in ((56, 128), (28, 256), (14, 512))
)
"""Between the stages of a Swin-B at 224 pixels, with MoPE's 13 prompts."""

MERGE_PRODUCTION = (
    *MERGE_MEASURED,
    *(replace(each, branch=False, name=f"{each.name}, no branch") for each in MERGE_MEASURED),
    MergeCase(1, 1, 1, 0, 128, name="one group, C=128"),
    MergeCase(5, 7, 3, 3, 128, name="odd grid, C=128"),
    MergeCase(64, 56, 56, 0, 96, name="Swin-T, C=96, no prompts"),
    MergeCase(64, 7, 7, 13, 768, name="C=768, odd grid"),
    MergeCase(3, 9, 6, 5, 100, name="odd sizes"),
    MergeCase(8, 14, 14, 13, 1, name="C=1"),
    MergeCase(8, 14, 14, 13, 1024, name="C=1024"),
    MergeCase(8, 14, 14, 13, 2048, name="C=2048"),
    MergeCase(8, 14, 14, 13, 4096, name="C=4096"),
)
"""These, Swin's narrower towers, and the widths at which the tile changes."""

INFUSED_MEASURED = tuple(
    InfusedAttentionCase(8, 32, 32, tokens, wide_vectors=True, name=f"LLaMA-2-7B, n={tokens}") for tokens in (40, 64)
)
"""The texts of MiT in a layer of LLaMA-2-7B, B=8."""

INFUSED_PRODUCTION = (
    *(
        replace(each, lengths=(each.tokens, 7, each.tokens - 3, 1, 0, 20, 33, 16), name=f"{each.name}, lengths")
        for each in INFUSED_MEASURED
    ),
    *(replace(each, last=True, name=f"{each.name}, last row") for each in INFUSED_MEASURED),
    replace(INFUSED_MEASURED[1], form="replace", layout="packed", name="LLaMA-2-7B, replace, packed"),
    InfusedAttentionCase(8, 32, 8, 64, wide_vectors=True, name="Mistral-7B, n=64"),
    InfusedAttentionCase(4, 32, 8, 200, wide_vectors=True, name="Mistral-7B, n=200"),
    InfusedAttentionCase(16, 9, 3, 48, 64, wide_vectors=True, name="SmolLM2-135M, n=48"),
    InfusedAttentionCase(4, 9, 3, 300, 64, lengths=(300, 17, 128, 0), name="SmolLM2-135M, n=300, lengths"),
    InfusedAttentionCase(4, 14, 2, 40, 64, layout="packed", name="Qwen2-0.5B, n=40"),
)

INFUSED_SMOKE = (
    InfusedAttentionCase(2, 4, 2, 9, 16, lengths=(9, 4), name="smoke"),
    InfusedAttentionCase(2, 2, 2, 5, 24, form="replace", causal=False, layout="packed", name="smoke, replace"),
)

GATE_MEASURED = tuple(GateCase(8, 32, tokens, wide_vectors=True, name=f"LLaMA-2-7B, n={tokens}") for tokens in (40, 64))

GATE_PRODUCTION = (
    replace(GATE_MEASURED[1], lengths=(64, 7, 61, 1, 0, 20, 33, 16), name="LLaMA-2-7B, lengths"),
    GateCase(4, 8, 200, layout="heads", name="Mistral-7B, n=200"),
    GateCase(16, 3, 48, 64, wide_vectors=True, name="SmolLM2-135M, n=48"),
)

GATE_SMOKE = (GateCase(2, 2, 9, 16, lengths=(9, 4), name="smoke"),)

SWIGLU_MEASURED = tuple(
    SwigluCase(8, tokens, 11008, wide_vectors=True, name=f"LLaMA-2-7B, n={tokens}") for tokens in (40, 64)
)

SWIGLU_PRODUCTION = (
    SwigluCase(8, 1, 11008, wide_vectors=True, name="LLaMA-2-7B, last row"),
    SwigluCase(4, 200, 14336, packed=True, wide_vectors=True, name="Mistral-7B, n=200, packed"),
    SwigluCase(16, 48, 1536, name="SmolLM2-135M, n=48"),
)

SWIGLU_SMOKE = (SwigluCase(2, 5, 24, packed=True, name="smoke"),)


def attention_cases(
    *,
    max_batch: int = 3,
    max_heads: int = 2,
    max_tokens: int = 40,
    max_prompts: int = 20,
    head_dims: tuple[int, ...] = (16, 32, 48, 64, 80),
) -> SearchStrategy[AttentionCase]:
    """Any call of prompt attention up to these sizes, odd lengths and empty prompts included."""
    from hypothesis import strategies as st

    @st.composite
    def draw_case(draw: Any) -> AttentionCase:
        batch, tokens = draw(st.integers(1, max_batch)), draw(st.integers(1, max_tokens))
        lengths = st.lists(st.integers(0, tokens), min_size=batch, max_size=batch).map(tuple)
        shared = draw(st.booleans())
        return AttentionCase(
            batch=batch,
            heads=draw(st.integers(1, max_heads)),
            tokens=tokens,
            prompts=draw(st.integers(0, max_prompts)),
            head_dim=draw(st.sampled_from(head_dims)),
            prompt_mask=draw(st.sampled_from(("full", "prefix"))),
            causal=draw(st.booleans()),
            lengths=draw(st.none() | lengths),
            scale=draw(st.none() | st.sampled_from((0.05, 0.5))),
            shared=shared,
            prefix_tuning=draw(st.booleans()),
            layout=draw(st.sampled_from(LAYOUTS[:2] if shared else LAYOUTS)),
        )

    return draw_case()


def interaction_cases(
    *,
    max_batch: int = 3,
    max_prompts: int = 20,
    widths: tuple[int, ...] = (16, 24, 33, 64),
) -> SearchStrategy[InteractionCase]:
    """Any call of the prompt interaction up to these sizes."""
    from hypothesis import strategies as st

    prompts = st.integers(1, max_prompts)
    return st.builds(
        InteractionCase,
        batch=st.integers(1, max_batch),
        text_prompts=prompts,
        vision_prompts=prompts,
        text_width=st.sampled_from(widths),
        vision_width=st.sampled_from(widths),
        channel_gates=st.booleans(),
        temperature=st.sampled_from((0.07, 0.3, 1.0)),
    )


def window_cases(
    *,
    max_batch: int = 2,
    max_windows: int = 4,
    max_tokens: int = 24,
    max_prompts: int = 12,
    head_dims: tuple[int, ...] = (16, 24, 32, 48),
) -> SearchStrategy[WindowCase]:
    """Any call of window attention up to these sizes, without prompts as well."""
    from hypothesis import strategies as st

    return st.builds(
        WindowCase,
        batch=st.integers(1, max_batch),
        windows=st.integers(1, max_windows),
        heads=st.integers(1, 2),
        tokens=st.integers(1, max_tokens),
        prompts=st.integers(0, max_prompts),
        head_dim=st.sampled_from(head_dims),
        bias=st.booleans(),
        mask=st.booleans(),
        bias_gradient=st.booleans(),
        scale=st.none() | st.sampled_from((0.05, -0.3)),
        layout=st.sampled_from(LAYOUTS),
    )


def mix_cases(
    *, max_batch: int = 20, max_experts: int = 9, widths: tuple[int, ...] = (1, 16, 33, 64)
) -> SearchStrategy[MixCase]:
    """Any mixture up to these sizes."""
    from hypothesis import strategies as st

    @st.composite
    def draw_case(draw: Any) -> MixCase:
        experts = draw(st.integers(1, max_experts))
        return MixCase(
            batch=draw(st.integers(1, max_batch)),
            experts=experts,
            length=draw(st.integers(1, 6)),
            width=draw(st.sampled_from(widths)),
            temperature=draw(st.sampled_from((0.05, 0.1, 1.0))),
            top_k=draw(st.none() | st.integers(1, experts)),
        )

    return draw_case()


def infused_attention_cases(
    *, max_batch: int = 3, max_tokens: int = 40, head_dims: tuple[int, ...] = (16, 24, 32, 64, 80)
) -> SearchStrategy[InfusedAttentionCase]:
    """Any call of infused attention up to these sizes."""
    from hypothesis import strategies as st

    @st.composite
    def draw_case(draw: Any) -> InfusedAttentionCase:
        batch, tokens, key_heads = (
            draw(st.integers(1, max_batch)),
            draw(st.integers(1, max_tokens)),
            draw(st.integers(1, 2)),
        )
        lengths = st.lists(st.integers(0, tokens), min_size=batch, max_size=batch).map(tuple)
        return InfusedAttentionCase(
            batch=batch,
            heads=key_heads * draw(st.integers(1, 3)),
            key_heads=key_heads,
            tokens=tokens,
            head_dim=draw(st.sampled_from(head_dims)),
            form=draw(st.sampled_from(("residual", "replace"))),
            causal=draw(st.booleans()),
            scale=draw(st.none() | st.sampled_from((0.05, -0.3))),
            last=draw(st.booleans()),
            lengths=draw(st.none() | lengths),
            layout=draw(st.sampled_from(LAYOUTS)),
            wide_vectors=draw(st.booleans()),
        )

    return draw_case()


def gate_cases(
    *, max_batch: int = 3, max_tokens: int = 40, head_dims: tuple[int, ...] = (1, 16, 24, 64, 80)
) -> SearchStrategy[GateCase]:
    """Any gate up to these sizes."""
    from hypothesis import strategies as st

    @st.composite
    def draw_case(draw: Any) -> GateCase:
        batch, tokens = draw(st.integers(1, max_batch)), draw(st.integers(1, max_tokens))
        lengths = st.lists(st.integers(0, tokens), min_size=batch, max_size=batch).map(tuple)
        return GateCase(
            batch=batch,
            key_heads=draw(st.integers(1, 3)),
            tokens=tokens,
            head_dim=draw(st.sampled_from(head_dims)),
            lengths=draw(st.none() | lengths),
            layout=draw(st.sampled_from(LAYOUTS[:2])),
            wide_vectors=draw(st.booleans()),
        )

    return draw_case()


def swiglu_cases(
    *, max_batch: int = 3, max_tokens: int = 150, widths: tuple[int, ...] = (1, 16, 33, 200)
) -> SearchStrategy[SwigluCase]:
    """Any SwiGLU up to these sizes."""
    from hypothesis import strategies as st

    return st.builds(
        SwigluCase,
        batch=st.integers(1, max_batch),
        tokens=st.integers(1, max_tokens),
        width=st.sampled_from(widths),
        packed=st.booleans(),
        wide_vectors=st.booleans(),
    )


def with_batch(case: Case, batch: int) -> Any:
    """The same case for another batch; lengths are repeated or cut."""
    if isinstance(case, AttentionCase | InfusedAttentionCase | GateCase) and case.lengths is not None:
        repeated = (case.lengths * -(-batch // len(case.lengths)))[:batch]
        return replace(case, batch=batch, lengths=repeated)
    return replace(case, batch=batch)
