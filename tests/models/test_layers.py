"""The layers take the fast ways that PyTorch has, and compute the same there."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.models.adm_unet import AttentionBlock
from diffdistill.models.layers import BlockStyle, GroupNorm, UNetBlock, upsample

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


@DEVICES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_norm_by_channel_is_the_norm(layout, offset, device):
    torch.manual_seed(0)
    norm = GroupNorm(24, eps=1e-6).to(device)
    for parameter in norm.parameters():
        parameter.data.normal_()
    x = (3 * torch.randn(2, 24, 5, 7) + offset).bfloat16().to(device, memory_format=layout)
    double = norm.weight.double(), norm.bias.double()
    with torch.no_grad():
        expected = F.group_norm(x.double(), norm.num_groups, *double, norm.eps)
        found = norm.by_channel(x)
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4 * (1 + offset))
        assert found.dtype == x.dtype and found.is_contiguous(memory_format=layout)
        torch.testing.assert_close(norm.by_channel(x.flatten(2)), found.flatten(2))
        constant = norm.by_channel(torch.full_like(x, 300.0))  # of variance 0, up to rounding
        torch.testing.assert_close(constant, norm.bias.to(x.dtype)[None, :, None, None].expand_as(x))


@DEVICES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_takes_the_fused_kernel(layout, device):
    style = BlockStyle(emb_channels=3, num_heads=2)
    block = UNetBlock(32, 32, style, attention=True).to(device, memory_format=layout)
    x, emb = torch.randn(2, 32, 5, 7, device=device).to(memory_format=layout), torch.randn(2, 3, device=device)
    half = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")  # where the kernel takes no float32
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION), half:  # which refuses what it cannot do
        block(x, emb)
        for order in ("heads_first", "qkv_first"):
            AttentionBlock(32, 2, order).to(device)(x)


def test_upsampling_repeats_in_the_dtype_that_it_is_given():
    x = torch.arange(12.0).view(1, 2, 2, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = upsample(x)
    assert torch.equal(found, x.repeat_interleave(2, 2).repeat_interleave(2, 3)) and found.dtype == x.dtype
