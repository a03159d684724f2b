"""How a backbone is named in one string."""

from __future__ import annotations

from epic_fast.errors import ConfigError


def split_pair(spec: str) -> tuple[str, str]:
    """``"vision=A,text=B"`` to ``("A", "B")``; any other name stands for both towers."""
    if not spec.startswith(("vision=", "text=")):
        return spec, spec
    sides = dict(part.split("=", 1) for part in spec.split(",") if "=" in part)
    if set(sides) != {"vision", "text"}:
        raise ConfigError(f"the backbone {spec!r} names {', '.join(sides)}; wanted 'vision=PATH,text=PATH'")
    return sides["vision"], sides["text"]
