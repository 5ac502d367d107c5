"""Images per second with classifier-free guidance: our DDIM and DPM-Solver++ beside diffusers' UNet2DModel with DDIM.

python benchmarks/bench_sample.py
python benchmarks/bench_sample.py --networks elpv --batches 1    # a part; the other rows stay as they were

Same steps, dtype and batched guidance on both sides, in turn in one process; diffusers in the faster of its two memory
layouts. `ratio` is our DDIM over diffusers' of the same dtype, `over_fp32` over its float32, the default there; mparams
and gflops (of one forward of the batch) are ours, d_mparams and d_gflops diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from networks import SHAPES, Shape, arguments, bind, inputs, medians, ours, report, size, theirs
from torch import Tensor

from ldm_sg.diffusion import PARAMETERISATIONS, SAMPLERS, bind_halves, build_schedule, linear_steps, sample_linear
from ldm_sg.hardware import autocast, choose_device
from ldm_sg.model import UNet
from ldm_sg.sample.graph import replayed

SCALE = 2.0
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def sample_ours(network: UNet, x: Tensor, label: Tensor, name: str, steps: int, dtype: torch.dtype) -> Tensor:
    """Sample as `ldm_sg.sample.Sampler` does, the folding of the guidance included."""
    schedule = build_schedule("scaled_linear")
    with torch.inference_mode(), autocast(x.device, dtype):
        made = linear_steps(SAMPLERS[name], schedule, schedule.trajectory(steps), PARAMETERISATIONS["eps"], 0.0)
        assert made is not None, f"{name} has no table"
        guided = bind_halves(partial(bind, network), {"label": label}, SCALE)
        return sample_linear([guided], [True] * steps, x, made, dtype=dtype, replay=replayed(x.device))


def sample_theirs(network: UNet2DModel, x: Tensor, ids: Tensor, steps: int) -> Tensor:
    """Sample as a diffusers pipeline does."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0155,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    null = torch.full_like(ids, network.config.num_class_embeds - 1)
    both = torch.cat([null, ids])
    with torch.inference_mode():
        for t in scheduler.timesteps:
            free, conditional = network(torch.cat([x, x]), t, both).sample.chunk(2)
            x = scheduler.step(free + SCALE * (conditional - free), t, x).prev_sample
    return x


def calls(shape: Shape, batch: int, steps: int, dtypes: list[torch.dtype]) -> dict[str, Callable[[], object]]:
    """Give everything to be timed, by name."""
    x, _, ids = inputs(shape, batch)
    label = torch.eye(shape.num_clusters, device=x.device)[ids]
    mine = ours(shape).to(memory_format=torch.channels_last)
    made: dict[str, Callable[[], object]] = {}
    for dtype in dtypes:
        for sampler in ("ddim", "dpm++2m"):
            made[f"{sampler} {dtype}"] = partial(sample_ours, mine, x, label, sampler, steps, dtype)
        for layout in LAYOUTS:
            other = theirs(shape).to(dtype, memory_format=layout)
            made[f"{layout} {dtype}"] = partial(sample_theirs, other, x.to(dtype, memory_format=layout), ids, steps)
    return made


def sizes(shape: Shape, batch: int) -> dict[str, float]:
    """Give the parameters and GFLOPs of both networks."""
    x, t, ids = inputs(shape, batch)
    mine, other = ours(shape), theirs(shape)
    both = size(mine, lambda: mine(x, t, torch.eye(shape.num_clusters)[ids.cpu()].to(choose_device())))
    return dict(zip(("mparams", "gflops", "d_mparams", "d_gflops"), both + size(other, lambda: other(x, t, ids))))


def measure(name: str, batch: int, steps: int, rounds: int, dtypes: list[torch.dtype]) -> Iterator[dict[str, Any]]:
    """Time one network at one batch size, all in turn; a row for each dtype."""
    shape = SHAPES[name]
    seconds = medians(calls(shape, batch, steps, dtypes), rounds)
    best = {dtype: min(seconds[f"{layout} {dtype}"] for layout in LAYOUTS) for dtype in dtypes}
    for dtype in dtypes:
        ddim = seconds[f"ddim {dtype}"]
        row = {"network": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "steps": steps}
        row |= sizes(shape, batch)
        row |= {"ddim_img_s": batch / ddim, "dpm_img_s": batch / seconds[f"dpm++2m {dtype}"]}
        row |= {"d_img_s": batch / best[dtype], "ratio": best[dtype] / ddim}
        yield row | {"over_fp32": best[torch.float32] / ddim if torch.float32 in best else ""}


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    cases = [(name, batch, args.steps or SHAPES[name].steps) for name in args.networks for batch in args.batches]
    report("sample", (row for case in cases for row in measure(*case, args.rounds, args.dtypes)))


if __name__ == "__main__":
    main()
