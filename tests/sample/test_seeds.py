"""An image's noise depends on its seed alone."""

from __future__ import annotations

import pytest
import torch

from ldm_sg.config import MAX_SEED
from ldm_sg.sample.seeds import GRAIN, SeededNoise

SHAPE = (3, 4, 5)
FIRST = [2.040919, -2.555665, 0.418099, -0.567770, -0.452649]  # of seed 3


def test_noise_does_not_depend_on_the_others() -> None:
    together, alone = SeededNoise([5, 9, 7], SHAPE), SeededNoise([7], SHAPE)
    for _ in range(3):  # as many draws as a stochastic sampler makes
        assert torch.equal(together.draw()[2], alone.draw()[0])


def test_seeds_and_draws_differ() -> None:
    noise = SeededNoise([0, 1, 2**31, MAX_SEED], SHAPE)
    both = torch.cat([noise.draw(), noise.draw()]).flatten(1)
    assert len({row.numpy().tobytes() for row in both}) == 8


def test_streams_of_a_seed_are_independent() -> None:
    latents, grain = (SeededNoise(range(100), SHAPE, stream).draw().flatten() for stream in ((), GRAIN))
    assert abs(torch.corrcoef(torch.stack([latents, grain]))[0, 1]) < 0.05


def test_noise_is_standard_normal() -> None:
    drawn = SeededNoise(range(200), SHAPE).draw()
    assert drawn.shape == (200, *SHAPE) and drawn.dtype == torch.float32
    assert abs(drawn.mean()) < 0.03 and abs(drawn.std() - 1) < 0.03


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=f"got seed {seed}, expected 0 to"):
        SeededNoise([0, seed], SHAPE)


def test_noise_is_the_same_everywhere() -> None:
    drawn = SeededNoise([3], SHAPE).draw()[0, 0, 0]
    assert drawn.tolist() == pytest.approx(FIRST, abs=1e-6)
