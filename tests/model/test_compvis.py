"""CompVis' UNet as ours: every name has its place, and every block computes what an independent formulation does."""

from __future__ import annotations

import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_sg.model import UNet
from ldm_sg.model.compvis import convert, settings_of, their_names

CHURCHES = {"base": 192, "multipliers": (1, 2, 2, 4, 4), "attention": (1, 2, 4, 8), "num_blocks": 2}
# of "name [shape]" lines, sorted, of the published checkpoint's 1,303 tensors
CHURCHES_SHA256 = "82fdc33caf0bd586e48bab39e94f9fc4a0b73b2e0a526d1efee96b9b7d52a085"
HEADS = 4

State = dict[str, Tensor]


# the independent formulation: functions of a state dict with CompVis' names


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def conv(s: State, name: str, x: Tensor, padding: int = 1) -> Tensor:
    return F.conv2d(x, s[f"{name}.weight"], s[f"{name}.bias"], padding=padding)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def norm(s: State, name: str, x: Tensor) -> Tensor:
    groups = x.unflatten(1, (32, -1)).flatten(2)
    mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, correction=0)
    y = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return y * s[f"{name}.weight"].view(shape) + s[f"{name}.bias"].view(shape)


def resample(x: Tensor, mode: str) -> Tensor:
    if mode == "down":
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if mode == "up" else x


def res_block(s: State, name: str, x: Tensor, embedding: Tensor, mode: str = "") -> Tensor:
    h = conv(s, f"{name}.in_layers.2", resample(silu(norm(s, f"{name}.in_layers.0", x)), mode))
    x = resample(x, mode)
    scale, shift = linear(s, f"{name}.emb_layers.1", silu(embedding))[:, :, None, None].tensor_split(2, dim=1)
    h = norm(s, f"{name}.out_layers.0", h) * (1 + scale) + shift
    h = conv(s, f"{name}.out_layers.3", silu(h))
    return h + (conv(s, f"{name}.skip_connection", x, 0) if f"{name}.skip_connection.weight" in s else x)


def attention(s: State, name: str, x: Tensor) -> Tensor:
    flat = x.flatten(2)  # (B, C, L)
    qkv = F.conv1d(norm(s, f"{name}.norm", flat), s[f"{name}.qkv.weight"], s[f"{name}.qkv.bias"])
    heads, width = [], flat.shape[1] // HEADS
    for h in range(HEADS):  # the rows of a head lie together: its q, its k, its v
        q, k, v = qkv[:, 3 * width * h : 3 * width * (h + 1)].split(width, dim=1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(width), dim=-1)
        heads.append(torch.einsum("bts,bcs->bct", weight, v))
    out = F.conv1d(torch.cat(heads, 1), s[f"{name}.proj_out.weight"], s[f"{name}.proj_out.bias"])
    return x + out.view_as(x)


