"""One forward: our UNet, plain and with its guidance folded in, beside diffusers' UNet2DModel.

python benchmarks/bench_unet.py
python benchmarks/bench_unet.py --networks elpv --batches 1    # a part; the other rows stay as they were

diffusers runs in both memory layouts, and the faster one counts. `ratio` is its time over that of our folded network;
mparams and gflops are ours, d_mparams and d_gflops diffusers'.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from networks import SHAPES, arguments, bind, inputs, medians, ours, report, size, theirs

from ldm_sg.hardware import autocast, choose_device


def measure(name: str, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Time one network at one batch size in one dtype."""
    shape, device = SHAPES[name], choose_device()
    x, t, ids = inputs(shape, batch)
    label = torch.eye(shape.num_clusters, device=device)[ids]
    mine, other = ours(shape), theirs(shape)
    plain_size, other_size = size(mine, lambda: mine(x, t, label)), size(other, lambda: other(x, t, ids))
    mine = mine.to(memory_format=torch.channels_last)
    layouts = {"nchw": other.to(dtype), "nhwc": theirs(shape).to(dtype, memory_format=torch.channels_last)}
    last = x.contiguous(memory_format=torch.channels_last)
    typed = {"nchw": x.to(dtype), "nhwc": last.to(dtype)}

    def run_theirs(layout: str) -> object:
        with torch.autocast(device.type, enabled=False):
            return layouts[layout](typed[layout], t, ids)

    with torch.inference_mode(), autocast(device, dtype):  # around all calls: our weights are cast once, as in sampling
        folded = bind(mine, {"label": label})
        calls = {"plain": lambda: mine(last, t, label), "folded": lambda: folded(x, t)}
        seconds = medians(calls | {layout: partial(run_theirs, layout) for layout in layouts}, rounds)
    best = min(seconds["nchw"], seconds["nhwc"])
    row = {"network": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "mparams": plain_size[0]}
    row |= {"gflops": plain_size[1], "d_mparams": other_size[0], "d_gflops": other_size[1]}
    row |= {f"{key}_ms": 1e3 * value for key, value in seconds.items()}
    return row | {"ratio": best / seconds["folded"]}


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    cases = [(name, batch, dtype) for name in args.networks for batch in args.batches for dtype in args.dtypes]
    report("unet", (measure(*case, args.rounds) for case in cases))


if __name__ == "__main__":
    main()
