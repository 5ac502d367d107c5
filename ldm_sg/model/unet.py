"""The self-guided UNet: ADM's network as latent diffusion uses it, plus the paper's guidance inputs.

`concat[t, k]` feeds every block (Eq. 7), a spatial mask is concatenated to the input (Eq. 8 and 9), and guidance
tokens join the image tokens at the attention sites (appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_sg.model.attention import Attention
from ldm_sg.model.blocks import ResBlock, Stage, time_features
from ldm_sg.model.convolution import Conv3x3
from ldm_sg.model.guidance import EMBED_WIDTH, GuidanceTokens, guidance_embedding
from ldm_sg.model.init import zeroed
from ldm_sg.model.norm import GroupNorm


class UNet(nn.Module):
    """Predict the network output F of a parameterisation from a noisy latent.

    Args:
        channels: C of the latent.
        num_clusters: K of the label guidance; 0 builds the unguided network.
        spatial_channels: S of the mask guidance; 0 for none.
        base: width of the first level.
        multipliers: width of each level in units of `base`; every level after the first halves the map.
        attention: downsampling factors at which attention follows a block; None leaves out the middle one too.
        num_blocks: residual blocks per level.
        heads: attention heads.
        tokens: whether guidance tokens join the attention.
        dropout: inside the residual blocks.
        norm_groups: at most so many per normalisation; few keep how bright and grainy a whole image is. ADM has 32.
        checkpointing: whether training keeps only the stages' outputs and computes the rest again on the way back.
    Source: Dhariwal & Nichol (2021), section 3; Rombach et al. (2022), appendix; paper eq. 7, 8, 9 and table 11.
    """

    def __init__(
        self,
        channels: int,
        num_clusters: int = 0,
        spatial_channels: int = 0,
        *,
        base: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 3, 4),
        attention: Sequence[int] | None = (8, 4),
        num_blocks: int = 2,
        heads: int = 8,
        tokens: bool = False,
        dropout: float = 0.0,
        norm_groups: int = 32,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.channels, self.num_clusters, self.spatial_channels = channels, num_clusters, spatial_channels
        self.base, self.downsample, self.checkpointing = base, 2 ** (len(multipliers) - 1), checkpointing
        guided, embed_width = num_clusters > 0, 4 * base + EMBED_WIDTH * (num_clusters > 0)
        self.time_embed = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))
        self.label_embed = guidance_embedding(num_clusters) if guided else None
        self.tokens = GuidanceTokens(num_clusters) if guided and tokens else None

        block = partial(ResBlock, embed_width=embed_width, dropout=dropout, norm_groups=norm_groups)
        attend = partial(Attention, heads=heads, has_tokens=self.tokens is not None, norm_groups=norm_groups)

        def stage(c_in: int, c_out: int, factor: int, resample: str = "none") -> Stage:
            here = attention is not None and factor in attention and resample == "none"
            return Stage(block(c_in, c_out, resample=resample), attend(c_out) if here else None)

        width, factor = base * multipliers[0], 1
        self.conv_in = Conv3x3(channels + spatial_channels, width)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [width]
        for level, multiplier in enumerate(multipliers):
            for _ in range(num_blocks):
                self.down.append(stage(width, base * multiplier, factor))
                width = base * multiplier
                skips.append(width)
            if level < len(multipliers) - 1:
                self.down.append(stage(width, width, factor, "down"))
                skips.append(width)
                factor *= 2

        self.middle_in = Stage(block(width, width), attend(width) if attention is not None else None)
        self.middle_out = block(width, width)

        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(num_blocks + 1):
                self.up.append(stage(width + skips.pop(), base * multiplier, factor))
                width = base * multiplier
            if level:
                self.up.append(stage(width, width, factor, "up"))
                factor //= 2

        self.norm_out = GroupNorm(width, groups=norm_groups)
        self.conv_out = zeroed(Conv3x3(width, channels))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, spatial: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: (B, C, h, w) scaled noisy latent; h and w divisible by `downsample`.
            time: (B,) the network's time input.
            label: (B, K) one-hot or multi-hot; None means the null label (zeros).
            spatial: (B, S, h, w) mask; None means the null mask (zeros).
        Returns:
            (B, C, h, w) float32.
        Raises:
            ValueError: if guidance is given that this network was built without, or shapes do not fit it.
        """
        self.check_guidance(label, spatial)
        embedding, tokens = self.embed_time(time, x.dtype), None
        if self.label_embed is not None:
            if label is None:
                label = x.new_zeros(x.shape[0], self.num_clusters)
            k, tokens = self.embed_guidance(label.to(x.dtype))
            embedding = torch.cat([embedding, k], dim=1)  # concat[t, k], Eq. 7
        return self.trunk(x, embedding, tokens, spatial)

    def embed_time(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed times: (B,) -> t (B, 4 base)."""
        return self.time_embed(time_features(time, self.base).to(dtype))

    def embed_guidance(self, label: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embed labels: (B, K) -> k (B, 256) and, where the network has them, tokens (B, 8, 32)."""
        assert self.label_embed is not None, "an unguided network has nothing to embed"
        return self.label_embed(label), None if self.tokens is None else self.tokens(label)

    def trunk(self, x: Tensor, embedding: Tensor, tokens: Tensor | None, spatial: Tensor | None) -> Tensor:
        """Run everything behind the embeddings.

        Args:
            x, spatial: as for `forward`.
            embedding: (B, width) for every block, concat[t, k] where there is guidance.
            tokens: (B, 8, 32) for every attention, or None.
        Returns:
            (B, C, h, w) float32.
        """
        self._check_latent(x, spatial)
        h = x
        if self.spatial_channels:
            mask = x.new_zeros(x.shape[0], self.spatial_channels, *x.shape[2:]) if spatial is None else spatial
            h = torch.cat([x, mask], dim=1)  # (B, C + S, h, w), Eq. 8 and 9
        h = self.conv_in(h)
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, embedding, tokens)
            skips.append(h)
        h = self.middle_out(self._run(self.middle_in, h, embedding, tokens), embedding)
        for stage in self.up:
            if stage.block.resample == "none":
                h = torch.cat([h, skips.pop()], dim=1)
            h = self._run(stage, h, embedding, tokens)
        return self.conv_out(self.norm_out(h)).float()

    def _run(self, stage: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)

    def check_guidance(self, label: Tensor | None, spatial: Tensor | None) -> None:
        """Refuse guidance that this network was built without, or of another width: ValueError."""
        for name, given, width in (("label", label, self.num_clusters), ("spatial", spatial, self.spatial_channels)):
            if given is not None and not width:
                raise ValueError(f"got {name} guidance for a network built without it, expected none: leave it out")
            if given is not None and given.shape[1] != width:
                raise ValueError(f"got {name} guidance of width {given.shape[1]}, expected {width}")

    def _check_latent(self, x: Tensor, spatial: Tensor | None) -> None:
        _, channels, *sides = x.shape
        if channels != self.channels or any(side % self.downsample for side in sides):
            need = f"{self.channels} channels and sides divisible by {self.downsample}"
            raise ValueError(f"got latents of shape {tuple(x.shape)}, expected {need}")
        if spatial is not None and spatial.shape[2:] != x.shape[2:]:
            raise ValueError(f"got masks of {tuple(spatial.shape[2:])}, expected the latents' {tuple(sides)}")
