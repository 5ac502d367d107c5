"""Labels, tokens, and the null guidance."""

from __future__ import annotations

import pytest
import torch

from ldm_sg.model import drop_guidance, one_hot
from ldm_sg.model.guidance import GuidanceTokens, guidance_embedding


def test_one_hot_of_every_cluster() -> None:
    clusters = torch.tensor([3, 0, 2, 3], dtype=torch.int32)
    got = one_hot(clusters, 4)
    assert got.dtype == torch.float32
    assert got.tolist() == [[float(k == c) for k in range(4)] for c in clusters.tolist()]


def test_one_hot_of_nothing() -> None:
    assert one_hot(torch.empty(0, dtype=torch.int64), 4).shape == (0, 4)


@pytest.mark.parametrize("bad", [-1, 4, 17])
def test_one_hot_outside_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"got cluster {bad}, expected 0 to 3"):
        one_hot(torch.tensor([0, bad, 1]), 4)


def test_label_and_mask_drop_together() -> None:
    guidance = {"label": torch.rand(4, 5) + 1, "spatial": torch.rand(4, 2, 3, 3) + 1}
    before = {name: g.clone() for name, g in guidance.items()}
    keep = torch.tensor([True, False, True, False])
    dropped = drop_guidance(guidance, keep)
    assert dropped.keys() == guidance.keys()
    for name, old in before.items():
        assert torch.equal(guidance[name], old)  # the caller's stay whole
        assert torch.equal(dropped[name][keep], old[keep])
        assert not dropped[name][~keep].any()
        assert dropped[name].shape == old.shape


def test_embedding_is_the_papers() -> None:
    fc1, activation, fc2 = guidance_embedding(100)
    assert (fc1.in_features, fc1.out_features) == (100, 256)
    assert isinstance(activation, torch.nn.SiLU)
    assert (fc2.in_features, fc2.out_features) == (256, 256)


def test_tokens_are_normalised_and_tell_labels_apart() -> None:
    torch.manual_seed(0)
    tokens = GuidanceTokens(6)(one_hot(torch.arange(6), 6))
    assert tokens.shape == (6, 8, 32)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(6, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(6, 8), atol=1e-2, rtol=0)
    assert torch.pdist(tokens.flatten(1)).min() > 0.1


def test_null_label_has_tokens_too() -> None:
    torch.manual_seed(0)
    assert GuidanceTokens(6)(torch.zeros(1, 6)).abs().sum() > 1  # the zero input is embedded, its tokens stay