def time_embedding(s: State, time: Tensor, base: int) -> Tensor:
    rates = torch.tensor([10_000 ** (-i / (base // 2)) for i in range(base // 2)])
    angles = time[:, None] * rates
    return linear(s, "time_embed.2", silu(linear(s, "time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))))


def unet(s: State, x: Tensor, time: Tensor) -> Tensor:
    """Two levels, one block each, attention on the second."""
    embedding = time_embedding(s, time, 32)
    h = conv(s, "input_blocks.0.0", x)
    skips = [h]
    h = res_block(s, "input_blocks.1.0", h, embedding)
    skips.append(h)
    h = res_block(s, "input_blocks.2.0", h, embedding, "down")
    skips.append(h)
    h = attention(s, "input_blocks.3.1", res_block(s, "input_blocks.3.0", h, embedding))
    skips.append(h)
    h = attention(s, "middle_block.1", res_block(s, "middle_block.0", h, embedding))
    h = res_block(s, "middle_block.2", h, embedding)
    for i in range(4):
        h = res_block(s, f"output_blocks.{i}.0", torch.cat([h, skips.pop()], 1), embedding)
        if i < 2:
            h = attention(s, f"output_blocks.{i}.1", h)
        if i == 1:
            h = res_block(s, "output_blocks.1.2", h, embedding, "up")
    return conv(s, "out.2", silu(norm(s, "out.0", h)))


@pytest.fixture
def state(compvis: SimpleNamespace) -> State:
    prefix = "model.diffusion_model."
    return {n.removeprefix(prefix): t for n, t in compvis.tensors().items() if n.startswith(prefix)}


@pytest.fixture
def network(state: State) -> UNet:
    made = UNet(4, base=32, multipliers=(1, 2), attention=(2,), num_blocks=1, heads=HEADS).eval()
    made.load_state_dict(convert(state, made))
    return made


def maps(channels: int, side: int = 4) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(channels))


@pytest.mark.parametrize(
    ("theirs", "ours", "channels", "mode"),
    [
        ("input_blocks.1.0", "down.0.block", 32, ""),
        ("input_blocks.2.0", "down.1.block", 32, "down"),
        ("input_blocks.3.0", "down.2.block", 32, ""),  # with a skip convolution
        ("middle_block.2", "middle_out", 64, ""),
        ("output_blocks.1.2", "up.2.block", 64, "up"),
        ("output_blocks.3.0", "up.4.block", 64, ""),
    ],
)
@torch.no_grad()
def test_residual_blocks(state: State, network: UNet, theirs: str, ours: str, channels: int, mode: str) -> None:
    x, embedding = maps(channels), torch.randn(2, 128)
    expected = res_block(state, theirs, x, embedding, mode)
    torch.testing.assert_close(network.get_submodule(ours)(x, embedding), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("input_blocks.3.1", "down.2.attention"),
        ("middle_block.1", "middle_in.attention"),
        ("output_blocks.1.1", "up.1.attention"),
    ],
)
@torch.no_grad()
def test_attention(state: State, network: UNet, theirs: str, ours: str) -> None:
    x = 3 * maps(64)
    expected = attention(state, theirs, x)
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(network.get_submodule(ours)(x, None), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_time_embedding_and_whole_network(state: State, network: UNet) -> None:
    x, time = maps(4, 8), torch.tensor([0.0, 731.0])
    seen: list[Tensor] = []
    network.time_embed.register_forward_hook(lambda _, args, out: seen.append(out))
    out = network(x, time)
    torch.testing.assert_close(seen[0], time_embedding(state, time, 32), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, unet(state, x, time), rtol=1e-4, atol=1e-4)


def test_every_tensor_of_churches_has_one_place(compvis: SimpleNamespace) -> None:
    shapes = compvis.shapes((128, 256, 512, 512), **CHURCHES)
    lines = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    assert len(shapes) == 1303 and hashlib.sha256(lines.encode()).hexdigest() == CHURCHES_SHA256
    with torch.device("meta"):
        network = UNet(4, base=192, multipliers=(1, 2, 2, 4, 4), attention=(1, 2, 4, 8))
        own = {n: torch.empty(s) for n, s in compvis.unet(**CHURCHES)}
    names = their_names(network)
    assert names.keys() == own.keys() and sorted(names.values()) == sorted(network.state_dict())
    assert len({name.replace(".", "") for name in names}) == len(names), "the averages' names stay apart"
    converted = convert(own, network)
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in network.state_dict().items()}
    found = settings_of(own)
    assert found == {"channels": 4} | {n: v if isinstance(v, int) else list(v) for n, v in CHURCHES.items()}


def test_what_does_not_fit_is_named(state: State, network: UNet) -> None:
    with pytest.raises(ValueError, match=r"1 tensors have no place in this network: label_emb\.weight"):
        convert(state | {"label_emb.weight": torch.zeros(3)}, network)
    with pytest.raises(ValueError, match=r"1 tensors of this network are missing: out\.2\.bias"):
        convert({n: t for n, t in state.items() if n != "out.2.bias"}, network)
    with pytest.raises(ValueError, match=r"out\.2\.weight has shape \(5, 32, 3, 3\), .*conv_out\.weight \(4, 32, 3, 3"):
        convert(state | {"out.2.weight": torch.zeros(5, 32, 3, 3)}, network)
    with pytest.raises(ValueError, match="no latent diffusion UNet"):
        settings_of({"a": torch.zeros(1)})
