"""patch-PCA: the best linear map there is, fitted in any order, kept and rebuilt exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_sg.autoencoder import PatchPCA, PatchPCAFit, load_autoencoder, patch_pca
from ldm_sg.autoencoder.patch_pca import LATENT_NOISE, patches

P, WIDTH = 4, 48  # patch side, values per patch


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images(n: int = 12) -> Tensor:
    """(n, 3, 16, 24) in [-1, 1] whose patches have a clear spectrum, off centre."""
    rng = np.random.default_rng(0)
    directions, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    weights = rng.normal(size=(n, 4, 6, WIDTH)) * 0.8 ** np.arange(WIDTH)
    rows = torch.from_numpy(0.25 * weights @ directions.T + 0.2).float()
    x = rows.view(n, 4, 6, 3, P, P).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 16, 24)
    return x / x.abs().max()


def fit(x: Tensor, channels: int, batch: int = 5) -> PatchPCA:
    made = PatchPCAFit(P, channels)
    for part in x.split(batch):
        made.add(part)
    return made.finish()


def test_patches_are_the_images_blocks() -> None:
    x = images(2)
    rows = patches(x, P)
    assert rows.shape == (2, 4, 6, WIDTH)
    for i, j in ((0, 0), (3, 5), (2, 1)):
        block = x[1, :, i * P : (i + 1) * P, j * P : (j + 1) * P]
        assert torch.equal(rows[1, i, j], block.flatten())
    assert torch.equal(patches(x.to(memory_format=torch.channels_last), P), rows)


def test_basis_is_orthonormal() -> None:
    basis = fit(images(), 7).basis
    assert basis.shape == (WIDTH, 7)
    torch.testing.assert_close(basis.T @ basis, torch.eye(7), rtol=0, atol=1e-5)


def test_all_channels_reconstruct_exactly() -> None:
    x, made = images(), fit(images(), WIDTH)
    torch.testing.assert_close(made.decode(made.encode(x)), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 5, 20])
def test_error_is_the_optimum(channels: int) -> None:
    x = images()
    rows = patches(x, P).reshape(-1, WIDTH).double().numpy()
    singular = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    best = (singular[channels:] ** 2).sum()  # Eckart & Young
    made = fit(x, channels)
    error = (made.decode(made.encode(x)) - x).double().square().sum()
    assert float(error) == pytest.approx(best, rel=1e-3)


def test_latents_are_uncorrelated_with_falling_variance() -> None:
    x = images()
    z = fit(x, 6).encode(x).permute(1, 0, 2, 3).flatten(1).double()
    covariance = torch.cov(z, correction=0)
    variances = covariance.diag()
    assert (variances.diff() < 0).all()
    assert (covariance - variances.diag()).abs().max() < 1e-4 * variances[0]
    assert z.mean(1).abs().max() < 1e-5


def smooth(n: int) -> Tensor:
    """(n, 3, 16, 24) whose neighbouring patches know of each other."""
    noise = torch.randn(n, 3, 22, 30, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.avg_pool2d(noise, 7, 1)


def test_without_a_sample_the_decoder_is_the_encoder_transposed() -> None:
    made = fit(images(), 5)
    z = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    rows = z.permute(0, 2, 3, 1) @ made.basis.T + made.mean
    torch.testing.assert_close(patches(made.decode(z), P), rows)


def test_fitted_decoder_is_the_least_squares_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, unseen = smooth(40), smooth(60)[40:]
    fitted = PatchPCAFit(P, 4)
    fitted.add(x)
    alone, wide = fitted.finish(), fitted.finish(x.split(7))
    assert torch.equal(alone.basis, wide.basis)  # the latents are the same
    padded = np.pad(wide.encode(x).numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    around = np.stack([padded[:, :, i : i + 4, j : j + 6] for i in range(3) for j in range(3)], -1)
    around = around.transpose(0, 2, 3, 1, 4).reshape(-1, 4 * 9).astype(np.float64)
    rows = (patches(x, P) - wide.mean).reshape(-1, WIDTH).double().numpy()
    noise = LATENT_NOISE * np.sqrt((around**2).sum(0))  # whose expected products are those of one row per latent
    best = np.linalg.lstsq(np.concatenate([around, np.diag(noise)]), np.pad(rows, ((0, 36), (0, 0))), rcond=None)[0]

    def error(made: PatchPCA, of: Tensor, noise: float = 0) -> float:
        z = made.encode(of)
        z += noise * z.square().mean((0, 2, 3), keepdim=True).sqrt() * torch.randn(z.shape, generator=seeded())
        return float((made.decode(z) - of).double().square().sum())

    assert error(wide, x) == pytest.approx(((around @ best - rows) ** 2).sum(), rel=1e-4)
    assert error(wide, x) < 0.9 * error(alone, x)
    assert error(wide, unseen) < 0.9 * error(alone, unseen)
    with monkeypatch.context() as patched:
        patched.setattr(patch_pca, "LATENT_NOISE", 0.0)
        exact = fitted.finish(x.split(7))
    assert error(exact, x) < error(wide, x)
    assert error(wide, unseen, LATENT_NOISE) < error(exact, unseen, LATENT_NOISE)


def test_every_takes_one_patch_in_so_many() -> None:
    x = images()
    some = PatchPCAFit(P, 4, every=3)
    some.add(x)
    assert some.count == 12 * 24 // 3
    torch.testing.assert_close(some.finish().mean, patches(x, P).reshape(-1, WIDTH)[::3].mean(0))


def test_encode_sample_decode_shapes_and_layouts() -> None:
    x, made = images(3), fit(images(), 5)
    z = made.encode(x)
    assert (made.channels, made.downsample) == (5, P)
    assert z.shape == (3, 5, 4, 6)
    assert z.is_contiguous()
    assert torch.equal(made.sample(z, torch.randn_like(z)), z)  # no variance, no noise
    assert made.decode(z).shape == x.shape
    last = z.to(memory_format=torch.channels_last)
    torch.testing.assert_close(made.decode(last), made.decode(z))


@pytest.mark.parametrize("batch", [1, 4, 12])
def test_fit_does_not_depend_on_order_or_batches(batch: int) -> None:
    x = images()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(batch))
    a, b = fit(x, 6), fit(x[order], 6, batch)
    torch.testing.assert_close(a.basis, b.basis, rtol=0, atol=1e-4)  # signs too
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-6)


def test_sums_of_parts_make_the_whole() -> None:
    x, whole, merged = images(), PatchPCAFit(P, 7), PatchPCAFit(P, 7)
    whole.add(x)
    for part in x.split(5):
        other = PatchPCAFit(P, 7)
        other.add(part)
        merged.merge(other.sums())
    assert merged.count == whole.count == len(x) * 24
    torch.testing.assert_close(merged.total, whole.total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.products, whole.products, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.products, merged.products.T)
    assert merged.sums()["products"].shape == (WIDTH * (WIDTH + 1) // 2,), "a triangle"


def test_same_fit_has_the_same_bits_and_id() -> None:
    a, b, other = fit(images(), 6), fit(images(), 6), fit(images(11), 6)
    assert torch.equal(a.basis, b.basis)
    assert a.id == b.id
    assert a.id.startswith("patch-pca-4x6-")
    assert a.id != other.id


def test_sign_is_that_of_the_largest_weight() -> None:
    basis = fit(images(), 10).basis
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_grain_is_as_strong_as_what_the_decoder_misses() -> None:
    x = smooth(40)
    fitted = PatchPCAFit(P, 4)
    fitted.add(x)
    made = fitted.finish(x.split(7))
    missed = (x - made.decode(made.encode(x))).transpose(0, 1).flatten(1).double()  # (3, pixels)
    expected = missed @ missed.T / missed.shape[1]
    assert torch.allclose((made.grain @ made.grain).double(), expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


def test_grain_lies_where_no_latent_does() -> None:
    x = smooth(40)
    fitted = PatchPCAFit(P, 4)
    fitted.add(x)
    made, z = fitted.finish(x.split(7)), fitted.finish().encode(x)
    noise = torch.randn(x.shape, generator=seeded())
    grain = made.decode(z, lambda: noise) - made.decode(z)
    assert float(grain.std()) == pytest.approx(float(made.grain.square().sum().div(3).sqrt()), rel=0.1)
    torch.testing.assert_close(
        made.encode(made.decode(z, lambda: noise)), made.encode(made.decode(z)), atol=1e-5, rtol=1e-5
    )


def test_grain_of_grey_images_is_grey() -> None:
    x = smooth(10).mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    fitted = PatchPCAFit(P, 2)
    fitted.add(x)
    made = fitted.finish([x])
    noise = torch.randn(x.shape, generator=seeded())
    drawn = made.decode(made.encode(x), lambda: noise)
    assert float((drawn - drawn.mean(1, keepdim=True)).abs().max()) < 1e-3 * float(made.grain.abs().max())


def test_an_earlier_versions_weights_draw_no_grain() -> None:
    x = images()
    kept = fit(x, 5).tensors()
    del kept["grain"]
    made = load_autoencoder("patch-pca", kept)
    assert torch.equal(made.decode(made.encode(x), lambda: torch.randn(x.shape)), made.decode(made.encode(x)))


def test_tensors_round_trip() -> None:
    x, fitted = smooth(3), PatchPCAFit(P, 5)
    fitted.add(x)
    made = fitted.finish([x])
    kept = {name: value.copy() for name, value in made.tensors().items()}
    again = load_autoencoder("patch-pca", kept)
    assert again.id == made.id
    assert torch.equal(again.encode(x), made.encode(x))
    assert torch.equal(again.decode(made.encode(x)), made.decode(made.encode(x)))
    kept["basis"][:] = 0
    assert torch.equal(again.encode(x), made.encode(x))  # owns its weights


def test_constant_images_are_no_trouble() -> None:
    x = torch.full((2, 3, 8, 8), 0.5)
    made = fit(x, 3)
    torch.testing.assert_close(made.decode(made.encode(x)), x)


@pytest.mark.parametrize("shape", [(1, 3, 10, 8), (1, 3, 8, 10)])
def test_sides_that_do_not_divide_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"got images of {shape[2]}x{shape[3]} px, expected sides divisible"):
        PatchPCAFit(P, 4).add(torch.zeros(shape))
    with pytest.raises(ValueError, match="expected sides divisible by the patch's 4 px"):
        fit(images(), 4).encode(torch.zeros(shape))


@pytest.mark.parametrize("channels", [0, -1, WIDTH + 1])
def test_impossible_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"got {channels} latent channels, expected 1 to {WIDTH} for 4 px"):
        PatchPCAFit(P, channels)


def test_no_image_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="got no images to fit patch-pca on"):
        PatchPCAFit(P, 4).finish()
