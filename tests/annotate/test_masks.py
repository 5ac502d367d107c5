"""STEGO: its terms in closed form, its draws, and masks of scenes whose regions differ in texture alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_sg.annotate import masks
from ldm_sg.annotate.kmeans import fit_kmeans
from ldm_sg.annotate.masks import (
    BALANCES,
    Balance,
    Head,
    Segmenter,
    StegoOptions,
    centre_spatially,
    correlation,
    correlation_loss,
    derangement,
    fit_masks,
    image_vectors,
    loss_terms,
    nearest_images,
    probe_loss,
    sample_points,
    start_probe,
    train_probe,
)
from ldm_sg.annotate.spatial import MaskAnnotator
from ldm_sg.evaluate.segmentation import count_pairs, match_and_score

SIDE, STRIDE, TEXTURES, SCENES = 64, 4, 5, 64


def texture(kind: int, rng: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE) of mean 0 and one period: columns, rows, two diagonals, a lattice; phase and contrast are random."""
    y, x = np.mgrid[:SIDE, :SIDE] * 2 * np.pi / 6
    p, q = rng.uniform(0, 2 * np.pi, 2)
    waves = [
        np.sin(x + p),
        np.sin(y + p),
        np.sin((x + y) / 2**0.5 + p),
        np.sin((x - y) / 2**0.5 + p),
        2**0.5 * np.sin(x + p) * np.sin(y + q),
    ]
    return waves[kind] * rng.uniform(0.2, 0.6)


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(SIDE, SIDE) float32 of two to four regions of one mean, and (SIDE, SIDE) which texture is where."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(TEXTURES)[: rng.integers(2, 5)]
    y, x = np.mgrid[:SIDE, :SIDE]
    seeds = rng.uniform(0, SIDE, (len(kinds), 2))
    region = ((y[..., None] - seeds[:, 0]) ** 2 + (x[..., None] - seeds[:, 1]) ** 2).argmin(-1)
    waves = np.stack([texture(k, rng) for k in kinds])
    image = np.take_along_axis(waves, region[None], 0)[0] + rng.normal(0, 0.1, (SIDE, SIDE))
    return image.astype(np.float32), kinds[region]


