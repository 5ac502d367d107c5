"""The UNet's attention: ADM's self-attention block, with the guidance tokens as a prefix where there are any."""

from __future__ import annotations

from torch import Tensor, nn

from ldm_sg.model.guidance import TOKEN_WIDTH
from ldm_sg.model.init import zeroed
from ldm_sg.model.norm import GroupNorm
from ldm_sg.ops import prefix_attention


class Attention(nn.Module):
    """Residual multi-head attention over the pixels of a map.

    Args:
        channels: C, divisible by `heads`.
        heads: number of heads.
        has_tokens: whether guidance tokens (B, 8, 32) are attended too.
        norm_groups: of the normalisation.
    Source: Dhariwal & Nichol (2021), section 3; paper appendix B, "Cross-attention".
    """

    def __init__(self, channels: int, heads: int, has_tokens: bool, norm_groups: int = 32):
        super().__init__()
        if channels % heads:
            raise ValueError(f"got {channels} channels and {heads} heads, expected heads to divide channels")
        self.heads = heads
        self.norm = GroupNorm(channels, silu=False, groups=norm_groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))
        self.tokens = nn.Linear(TOKEN_WIDTH, 2 * channels) if has_tokens else None

    def forward(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        q, k, v = self.qkv(y).view(b, h * w, 3, self.heads, -1).unbind(2)  # each (B, L, heads, width)
        prefix = (None, None)
        if self.tokens is not None and tokens is not None:
            prefix = self.tokens(tokens).view(b, tokens.shape[1], 2, self.heads, -1).unbind(2)
        y = prefix_attention(q, k, v, *prefix).reshape(b, h, w, c)
        return x + self.out(y).permute(0, 3, 1, 2)
