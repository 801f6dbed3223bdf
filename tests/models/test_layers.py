"""The layers take the fast ways that PyTorch has, and compute the same there."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.models.adm_unet import AttentionBlock
from diffdistill.models.layers import BlockStyle, GroupNorm, UNetBlock, upsample


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_norm_by_channel_is_the_norm(layout, offset):
    torch.manual_seed(0)
    norm = GroupNorm(24, eps=1e-6)
    for parameter in norm.parameters():
        parameter.data.normal_()
    x = (3 * torch.randn(2, 24, 5, 7) + offset).bfloat16().to(memory_format=layout)
    double = norm.weight.double(), norm.bias.double()
    with torch.no_grad():
        expected = F.group_norm(x.double(), norm.num_groups, *double, norm.eps)
        found = norm.by_channel(x)
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4 * (1 + offset))
        assert found.dtype == x.dtype and found.is_contiguous(memory_format=layout)
        torch.testing.assert_close(norm.by_channel(x.flatten(2)), found.flatten(2))
        assert norm.by_channel(torch.full_like(x, 300.0)).isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_takes_the_fused_kernel(layout):
    style = BlockStyle(emb_channels=3, num_heads=2)
    block = UNetBlock(16, 16, style, attention=True).to(memory_format=layout)
    x = torch.randn(2, 16, 5, 7).to(memory_format=layout)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # which refuses what it cannot do
        block(x, torch.randn(2, 3))
        for order in ("heads_first", "qkv_first"):
            AttentionBlock(32, 2, order)(torch.randn(2, 32, 5, 7).to(memory_format=layout))


def test_upsampling_repeats_in_the_dtype_that_it_is_given():
    x = torch.arange(12.0).view(1, 2, 2, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = upsample(x)
    assert torch.equal(found, x.repeat_interleave(2, 2).repeat_interleave(2, 3)) and found.dtype == x.dtype
