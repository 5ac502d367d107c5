"""Print which implementation serves which tensors on this machine: python -m ldm_sg.ops"""

from __future__ import annotations

from ldm_sg.ops.conv3x3 import TABLE as CONV3X3
from ldm_sg.ops.group_norm_silu import TABLE as GROUP_NORM_SILU
from ldm_sg.ops.guided_step import TABLE as GUIDED_STEP
from ldm_sg.ops.prefix_attention import TABLE as PREFIX_ATTENTION
from ldm_sg.ops.table import describe

TABLES = {
    "group_norm_silu": GROUP_NORM_SILU,
    "prefix_attention": PREFIX_ATTENTION,
    "conv3x3": CONV3X3,
    "guided_step": GUIDED_STEP,
}

if __name__ == "__main__":
    print("\n\n".join(describe(name, table) for name, table in TABLES.items()))
