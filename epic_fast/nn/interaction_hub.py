"""The hub between the towers: EPIC's trainable projections, gates and temperature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from epic_fast import functional


class InteractionHub(nn.Module):
    """Holds the projections between the towers' spaces and mixes two prompt sets by similarity.

    Equations: :func:`epic_fast.functional.prompt_interaction`; a reconstruction of EPIC (arXiv 2507.07415).
    Tensors that nothing reads are not made, so that every trainable tensor gets a gradient.

    Args:
        text_width, vision_width: widths D_t and D_v of the two prompt sets.
        steps: how often the hub mixes (one less than the layer pairs); 0 where it never does.
        shared: one pair of projections for all steps, or one pair a step.
        starts_vision: the initial vision prompt is the projected text prompt (this uses step 0's projection).
        gate: ``"scalar"`` or ``"channel"``, one value a modality and step or one a channel.
        gate_init, learn_gates: where gates start, and whether they are trained.
        temperature, learn_temperature: where the temperature starts (trained in log space), and whether it is.
        activation: ``"none"``, or ``"gelu_layernorm"``: GELU and a layer norm without parameters on what is added.
    """

    text_gate: Tensor
    vision_gate: Tensor
    log_temperature: Tensor

    def __init__(
        self,
        text_width: int,
        vision_width: int,
        *,
        steps: int,
        shared: bool = True,
        starts_vision: bool = True,
        gate: str = "scalar",
        gate_init: float = 0.0,
        learn_gates: bool = True,
        temperature: float = 0.1,
        learn_temperature: bool = True,
        activation: str = "none",
    ):
        super().__init__()
        self.steps = steps
        self.shared = shared
        self.activation = activation
        copies = 1 if shared else steps
        outward = max(copies if steps else 0, 1 if starts_vision else 0)
        self.text_to_vision = nn.ModuleList(nn.Linear(text_width, vision_width) for _ in range(outward))
        self.vision_to_text = nn.ModuleList(nn.Linear(vision_width, text_width) for _ in range(copies if steps else 0))
        for name, width in (("text_gate", text_width), ("vision_gate", vision_width)):
            shape = (steps,) if gate == "scalar" else (steps, width)
            value = torch.full(shape, float(gate_init))
            if steps and learn_gates:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        log_temperature = torch.tensor(math.log(temperature))
        if steps and learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    def initial_vision_prompt(self, text_prompt: Tensor) -> Tensor:
        """The vision prompt that belongs to a text prompt ``(..., D_t)``: ``W_tv p_t + b``, ``(..., D_v)``."""
        return self.text_to_vision[0](text_prompt)

    def forward(self, text_prompt: Tensor, vision_prompt: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Prompts ``(B, P, D_t)``, ``(B, P, D_v)`` after a layer pair to those of the next; ``step`` from 0."""
        if self.activation == "none":
            parameters = self.parameters_of(step, text_prompt.dtype)
            return functional.prompt_interaction(text_prompt, vision_prompt, *parameters)
        copy = 0 if self.shared else step
        gates = self.text_gate[step], self.vision_gate[step]
        temperature = self.log_temperature.exp()
        # With a unit gate the operation returns prompt + mix, and the mix alone goes through the activation; in
        # at least float32, for the difference would lose the mix's digits in a lower precision.
        one = torch.ones_like(temperature)
        wide = torch.promote_types(text_prompt.dtype, torch.float32)
        text, vision = text_prompt.to(wide), vision_prompt.to(wide)
        mixed = functional.prompt_interaction(text, vision, *self._projections(copy, text.dtype), one, one, temperature)
        return (
            (text + gates[0] * self._activate(mixed[0] - text)).to(text_prompt.dtype),
            (vision + gates[1] * self._activate(mixed[1] - vision)).to(vision_prompt.dtype),
        )

    def parameters_of(self, step: int, dtype: torch.dtype, made: dict[Any, Any] | None = None) -> tuple[Tensor, ...]:
        """What step ``step`` gives to :func:`epic_fast.functional.prompt_interaction` beside prompts of ``dtype``.

        Args:
            made: what earlier steps of the same forward pass made of parameters that they share; filled.
        """
        made = {} if made is None else made
        projections = [
            each if each.dtype == dtype else self._copy_of(each, step, dtype, made)
            for each in self._projections(0 if self.shared else step, None)
        ]
        if "temperature" not in made:
            # The steps' gates at once: their gradients are put together in one piece.
            made["temperature"] = self.log_temperature.exp()
            made["gates"] = self.text_gate.unbind(), self.vision_gate.unbind()
        text_gates, vision_gates = made["gates"]
        return (*projections, text_gates[step], vision_gates[step], made["temperature"])

    def _copy_of(self, parameter: Tensor, step: int, dtype: torch.dtype, made: dict[Any, Any]) -> Tensor:
        """A parameter in another type; steps that share it share the cast."""
        key = id(parameter), dtype
        if key not in made:
            made[key] = _Copies.apply(parameter, dtype, self.steps if self.shared else 1)
        return made[key][step if self.shared else 0]

    def similarity(self, text_prompt: Tensor, vision_prompt: Tensor, step: int) -> Tensor:
        """The cosines that step ``step`` mixes by, before temperature and softmax: ``(B, P, P)``."""
        dtype = text_prompt.dtype
        _, _, weight, bias = self._projections(0 if self.shared else min(step, self.steps - 1), dtype)
        in_text = nn.functional.linear(vision_prompt, weight, bias)
        return nn.functional.cosine_similarity(text_prompt[:, :, None].float(), in_text[:, None].float(), dim=-1)

    @torch.no_grad()
    def fit_least_squares(self, text: Tensor, vision: Tensor, *, ridge: float = 0.3) -> None:
        """Start every projection as the ridge regression of one tower's prompts on the other's.

        Args:
            text, vision: ``(n, D_t)`` and ``(n, D_v)``, mean prompts of n pairs.
            ridge: penalty in units of the inputs' mean variance.
        """
        text, vision = text.double() - text.double().mean(dim=0), vision.double()
        means = vision.mean(dim=0)
        vision = vision - means
        for layers, source, target, mean in (
            (self.vision_to_text, vision, text, means),
            (self.text_to_vision, text, vision, text.mean(dim=0)),
        ):
            penalty = ridge * source.square().sum() / source.shape[1]
            identity = torch.eye(source.shape[1], dtype=source.dtype, device=source.device)
            weight = torch.linalg.solve(source.T @ source + penalty * identity, source.T @ target).T
            for layer in layers:
                assert isinstance(layer, nn.Linear)
                layer.weight.copy_(weight)
                layer.bias.copy_(-weight @ mean)

    def _projections(self, copy: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of both maps in ``dtype``; None: as they are."""
        outward, inward = self.text_to_vision[copy], self.vision_to_text[copy]
        assert isinstance(outward, nn.Linear)
        assert isinstance(inward, nn.Linear)
        own = outward.weight, outward.bias, inward.weight, inward.bias
        return own if dtype is None else tuple(each.to(dtype) for each in own)  # pyright: ignore[reportReturnType]

    @staticmethod
    def _activate(mix: Tensor) -> Tensor:
        return nn.functional.layer_norm(nn.functional.gelu(mix), mix.shape[-1:])

    def diagnostics(self) -> dict[str, float]:
        """Size of the gates (mean absolute value a step) and the temperature."""
        if not self.steps:
            return {}
        values = {"temperature": float(self.log_temperature.detach().exp())}
        for name, gate in (("text_gate", self.text_gate), ("vision_gate", self.vision_gate)):
            sizes = gate.detach().float().abs().reshape(self.steps, -1).mean(dim=1)
            values.update({f"{name}/{step}": float(size) for step, size in enumerate(sizes)})
        return values


class _Copies(torch.autograd.Function):
    """A parameter in another type, as often as it is read; the gradients add up in the parameter's own type, in one
    sum."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = parameter.dtype
        copy = parameter.to(dtype)
        return tuple(copy.detach() for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        given = [each for each in grads if each is not None]
        if len(given) < 2:
            return given[0].to(ctx.dtype) if given else None, None, None
        return torch.stack(given).sum(dim=0, dtype=ctx.dtype), None, None
