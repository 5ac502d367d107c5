"""Classifier-free guidance (Eq. 4), one batched forward for both halves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[..., Tensor]


def guided_network(network: Network, guidance: dict[str, Tensor], scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind guidance to a network: F~ = (1 - w) F(x) + w F(x; k).

    The output F of every parameterisation is affine in x_0 with coefficients that do not depend on the guidance, so
    Eq. 4 on F equals Eq. 4 on eps.

    Args:
        network: (x, time, **guidance) -> F.
        guidance: tensors with first dimension B, such as "label" (B, K).
        scale: w. 0 is unconditional and 1 conditional: each costs one forward of B; any other costs one of 2B.
    Returns:
        (x (B, C, h, w), time (B,)) -> F (B, C, h, w).
    Raises:
        ValueError: if `scale` is not finite.
    Source: paper eq. 4 and appendix B; the null guidance is all zeros.
    """
    if scale != scale or scale in (float("inf"), float("-inf")):
        raise ValueError(f"got guidance scale {scale}, expected a finite number")
    null = {name: torch.zeros_like(g) for name, g in guidance.items()}
    if scale == 0:
        return lambda x, time: network(x, time, **null)
    if scale == 1:
        return lambda x, time: network(x, time, **guidance)
    both = {name: torch.cat([null[name], g]) for name, g in guidance.items()}

    def run(x: Tensor, time: Tensor) -> Tensor:
        f = network(torch.cat([x, x]), torch.cat([time, time]), **both)
        unconditional, conditional = f.chunk(2)
        return (1 - scale) * unconditional + scale * conditional

    return run
