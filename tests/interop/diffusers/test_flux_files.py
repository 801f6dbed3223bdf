"""FLUX in its own files: written under the published names from a tiny network of diffusers, and read again."""

import pytest
import torch

pytest.importorskip("diffusers")

from safetensors.torch import save_file

from diffdistill.interop import ForeignFileError, read_foreign
from diffdistill.interop.diffusers import from_network
from tests.interop.diffusers.builders import diffusers, filled

NAMES = [
    ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    ("context_embedder", "txt_in"),
    ("x_embedder", "img_in"),
]
SCALE = {"attn.norm_q": "query_norm", "attn.norm_k": "key_norm"}


def network(guided):
    torch.manual_seed(0)
    return filled(
        diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=10,
            pooled_projection_dim=6,
            guidance_embeds=guided,
            axes_dims_rope=(4, 14, 14),
        )
    )


def original(net):
    """The state of a network under the names of the code that FLUX was published with."""
    state, made = net.state_dict(), {}

    def take(name):
        return state.pop(name)

    for ours, theirs in NAMES:
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in state:
                made[f"{theirs}.{kind}"] = take(f"{ours}.{kind}")
    for kind in ("weight", "bias"):
        made[f"final_layer.linear.{kind}"] = take(f"proj_out.{kind}")
        scale, shift = take(f"norm_out.linear.{kind}").chunk(2)
        made[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for i in range(2):
        here, there = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        streams = (("img", "attn.to_{}", "norm1", "ff"), ("txt", "attn.add_{}_proj", "norm1_context", "ff_context"))
        for stream, add, norm, ff in streams:
            for kind in ("weight", "bias"):
                joint = [take(f"{here}{add.format(letter)}.{kind}") for letter in "qkv"]
                made[f"{there}{stream}_attn.qkv.{kind}"] = torch.cat(joint)
                out = "attn.to_out.0" if stream == "img" else "attn.to_add_out"
                made[f"{there}{stream}_attn.proj.{kind}"] = take(f"{here}{out}.{kind}")
                made[f"{there}{stream}_mod.lin.{kind}"] = take(f"{here}{norm}.linear.{kind}")
                made[f"{there}{stream}_mlp.0.{kind}"] = take(f"{here}{ff}.net.0.proj.{kind}")
                made[f"{there}{stream}_mlp.2.{kind}"] = take(f"{here}{ff}.net.2.{kind}")
            for letter, name in (("q", "query_norm"), ("k", "key_norm")):
                ours = f"attn.norm_{letter}" if stream == "img" else f"attn.norm_added_{letter}"
                made[f"{there}{stream}_attn.norm.{name}.scale"] = take(f"{here}{ours}.weight")
    here, there = "single_transformer_blocks.0.", "single_blocks.0."
    for kind in ("weight", "bias"):
        joint = [take(f"{here}{part}.{kind}") for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        made[f"{there}linear1.{kind}"] = torch.cat(joint)
        made[f"{there}linear2.{kind}"] = take(f"{here}proj_out.{kind}")
        made[f"{there}modulation.lin.{kind}"] = take(f"{here}norm.linear.{kind}")
    for ours, name in SCALE.items():
        made[f"{there}norm.{name}.scale"] = take(f"{here}{ours}.weight")
    assert not state
    return made


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_transformer_is_the_same_network(guided, prefix, tmp_path):
    net = network(guided)
    save_file({f"{prefix}{n}": v.clone().contiguous() for n, v in original(net).items()}, tmp_path / "flux.safetensors")
    found = read_foreign(tmp_path / "flux.safetensors")
    assert found.kind == "flux" and "2 + 1 blocks" in found.description
    torch.testing.assert_close(dict(found.denoiser.model.module.state_dict()), dict(net.state_dict()))
    levels = {"shift": 3.0, "use_dynamic_shifting": True} if guided else {"shift": 1.0}
    same = from_network(net, diffusers.FlowMatchEulerDiscreteScheduler(**levels))
    assert found.denoiser.w_range == same.w_range and found.denoiser.sigma_max == same.sigma_max
    assert found.denoiser.model.options.axes_dims_rope == [4, 14, 14]


def test_damage_is_one_error(tmp_path):
    state = {name: value.clone().contiguous() for name, value in original(network(False)).items()}
    path = tmp_path / "flux.safetensors"
    save_file({**state, "single_blocks.0.more.weight": torch.ones(2)}, path)
    with pytest.raises(ForeignFileError, match="a parameter 'single_blocks.0.more.weight' that FLUX has not"):
        read_foreign(path)
    save_file({**state, "single_blocks.0.linear1.weight": torch.ones(100, 64)}, path)
    with pytest.raises(ForeignFileError, match="linear1.weight has too few rows"):
        read_foreign(path)
    del state["txt_in.weight"]
    save_file(state, path)
    with pytest.raises(ForeignFileError, match="misses txt_in.weight"):
        read_foreign(path)
