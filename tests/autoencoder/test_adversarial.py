"""The patch discriminator's size, its loss, and the weight that balances two gradients."""

from __future__ import annotations

import pytest
import torch

from ldm_sg.autoencoder.adversarial import MIN_SIDE_PX, PatchDiscriminator, adaptive_weight, hinge_loss


def test_discriminator_is_latent_diffusions() -> None:
    made = PatchDiscriminator()
    assert sum(p.numel() for p in made.parameters()) == 2_765_633
    assert made(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    assert made(torch.zeros(1, 3, MIN_SIDE_PX, MIN_SIDE_PX)).shape == (1, 1, 2, 2)


def test_one_output_sees_70_pixels() -> None:
    made, x = PatchDiscriminator(8).eval(), torch.randn(1, 3, 128, 128, requires_grad=True)
    made(x)[0, 0, 7, 7].backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 1)) > 0
    assert seen.any(0).sum() == 70 and seen.any(1).sum() == 70


def test_hinge_loss() -> None:
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert float(hinge_loss(real, made)) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1.0) / 2))


def test_adaptive_weight_is_the_ratio_of_the_gradients() -> None:
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    first, second = 6 * last.sum(), (last * torch.tensor([0.0, 3.0])).sum()
    weight = adaptive_weight(first, second, last)
    assert float(weight) == pytest.approx(6 * 2**0.5 / (3 + 1e-4)) and not weight.requires_grad
    assert float(adaptive_weight(first, 1e-30 * second, last)) == 1e4
    (first + weight * second).backward()  # the graphs are still there