def train_backbone(images: Tensor, steps: int = 100) -> nn.Module:
    """Train a small network on the images (N, 1, S, S) alone: a place is told from others across contrast and noise."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 7, 2, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1)),
    )
    optimiser, row, cells = torch.optim.Adam(net.parameters(), 2e-3), torch.arange(24)[:, None], SIDE // STRIDE
    for _ in range(steps):
        x = images[torch.randperm(len(images))[:24]]
        contrasts = (torch.empty(24, 1, 1, 1).uniform_(0.4, 1.6) for _ in range(2))
        one, two = (F.normalize(net(x * c + 0.1 * torch.randn_like(x)), dim=1).permute(0, 2, 3, 1) for c in contrasts)
        y, z = torch.randint(1, cells - 1, (2, 24, 8))
        moved = y + torch.randint(-1, 2, y.shape), z + torch.randint(-1, 2, z.shape)
        cosines = one[row, y, z].flatten(0, 1) @ two[row, *moved].flatten(0, 1).T
        optimiser.zero_grad()
        F.cross_entropy(cosines / 0.2, torch.arange(len(cosines))).backward()
        optimiser.step()
    return net


def test_masks_beat_kmeans_on_the_same_features() -> None:
    images, truth = zip(*(scene(seed) for seed in range(SCENES)))
    assert abs(np.mean(images)) < 0.01  # colour says nothing
    x = torch.from_numpy(np.stack(images))[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = train_backbone(x)
    with torch.no_grad():
        maps = net(x)
    maps = (maps - maps.mean((0, 2, 3), keepdim=True)) / maps.std((0, 2, 3), keepdim=True)
    features = maps.permute(0, 2, 3, 1).contiguous()  # (N, 16, 16, 32)
    options = StegoOptions(batch_size=16, num_points=6, steps=120)
    segmenter = fit_masks(lambda ids: features[torch.from_numpy(ids)], SCENES, TEXTURES, 0, options)
    found = segmenter(features, SIDE).numpy()
    flat = F.normalize(features, dim=-1).flatten(0, 2).numpy()
    plain = fit_kmeans(flat, TEXTURES, seed=0).labels.reshape(SCENES, SIDE // STRIDE, SIDE // STRIDE)
    plain = plain.repeat(STRIDE, 1).repeat(STRIDE, 2)
    stego, kmeans = (match_and_score(count_pairs(m, np.stack(truth), TEXTURES, TEXTURES)) for m in (found, plain))
    print(f"mIoU: STEGO {stego.mean_iou:.3f}, k-means on the same features {kmeans.mean_iou:.3f}")
    assert found.shape == (SCENES, SIDE, SIDE) and found.dtype == np.uint8
    assert stego.mean_iou >= 0.7
    assert stego.mean_iou > kmeans.mean_iou + 0.1


@pytest.mark.parametrize("cosine, shift", [(0.6, 0.2), (-0.6, 0.2), (0.0, -0.1), (1.0, 0.5)])
def test_loss_of_two_places(cosine: float, shift: float) -> None:
    features = torch.eye(2).view(1, 1, 2, 2)  # F = I, which centring leaves
    codes = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]]).view(1, 1, 2, 2)
    expected = -((1 - shift) + max(cosine, 0) * (0 - shift)) / 2
    found = correlation_loss((features, features), (3 * codes, 2 * codes), shift)  # lengths do not count
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_centring_in_numbers() -> None:
    rows = torch.tensor([[1.0, 0.5], [0.0, 0.5]]).view(1, 1, 2, 1, 2)
    assert centre_spatially(rows).flatten().tolist() == [0.75, 0.25, 0.25, 0.75]


def test_loss_place_by_place() -> None:
    rng = np.random.default_rng(0)
    f, g = rng.normal(size=(3, 2, 3, 5)), rng.normal(size=(3, 4, 2, 5))
    s, t = rng.normal(size=(3, 2, 3, 7)), rng.normal(size=(3, 4, 2, 7))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    places = [(b, h, w, i, j) for b in range(3) for h in range(2) for w in range(3) for i in range(4) for j in range(2)]
    raw = {p: cosine(f[p[:3]], g[p[0], p[3], p[4]]) for p in places}
    mean = {p[:3]: np.mean([raw[q] for q in places if q[:3] == p[:3]]) for p in places}
    overall = np.mean(list(raw.values()))  # what the centred ones average to is zero here
    loss = [-max(cosine(s[p[:3]], t[p[0], p[3], p[4]]), 0) * (raw[p] - mean[p[:3]] + overall - 0.3) for p in places]
    found = correlation_loss(*((torch.from_numpy(a), torch.from_numpy(b)) for a, b in ((f, g), (s, t))), 0.3)
    assert float(found) == pytest.approx(np.mean(loss), rel=1e-9)


def test_gradient_reaches_codes_that_are_not_clamped_only() -> None:
    features = torch.eye(2).view(1, 1, 2, 2).requires_grad_()
    codes = torch.tensor([[[[1.0, 0.1], [-1.0, 0.1]]]], requires_grad=True)
    correlation_loss((features, features), (codes, codes), 0.2).backward()
    assert features.grad is None
    assert codes.grad is not None and codes.grad.abs().max() < 1e-7  # alike itself, opposite to the other: clamped
    codes = torch.tensor([[[[1.0, 0.1], [1.0, -0.1]]]], requires_grad=True)
    correlation_loss((features, features), (codes, codes), 0.2).backward()
    assert codes.grad is not None and codes.grad.abs().max() > 1e-3
    moved = (codes - codes.grad).detach()
    assert correlation(moved, moved)[0, 0, 0, 0, 1] < correlation(codes, codes)[0, 0, 0, 0, 1]  # F = 0 < b: apart


def test_points_are_read_between_places() -> None:
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    maps = torch.stack([y, x], dim=-1)[None]
    points = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.2, -1 / 3], [-0.5, 0.0]]).view(1, 2, 2, 2)
    found = sample_points(maps, points).view(4, 2)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [3.0, 5.0], [1.0, 3.0], [1.5, 1.25]]))


@pytest.mark.parametrize("n", [2, 3, 16])
def test_derangements(n: int) -> None:
    drawn = [derangement(n, torch.Generator().manual_seed(seed)) for seed in range(20)]
    for order in drawn:
        assert sorted(order.tolist()) == list(range(n)) and (order != torch.arange(n)).all()
    assert n == 2 or len({tuple(order.tolist()) for order in drawn}) > 1


def test_neighbours_are_the_nearest_others(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = torch.randn(23, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    vectors = image_vectors(lambda ids: dense[torch.from_numpy(ids)], 23, batch_size=5)
    means = dense.mean((1, 2))
    torch.testing.assert_close(vectors, means / means.norm(dim=1, keepdim=True))
    cosines = vectors @ vectors.T
    expected = [[j for j in row.argsort(descending=True).tolist() if j != i][:7] for i, row in enumerate(cosines)]
    assert nearest_images(vectors, 7).tolist() == expected
    monkeypatch.setattr(masks, "CHUNK_ROWS", 4)
    assert nearest_images(vectors, 7).tolist() == expected


def test_head_is_a_linear_map_plus_a_two_layer_one() -> None:
    head, x, y = Head(12), torch.randn(2, 3, 4, 12), torch.randn(2, 3, 4, 12)
    a, b = head.nonlinear[0], head.nonlinear[2]
    expected = head.linear(x) + F.relu(y @ a.weight.T + a.bias) @ b.weight.T + b.bias
    torch.testing.assert_close(head(x, y), expected)
    assert head(x).shape == (2, 3, 4, 70)
    assert sum(p.numel() for p in head.parameters()) == (12 * 70 + 70) + (12 * 12 + 12) + (12 * 70 + 70)


def terms(balance: Balance, dropout: float = 0.0, same: bool = False) -> dict[str, float]:
    rng = torch.Generator().manual_seed(0)
    x, alike = torch.randn(2, 4, 5, 5, 8, generator=rng)
    x = x[:1].expand(4, -1, -1, -1) if same else x
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Head(8)
    options = StegoOptions(balance=balance, dropout=dropout, num_points=4)
    found = loss_terms(head, x, x if same else alike, options, torch.Generator().manual_seed(1))
    return {name: float(t.detach()) for name, t in found.items()}


def test_terms_carry_their_weights_and_shifts() -> None:
    one = terms(Balance(1, 1, 1, 0.1, 0.2, 0.3))
    weighted = terms(Balance(2, 3, 5, 0.1, 0.2, 0.3))
    assert weighted == {name: pytest.approx(w * one[name], rel=1e-5) for name, w in zip(one, (2, 3, 5))}
    for i, name in enumerate(one):
        shifts = [0.1, 0.2, 0.3]
        shifts[i] += 0.5
        moved = terms(Balance(1, 1, 1, *shifts))
        assert moved[name] > one[name] and all(moved[n] == one[n] for n in one if n != name)
    assert terms(Balance(1, 1, 1, 0.1, 0.2, 0.3), dropout=0.5) != one


def test_neighbours_and_others_are_compared_at_other_points() -> None:
    found = terms(Balance(1, 1, 1, 0.2, 0.2, 0.2), same=True)  # all images are one
    assert found["knn"] == pytest.approx(found["random"], rel=1e-5)
    assert found["self"] != pytest.approx(found["knn"], rel=1e-2)


def test_published_balances() -> None:
    assert StegoOptions().balance == BALANCES["default"] == (0.67, 0.25, 0.63, 0.18, 0.12, 0.46)
    paper = StegoOptions()
    assert (paper.num_neighbours, paper.lr, paper.batch_size, masks.CODE_WIDTH) == (7, 5e-4, 64, 70)


@pytest.fixture(scope="module")
def features() -> Tensor:
    """(12, 6, 6, 8) random features."""
    return torch.randn(12, 6, 6, 8, generator=torch.Generator().manual_seed(0))


def fit(features: Tensor, seed: int, **changes: object) -> Segmenter:
    options = StegoOptions(**{"steps": 3, "batch_size": 4, "num_points": 3, **changes})
    return fit_masks(lambda ids: features[torch.from_numpy(ids)], len(features), 3, seed, options)


def test_seed_decides(features: Tensor) -> None:
    state = torch.random.get_rng_state()
    a, b, other = (fit(features, seed).tensors() for seed in (1, 1, 2))
    assert all(a[name].tobytes() == b[name].tobytes() != other[name].tobytes() for name in a)
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_lowers_the_loss(features: Tensor) -> None:
    log: list[dict[str, float]] = []
    options = StegoOptions(steps=60, batch_size=8, num_points=4)
    fit_masks(lambda ids: features[torch.from_numpy(ids)], 12, 3, 0, options, log.append)
    totals = [sum(of_step.values()) for of_step in log]
    assert len(totals) == 60 and np.mean(totals[-10:]) < np.mean(totals[:10]) - 0.02


def test_probe_loss_in_numbers() -> None:
    codes = torch.tensor([[3.0, 0.0], [0.0, 0.5], [1.0, 1.0]], requires_grad=True)
    centroids = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 0.1]], requires_grad=True)
    loss = probe_loss(codes.detach(), centroids)
    assert float(loss.detach()) == pytest.approx(-(1 + 1 + 0.5**0.5) / 3)
    loss.backward()
    assert centroids.grad is not None and not centroids.grad[1].any() and centroids.grad[0].any()  # who wins, learns


def test_probe_finds_directions_and_leaves_the_head_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Head(8).requires_grad_(False)
    directions = torch.randn(3, 8, generator=rng)
    with torch.no_grad():
        head.nonlinear[2].weight.zero_()
        head.nonlinear[2].bias.zero_()
        head.linear.bias.zero_()
    kinds = torch.arange(3).repeat(48)[torch.randperm(144, generator=rng)].view(9, 4, 4)
    lengths, noise = (torch.rand(9, 4, 4, n, generator=rng) for n in (1, 8))
    features = directions[kinds] * (0.5 + lengths) + 0.1 * (noise - 0.5)
    before = {name: t.clone() for name, t in head.state_dict().items()}
    true, options = F.normalize(head.linear(directions), dim=1), StegoOptions(steps=5_000, batch_size=4)

    def dense(ids: np.ndarray) -> Tensor:
        return features[torch.from_numpy(ids)]

    start = start_probe(head, dense, 9, 3, 0, options)
    poor = F.normalize(true + 2 * true.sum(0), dim=1)  # the same three, drawn towards their sum
    found = train_probe(head, dense, 9, poor, 0, options)
    assert all(torch.equal(t, before[name]) for name, t in head.state_dict().items())
    for centroids in (start, found):
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(3))
        cosines = true @ centroids.T
        assert sorted(cosines.argmax(1).tolist()) == [0, 1, 2] and cosines.amax(1).min() > 0.99
    assert probe_loss(head(features), poor) > -0.85
    assert probe_loss(head(features), found) < -0.99


def test_segmenter_survives_the_store_and_the_stage_uses_it(features: Tensor) -> None:
    segmenter = fit(features, 0)
    batch = {"keys": list("abcdefghijkl"), "dense": features}
    result = MaskAnnotator(Segmenter.from_tensors(segmenter.tensors()), cells=8)(batch)
    assert result["mask"].shape == (12, 8, 8) and result["mask"].dtype == np.uint8 and result["mask"].max() == 2
    np.testing.assert_array_equal(result["mask"], segmenter(features, 8).numpy())
    assert result["keys"] == batch["keys"] and "mask" not in batch
    cosines = F.normalize(segmenter.head(features), dim=-1) @ segmenter.centroids.T
    assert torch.equal(segmenter(features, 6).long(), cosines.argmax(-1))  # no resizing: the nearest by angle


def test_mirror_images_are_averaged_in(features: Tensor) -> None:
    segmenter = fit(features, 0)
    assert torch.equal(segmenter(features, 6, features.flip(2)), segmenter(features, 6))  # one that mirrors exactly
    other = features.roll(1, 0)
    codes = (segmenter.head(features) + segmenter.head(other).flip(2)) / 2
    assert torch.equal(segmenter(features, 6, other).long(), (codes @ segmenter.centroids.T).argmax(-1))
    batch = {"dense": features, "dense_mirrored": other}
    np.testing.assert_array_equal(MaskAnnotator(segmenter, 6)(batch)["mask"], segmenter(features, 6, other).numpy())


def test_impossible_requests_are_refused(features: Tensor) -> None:
    for num_images, num_clusters in ((300, 256), (12, 13), (12, 0)):
        with pytest.raises(ValueError, match=f"got {num_clusters} mask clusters for {num_images} images.*1 to 255"):
            fit_masks(lambda ids: features[torch.from_numpy(ids)], num_images, num_clusters, 0)
    with pytest.raises(ValueError, match="got a batch of 1 for STEGO, expected at least 2"):
        fit(features, 0, batch_size=1)
    with pytest.raises(ValueError, match="got 7 images for 7 neighbours each, expected at least 8"):
        fit(features[:7], 0)
