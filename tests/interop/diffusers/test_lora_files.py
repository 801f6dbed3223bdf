"""Files of low-rank adapters: in every naming they add the same to the weights, as stock pipelines do."""

import copy
import json
import re

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors.torch import save_file

from diffdistill import load_denoiser
from diffdistill.interop.diffusers import from_pipeline
from diffdistill.interop.lora import add_lora
from diffdistill.models import guidance_student, save_denoiser
from tests.builders import tiny_denoiser
from tests.interop.diffusers.builders import pipeline
from tests.scripts.calling import call

RANK, ALPHA, STRENGTH = 3, 1.5, 0.7
LAYERS = ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj")


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return from_pipeline(pipeline())


def layers_of(unet):
    return {name: module for name, module in unet.named_modules() if name.endswith(LAYERS)}


def factors(unet):
    """`down` and `up` for each layer."""
    generator, made = torch.Generator().manual_seed(5), {}
    for name, layer in layers_of(unet).items():
        out, ins, *kernel = layer.weight.shape
        down = torch.randn(RANK, ins, *kernel, generator=generator)
        made[name] = down, torch.randn(out, RANK, *[1] * len(kernel), generator=generator)
    return made


def kohya(name):
    return "lora_unet_" + name.replace(".", "_")


def original(name, per_level):
    """The name in the code of latent diffusion, which kohya's files of XL have."""
    name = re.sub(r"mid_block\.attentions\.0\.", "middle_block.1.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}.", name)

    def place(match):
        side, block, kind, index = match[1], int(match[2]), match[3], int(match[4])
        number = block * (per_level + 1) + index + (side == "down")
        return f"{ {'down': 'input', 'up': 'output'}[side] }_blocks.{number}.{int(kind == 'attentions')}."

    name = re.sub(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.", place, name)
    return name.replace("conv1", "in_layers.2").replace("time_emb_proj", "emb_layers.1")


NAMINGS = {
    "kohya": lambda n, d, u, k: {
        f"{kohya(n)}.lora_down.weight": d,
        f"{kohya(n)}.lora_up.weight": u,
        f"{kohya(n)}.alpha": torch.tensor(ALPHA),
    },
    "kohya of XL": lambda n, d, u, k: {
        f"{kohya(original(n, k))}.lora_down.weight": d,
        f"{kohya(original(n, k))}.lora_up.weight": u,
        f"{kohya(original(n, k))}.alpha": torch.tensor(ALPHA),
    },
    "diffusers": lambda n, d, u, k: {
        f"unet.{n}.lora_A.weight": d,
        f"unet.{n}.lora_B.weight": u,
        f"unet.{n}.alpha": torch.tensor(ALPHA),
    },
    "older diffusers": lambda n, d, u, k: {
        f"unet.{n}.lora.down.weight": d,
        f"unet.{n}.lora.up.weight": u * ALPHA / RANK,
    },
    "peft": lambda n, d, u, k: {
        f"base_model.model.{n}.lora_A.default.weight": d,
        f"base_model.model.{n}.lora_B.default.weight": u,
    },
}


def written(path, naming, unet, **more):
    state = dict(more)
    for name, (down, up) in factors(unet).items():
        state |= {n: v.contiguous() for n, v in NAMINGS[naming](name, down, up, unet.config.layers_per_block).items()}
    if naming == "peft":
        (path.parent / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    save_file(state, path)
    return path


def expected(unet):
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    for name, (down, up) in factors(unet).items():
        product = torch.einsum("or...,ri...->oi...", up.flatten(1), down.flatten(1)).reshape(
            state[f"{name}.weight"].shape
        )
        state[f"{name}.weight"] += STRENGTH * ALPHA / RANK * product
    return state


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_adds_the_same(naming, parts, tmp_path):
    unet = parts.denoiser.model.module
    path = written(tmp_path / "lora.safetensors", naming, unet)
    denoiser = copy.deepcopy(parts.denoiser)
    assert add_lora(denoiser, path, strength=STRENGTH) is denoiser
    torch.testing.assert_close(dict(denoiser.model.module.state_dict()), expected(unet), rtol=1e-5, atol=1e-5)
    assert denoiser.config["provenance"]["lora"] == [{"file": "lora.safetensors", "strength": STRENGTH}]
    add_lora(denoiser, path, strength=-STRENGTH)
    torch.testing.assert_close(denoiser.state_dict(), parts.denoiser.state_dict(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("naming", ["kohya", "older diffusers"])
def test_stock_pipelines_agree(naming, tmp_path):
    torch.manual_seed(0)
    stock = pipeline()
    denoiser = copy.deepcopy(from_pipeline(stock).denoiser)
    path = written(tmp_path / "lora.safetensors", naming, stock.unet)
    stock.load_lora_weights(str(path))
    stock.fuse_lora(lora_scale=STRENGTH)
    stock.unload_lora_weights()
    add_lora(denoiser, path, strength=STRENGTH)
    torch.testing.assert_close(
        dict(denoiser.model.module.state_dict()), dict(stock.unet.state_dict()), rtol=1e-4, atol=1e-4
    )


def test_a_student_that_takes_w_and_has_adapters_of_its_own_is_adapted_too(parts, tmp_path):
    from diffdistill.interop.diffusers.adapters import add_adapters

    unet = parts.denoiser.model.module
    path = written(tmp_path / "lora.safetensors", "kohya", unet)
    student = add_adapters(guidance_student(copy.deepcopy(parts.denoiser), (0.0, 14.0)), rank=2)
    add_lora(student, path, strength=STRENGTH)
    name = next(iter(factors(unet)))
    layer = student.model.module.get_submodule(name)
    torch.testing.assert_close(layer.base_layer.weight, expected(unet)[f"{name}.weight"], rtol=1e-5, atol=1e-5)


def test_files_that_do_not_fit_are_refused_by_name(parts, tmp_path, caplog):
    unet, path = parts.denoiser.model.module, tmp_path / "lora.safetensors"
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    save_file({"lora_unet_nowhere.lora_down.weight": down, "lora_unet_nowhere.lora_up.weight": up}, path)
    with pytest.raises(ValueError, match="of the 1 adapters in .* none fits UNet2DConditionModel: the first is lora"):
        add_lora(parts.denoiser, path)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    written(path, "kohya", unet, **{"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up})
    with pytest.raises(ValueError, match="1 fit no layer of UNet2DConditionModel: the first is lora_unet_x"):
        add_lora(parts.denoiser, path)
    name = next(iter(factors(unet)))
    save_file({f"{kohya(name)}.lora_down.weight": down, f"{kohya(name)}.lora_up.weight": up}, path)
    with pytest.raises(ValueError, match="does not fit its layer of UNet2DConditionModel: it is of another model"):
        add_lora(parts.denoiser, path)
    texts = {"lora_te_a.lora_down.weight": down, "lora_te_a.lora_up.weight": up.contiguous()}
    save_file(texts, path)
    with pytest.raises(ValueError, match="holds no adapters for UNet2DConditionModel, but those of text encoders"):
        add_lora(parts.denoiser, path)
    for key, kind in (
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.dora_scale", "DoRA"),
        ("lora_unet_x.lokr_w1", "LoKr"),
    ):
        save_file({key: down}, path)
        with pytest.raises(ValueError, match=f"of a form that is not read .{kind}"):
            add_lora(parts.denoiser, path)
    save_file({"conv_in.weight": down}, path)
    with pytest.raises(ValueError, match="holds no adapters, or some that are not read: the first is conv_in.weight"):
        add_lora(parts.denoiser, path)
    with pytest.raises(FileNotFoundError, match="no adapters at"):
        add_lora(parts.denoiser, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="lora_strength must be a finite number"):
        add_lora(parts.denoiser, path, strength=float("nan"))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    written(path, "kohya", unet, **texts)
    add_lora(copy.deepcopy(parts.denoiser), path)
    assert "2 tensors of text encoders are left out" in caplog.text


def test_commands_take_adapters_for_models_of_ours_too(tmp_path):
    model = tmp_path / "m.safetensors"
    denoiser = tiny_denoiser(data_shape=[1, 8, 8], num_classes=10)
    save_denoiser(denoiser, model)
    name, layer = next(
        (n, m) for n, m in denoiser.model.named_modules() if getattr(m, "weight", torch.ones(1)).ndim == 2
    )
    out, ins = layer.weight.shape
    factors = {f"{name}.lora_A.weight": torch.ones(2, ins), f"{name}.lora_B.weight": torch.ones(out, 2)}
    save_file(factors, tmp_path / "l.safetensors")
    lora = [f"lora={tmp_path / 'l.safetensors'}", "lora_strength=0.5"]
    adapted = tmp_path / "adapted.safetensors"
    save_denoiser(add_lora(load_denoiser(model), tmp_path / "l.safetensors", strength=0.5), adapted)

    def drawn(*options):
        done = call("sample", "num_steps=2", "num_samples=3", "save=npz", *options)
        assert done.returncode == 0, done.stderr
        import numpy as np

        return np.load(done.stdout.strip())["x"]

    same = drawn(f"model={model}", f"out={tmp_path / 'a'}", *lora)
    assert (same == drawn(f"model={adapted}", f"out={tmp_path / 'b'}")).all()
    assert (same != drawn(f"model={model}", f"out={tmp_path / 'c'}")).any()
    quick = ["trainer.updates=1", "trainer.batch_size=8", "trainer.sample_every=null", "preview.num_samples=2"]
    for script, options in (
        ("distill_guidance", []),
        ("distill_steps", ["start_steps=2", "last_steps=1", "stages=null"]),
    ):
        done = call(script, f"teacher={model}", f"out={tmp_path / script}", *quick, *options, *lora)
        assert done.returncode == 0 and "1 adapters of" in done.stderr, done.stderr
    for options, message in (
        (["lora_strength=2"], "lora_strength=2 has no effect without lora=FILE"),
        (["lora={rank:4}"], "this command trains no adapters"),
        (["lora=nowhere"], "no adapters at 'nowhere'"),
    ):
        done = call("sample", f"model={model}", "num_steps=2", f"out={tmp_path / 'd'}", *options)
        assert done.returncode == 2 and message in done.stderr
