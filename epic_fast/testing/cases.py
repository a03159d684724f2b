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


def _generator(device: torch.device, seed: int) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


Case = AttentionCase | InteractionCase | WindowCase | MixCase

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


def with_batch(case: Case, batch: int) -> Any:
    """The same case for another batch; lengths are repeated or cut."""
    if isinstance(case, AttentionCase) and case.lengths is not None:
        repeated = (case.lengths * -(-batch // len(case.lengths)))[:batch]
        return replace(case, batch=batch, lengths=repeated)
    return replace(case, batch=batch)
