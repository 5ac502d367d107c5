"""What turns a guidance signal into something the UNet can use: the embedding (Eq. 7) and the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EMBED_WIDTH = 256  # paper, appendix B: FC(K, 256) SiLU FC(256, 256)
NUM_TOKENS, TOKEN_WIDTH = 8, 32  # paper, tables 8 to 10


def guidance_embedding(num_clusters: int) -> nn.Sequential:
    """Make the two-layer embedding of a one-hot or multi-hot label.

    Args:
        num_clusters: K, the width of the label.
    Returns:
        A module (B, K) -> (B, 256). The null label is the zero vector.
    Source: paper appendix B, "Guidance embedding".
    """
    return nn.Sequential(nn.Linear(num_clusters, EMBED_WIDTH), nn.SiLU(), nn.Linear(EMBED_WIDTH, EMBED_WIDTH))


class GuidanceTokens(nn.Module):
    """Label (B, K) -> tokens (B, 8, 32) for the attention sites. Source: paper appendix B, "Cross-attention"."""

    def __init__(self, num_clusters: int):
        super().__init__()
        self.project = nn.Linear(num_clusters, NUM_TOKENS * TOKEN_WIDTH)
        self.norm = nn.LayerNorm(TOKEN_WIDTH)

    def forward(self, label: Tensor) -> Tensor:
        return self.norm(self.project(label).view(-1, NUM_TOKENS, TOKEN_WIDTH))


def drop_guidance(guidance: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """Replace the guidance of some samples by the null guidance, label and mask together.

    Args:
        guidance: tensors whose first dimension is B, such as "label" (B, K) and "spatial" (B, S, h, w).
        keep: (B,) bool; False drops.
    Returns:
        New tensors of the same shapes with the dropped samples all zero.
    Source: Ho & Salimans (2022), algorithm 1.
    """
    return {name: g * keep.view(-1, *[1] * (g.ndim - 1)).to(g.dtype) for name, g in guidance.items()}


def one_hot(clusters: Tensor, num_clusters: int) -> Tensor:
    """Turn cluster ids into labels.

    Args:
        clusters: (B,) integer in [0, K).
        num_clusters: K.
    Returns:
        (B, K) float32 one-hot.
    Raises:
        ValueError: if an id is outside [0, K).
    Source: paper section 3.2, "Self-labeled guidance".
    """
    clusters = clusters.long()
    if clusters.numel() and not (int(clusters.min()) >= 0 and int(clusters.max()) < num_clusters):
        got = sorted({int(c) for c in clusters if not 0 <= int(c) < num_clusters})
        raise ValueError(f"got cluster {got[0]}, expected 0 to {num_clusters - 1}: choose one of those")
    return torch.nn.functional.one_hot(clusters, num_clusters).float()
