"""The optimizer of a training: AdamW, or Muon for the hidden convolutions beside AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ldm_sg.config import TrainConfig

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of p(A) = a + b A + c A^2; brings singular values to 0.68 .. 1.13
MOMENTUM, RMS = 0.95, 0.2  # of a step's entries: about AdamW's, so that both take one learning rate


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of a matrix near 1: U S V^T -> nearly U V^T.

    Newton-Schulz is X_{j+1} = p(A_j) X_j with A_j = X_j X_j^T. All p(A_j) are polynomials in A_0 and commute, so that
    it is enough to follow A_{j+1} = p(A_j)^2 A_j and the product of the p(A_j), both of the matrix's smaller side.

    Args:
        matrix: (m, n).
        steps: of Newton-Schulz.
    Returns:
        (m, n).
    Source: Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks".
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    gram = wide @ wide.T
    norm2 = gram.trace().clamp(min=torch.finfo(gram.dtype).tiny)  # at least the largest singular value, squared
    gram, product = gram / norm2, torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    a, b, c = QUINTIC
    for left in reversed(range(steps)):
        p = (b * gram).addmm_(gram, gram, alpha=c)
        p.diagonal().add_(a)
        product = p @ product
        gram = p @ (p @ gram) if left else gram  # the last one is of no use
    made = (product @ wide) * norm2.rsqrt()
    return made if wide is matrix else made.T


class Muon(torch.optim.Optimizer):
    """Steps whose singular values are all alike for matrices, AdamW's for the other parameters.

    Args:
        matrices: weights (O, C, h, w), each a matrix (O, C h w).
        others: what AdamW is for: biases, normalisations, embeddings, the first and the last layer.
        lr, weight_decay: of both.
    Source: Jordan et al. (2024); the step's size: Liu et al. (2025), "Muon is scalable for LLM training", section 2.2.
    """

    def __init__(self, matrices: Iterable[Tensor], others: Iterable[Tensor], lr: float, weight_decay: float):
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay})
        self.adamw = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=True)
        self.param_groups += self.adamw.param_groups
        self._share()

    def _share(self) -> None:
        """Let AdamW work on this optimizer's state, which is saved, loaded, and given its rates as one."""
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do one step of both."""
        self.adamw.step(closure)
        group = self.param_groups[0]
        for weight in group["params"]:
            self._step_matrix(weight, group["lr"], group["weight_decay"])

    def _step_matrix(self, weight: Tensor, lr: float, weight_decay: float) -> None:
        if weight.grad is None:
            return
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].mul_(MOMENTUM).add_(weight.grad)
        ahead = torch.add(weight.grad, momentum, alpha=MOMENTUM).permute(0, 2, 3, 1)  # as it lies in memory
        matrix = ahead.reshape(len(weight), -1)
        step = orthogonalise(matrix).view(ahead.shape).permute(0, 3, 1, 2)
        weight.mul_(1 - lr * weight_decay).add_(step, alpha=-lr * RMS * max(matrix.shape) ** 0.5)


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build what a configuration asks for.

    Args:
        network: whose first and last layers are `conv_in` and `conv_out`.
        config: optimizer, lr, weight_decay.
    Returns:
        The optimizer of all parameters.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    named = dict(network.named_parameters())
    matrices = {n for n, p in named.items() if p.dim() == 4 and n not in ("conv_in.weight", "conv_out.weight")}
    chosen, others = ([p for n, p in named.items() if (n in matrices) is here] for here in (True, False))
    return Muon(chosen, others, config.lr, config.weight_decay)
