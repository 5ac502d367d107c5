"""Images per second with classifier-free guidance: our DDIM and DPM-Solver++ beside diffusers' UNet2DModel with DDIM.

python benchmarks/bench_sample.py

Same steps, dtype and batched guidance on both sides, in turn in one process; diffusers in the faster of its two memory
layouts. `ratio` is our DDIM over diffusers' of the same dtype, `over_fp32` over diffusers' float32, its default.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from networks import SHAPES, arguments, bind, inputs, medians, ours, report, size, theirs
from torch import Tensor

from ldm_sg.diffusion import PARAMETERISATIONS, SAMPLERS, build_schedule, denoiser, guided_network
from ldm_sg.hardware import autocast, choose_device
from ldm_sg.model import UNet

SCALE = 2.0


def sample_ours(network: UNet, x: Tensor, label: Tensor, name: str, steps: int, dtype: torch.dtype) -> Tensor:
    """Sample as `ldm_sg.sample.Sampler` does, the folding of the guidance included."""
    schedule = build_schedule("scaled_linear")
    with torch.inference_mode(), autocast(x.device, dtype):
        guided = guided_network(partial(bind, network), {"label": label}, SCALE)
        return SAMPLERS[name](denoiser(guided, schedule, PARAMETERISATIONS["eps"]), x, schedule.trajectory(steps))


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


def measure(name: str, batch: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Time one network at one batch size in both dtypes; all in turn."""
    shape, device = SHAPES[name], choose_device()
    x, t, ids = inputs(shape, batch)
    label = torch.eye(shape.num_clusters, device=device)[ids]
    mine = ours(shape)
    sizes = (*size(mine, lambda: mine(x, t, label)), *size(theirs(shape), partial(theirs(shape), x, t, ids)))
    mine = mine.to(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for sampler in ("ddim", "dpm++2m"):
            calls[f"{sampler} {dtype}"] = partial(sample_ours, mine, x, label, sampler, steps, dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            other = theirs(shape).to(dtype, memory_format=layout)
            calls[f"{layout} {dtype}"] = partial(sample_theirs, other, x.to(dtype, memory_format=layout), ids, steps)
    seconds, rows = medians(calls, rounds), []
    best = {
        dtype: min(seconds[f"{layout} {dtype}"] for layout in (torch.contiguous_format, torch.channels_last))
        for dtype in (torch.float32, torch.bfloat16)
    }
    for dtype in best:
        row = {"network": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "steps": steps}
        row |= dict(zip(("mparams", "gflops", "d_mparams", "d_gflops"), sizes, strict=True))
        ddim = seconds[f"ddim {dtype}"]
        row |= {"ddim_img_s": batch / ddim, "dpm_img_s": batch / seconds[f"dpm++2m {dtype}"]}
        row |= {"d_img_s": batch / best[dtype], "ratio": best[dtype] / ddim, "over_fp32": best[torch.float32] / ddim}
        rows.append(row)
    return rows


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    cases = [(name, batch) for name in args.networks for batch in args.batches]
    report(
        "sample", [row for case in cases for row in measure(*case, args.steps or SHAPES[case[0]].steps, args.rounds)]
    )


if __name__ == "__main__":
    main()
