"""Tiles of the window kernels beside each other, in a CUDA graph: what the table in ``tiles.py`` is chosen from.

python -m benchmarks.window_sweep                                        # forward and backward, all measured cases
python -m benchmarks.window_sweep --passes backward --cases 1 5 --warps 4 8 --windows 4 8 16 --registers 0 168
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.timing import measure_graph
from epic_fast.kernels.window_prompt_attention.tiles import BackwardTiles, WindowTile  # pyright: ignore
from epic_fast.kernels.window_prompt_attention.triton_backward import (  # pyright: ignore[reportMissingImports]
    window_prompt_attention_backward,
)
from epic_fast.kernels.window_prompt_attention.triton_forward import (  # pyright: ignore[reportMissingImports]
    window_prompt_attention_forward,
)
from epic_fast.testing.cases import WINDOW_MEASURED, WindowCase


def calls(case: WindowCase, device: torch.device) -> tuple[Any, Any]:
    """The two launchers as functions of a tile; None takes the table's."""
    options = case.options(device)
    given = (
        *case.make(torch.bfloat16, device).values(),
        options["relative_position_bias"],
        options["window_mask"],
    )
    scale = case.head_dim**-0.5
    output, prompt_output, lse = window_prompt_attention_forward(*given, scale=scale)
    grads = torch.randn_like(output), torch.randn_like(prompt_output)

    def forward(tile: WindowTile | None) -> Any:
        return window_prompt_attention_forward(*given, scale=scale, tile=tile)

    def backward(tile: WindowTile | None) -> Any:
        tiles = None if tile is None else BackwardTiles(tile, tile, whole=tile)
        needs = (True,) * 6 + (False,)
        return window_prompt_attention_backward(*grads, *given, lse, scale=scale, needs=needs, tiles=tiles)

    return forward, backward


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.window_sweep", description=__doc__)
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"], choices=["forward", "backward"])
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(WINDOW_MEASURED)), help="numbers from 0")
    parser.add_argument("--warps", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--windows", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--registers", nargs="+", type=int, default=[0, 128, 168], help="0: no limit")
    parser.add_argument("--hold", nargs="+", type=int, default=[0, 1])
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("times are those of CUDA graphs, which need a GPU; none was found")
    device = torch.device("cuda")
    for number in given.cases:
        case = WINDOW_MEASURED[number]
        both = dict(zip(("forward", "backward"), calls(case, device), strict=True))
        for name in given.passes:
            grid = itertools.product(given.warps, given.stages, given.windows, given.registers, given.hold)
            tiles = [
                WindowTile(64, 64, warps, stages, windows, bool(hold), registers or None)
                for warps, stages, windows, registers, hold in grid
            ]
            found = []
            for tile in (None, *tiles):
                try:
                    taken = measure_graph(lambda tile=tile, call=both[name]: call(tile), device)
                except Exception as error:
                    print(f"{case.name}, {name}, {tile}: {type(error).__name__}", file=sys.stderr)
                    continue
                found.append((taken or 0.0, "the table's" if tile is None else tile))
            print(f"{case.name}, {name}, floor {1e3 * case.bytes_moved(torch.bfloat16, name) / 3e12:.4f} ms")
            for taken, tile in sorted(found, key=lambda each: each[0])[:8]:
                print(f"  {taken:.4f} ms  {tile}")
            table = [taken for taken, tile in found if isinstance(tile, str)]
            print(f"  the table's: {table[0] if table else float('nan'):.4f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
