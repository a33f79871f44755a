"""What decides which kernels a device takes: how attention lies in memory, types of norms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dkdm.networks import lucidrains, network_class, parts

SIDES = {"sample_size": (16, 16), "in_channels": 3, "out_channels": 3}
NETWORKS = {
    "adm": (
        "AdmUNet",
        {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "num_heads": 2},
    ),
    "adm, split first": (
        "AdmUNet",
        {
            "model_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": (1, 2),
            "use_new_attention_order": True,
        },
    ),
    "edm": (
        "SongUNet",
        {"sample_size": 16, "block_out_channels": (32, 32), "layers_per_block": 1},
    ),
    "dhariwal": (
        "DhariwalUNet",
        {"sample_size": 16, "block_out_channels": (64, 64), "layers_per_block": 1},
    ),
    "edm2": (
        "EDM2UNet",
        {
            "sample_size": 16,
            "block_out_channels": (64, 64),
            "layers_per_block": 1,
            "noise_channels": 64,
            "emb_channels": 64,
        },
    ),
    "lucidrains": (
        "LucidrainsUNet",
        {
            "first_channels": 32,
            "block_out_channels": (32, 32),
            "full_attention": (True, True),
            "heads": (2, 2),
            "head_channels": (16, 16),
        },
    ),
    "uvit": ("UVit", {"patch_size": (2, 2), "width": 64, "depth": 3, "heads": 2}),
    "mobile": ("MobileUNet", {"block_out_channels": (32, 64)}),
}


def made(name):
    kind, config = NETWORKS[name]
    return network_class(kind)(**SIDES | config)


@pytest.mark.parametrize("name", NETWORKS)
def test_attention_may_take_the_fast_kernels(name, monkeypatch):
    seen = []

    def attention(q, k, v, attn_mask):
        assert attn_mask is None
        seen.append((q, k, v))
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with torch.device("meta"):
        network = made(name).to(torch.bfloat16)
        network(torch.empty(4, 3, 16, 16, dtype=torch.bfloat16), torch.empty(4))
    assert seen
    for tensors in seen:
        assert {x.dtype for x in tensors} == {torch.bfloat16}
        for x in tensors:
            assert x.ndim == 4
            assert x.stride(-1) == 1
            assert x.shape[-1] % 8 == 0
            assert x.shape[-1] <= 256


def test_attention_is_the_same_in_any_layout():
    parts_of_a_convolution = torch.randn(3, 2, 4, 8, 5).transpose(3, 4)
    beside = parts_of_a_convolution.contiguous()
    torch.testing.assert_close(parts.attend(*parts_of_a_convolution), parts.attend(*beside))


def norms():
    pixels = lucidrains.PixelNorm(32)
    return {
        "group": (parts.GroupNorm(8, 32), nn.GroupNorm(8, 32)),
        "layer": (parts.LayerNorm(8), nn.LayerNorm(8)),
        "bare layer": (
            parts.LayerNorm(8, elementwise_affine=False),
            nn.LayerNorm(8, elementwise_affine=False),
        ),
        "pixel": (pixels, lambda x: F.normalize(x, dim=1) * pixels.g * math.sqrt(32)),
    }


@pytest.mark.parametrize("name", norms())
def test_a_norm_is_of_the_type_of_autocast(name):
    own, plain = norms()[name]
    for parameter in own.parameters():
        nn.init.normal_(parameter)
    if isinstance(plain, nn.Module):
        plain.load_state_dict(own.state_dict())
    x = torch.randn(2, 32, 8, 8) + 3
    assert torch.equal(own(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            found = own(given)
            assert found.dtype == torch.bfloat16
            expected = in_float32(own, given)
            torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def in_float32(norm, x):
    with torch.autocast("cpu", enabled=False):
        return norm(x.float())


@pytest.mark.parametrize("name", ["adm", "lucidrains", "uvit"])
def test_a_network_learns_under_autocast_as_without(name):
    network = made(name)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    x, times = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    found = []
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = network(x, times)
        output.float().square().mean().backward()
        found.append([output.detach().float(), *(p.grad for p in network.parameters())])
    for whole, half in zip(*found, strict=True):
        assert half.dtype == torch.float32
        assert (half - whole).norm() < 0.1 * whole.norm() + 1e-3


def test_a_norm_can_be_compiled_under_autocast():
    norm = torch.compile(parts.GroupNorm(8, 32), backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(2, 32, 4)).dtype == torch.bfloat16


on_a_device = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_a_device) for name in NETWORKS])
def test_the_fast_kernels_take_it(name):
    network = made(name).to("cuda")
    x, times = torch.randn(2, 3, 16, 16, device="cuda"), torch.tensor([3.0, 700.0], device="cuda")
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fast), torch.autocast("cuda", torch.bfloat16):
        network(x, times).float().square().mean().backward()


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_a_device) for name in norms()])
def test_a_norm_is_of_the_type_of_autocast_on_a_device(name):
    own = norms()[name][0]
    x = torch.randn(2, 32, 8, 8)
    expected, own = own(x).detach(), own.to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = own(x.to("cuda").bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.detach().float().cpu(), expected, rtol=3e-2, atol=3e-2)
