"""guided_step beside the same formula in eager torch."""

from __future__ import annotations

import torch
from gpu.cases import Size, random
from gpu.machine import copy_seconds_per_byte
from gpu.results import Recorder
from gpu.timing import kernel_times
from torch import Tensor

from ldm_sg.ops import guided_step

NUMBERS = (1.0, -0.5, 0.5, 0.4, 0.0, 0.0, 1.0)  # p, q, a, b, c, d, s: a DDIM step's form, and iterates stay finite
SCALE = 2.0


def state(batch: int, latent: tuple[int, int, int]) -> dict[str, Tensor]:
    """The op's tensors that a sampler keeps, and the table of one step."""
    x = random(batch, *latent).contiguous(memory_format=torch.channels_last)
    made = {"x": x, "x0": torch.zeros_like(x), "inputs": torch.cat([x, x]).bfloat16()}
    made |= {"scale": torch.full((batch,), SCALE), "table": torch.tensor([NUMBERS]), "step": torch.zeros(1).long()}
    return {name: t.to(x.device) for name, t in made.items()}


def advance(x: Tensor, output: Tensor, input_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """The step in plain torch: (x_next, x_0, the network's next input)."""
    p, q, a, b, _, _, s = NUMBERS
    unconditional, conditional = output.to(x.dtype).chunk(2)
    f = (1 - SCALE) * unconditional + SCALE * conditional
    x0 = p * x + q * f
    moved = a * x + b * x0
    return moved, x0, torch.cat([s * moved, s * moved]).to(input_dtype)


def run(record: Recorder, size: Size) -> None:
    """Time the op at the sampler's sizes."""
    copy = copy_seconds_per_byte(size)
    for batch in size.sampler_batches:
        given = state(batch, size.latent)
        output = random(2 * batch, *size.latent).contiguous(memory_format=torch.channels_last)

        def ours(given: dict[str, Tensor] = given, output: Tensor = output) -> None:
            guided_step(**given, output=output, noise=None)

        def eager(x: Tensor = given["x"], output: Tensor = output) -> object:
            return advance(x, output)

        case = f"batch {batch}"
        seconds = kernel_times({"ours": [ours], "eager": [eager]}, size.rounds)
        record.times(case, seconds)
        record.ratio(case, seconds, "ours", ["eager"], "step eager")
        nbytes = sum(t.nbytes for t in (given["x"], given["x"], given["x0"], given["x0"], given["inputs"], output))
        if batch == size.sampler_batches[0]:
            record(case, "us", seconds["ours"] * 1e6, "step one us")
        else:
            record(case, "share of copy bandwidth", nbytes * copy / seconds["ours"], "step copy")
