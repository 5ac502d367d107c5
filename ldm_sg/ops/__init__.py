"""The network's hot operations, one file each, every one with its definition in plain torch."""

from ldm_sg.ops.conv3x3 import conv3x3
from ldm_sg.ops.group_norm_silu import group_norm_silu
from ldm_sg.ops.guided_step import guided_step
from ldm_sg.ops.prefix_attention import prefix_attention

__all__ = ["conv3x3", "group_norm_silu", "guided_step", "prefix_attention"]
