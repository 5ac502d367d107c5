"""Softmax attention whose keys and values may carry a prefix: CA(m, concat[k, m]) of the paper (appendix B).

Image tokens attend to the guidance tokens (the prefix) and to each other in one softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor | None = None,
    v_prefix: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend from `q` to concat[prefix, image] keys.

    Args:
        q, k, v: (B, L, heads, width), any strides.
        k_prefix, v_prefix: (B, P, heads, width) or None.
        scale: softmax temperature; None means 1/sqrt(width).
    Returns:
        (B, L, heads, width).
    Source: paper appendix B, "Cross-attention"; Vaswani et al. (2017), eq. 1.
    """
    assert (k_prefix is None) == (v_prefix is None), "a prefix has keys and values"
    if k_prefix is not None and v_prefix is not None:
        k = torch.cat([k_prefix, k], dim=1)  # (B, P + L, heads, width)
        v = torch.cat([v_prefix, v], dim=1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, L, width)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
