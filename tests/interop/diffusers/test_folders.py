"""Folders of diffusers, also a stranger's: no code of theirs runs, and damage ends in a line that names the folder."""

import json
import shutil

import pytest
import torch

pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file

from diffdistill import load_denoiser
from diffdistill.interop.diffusers import load_pipeline
from diffdistill.interop.diffusers.scheduler import scheduler_for
from tests.interop.diffusers.builders import diffusers, flux_pipeline, pipeline, sd3_pipeline


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders") / "good"
    pipeline().save_pretrained(folder)
    return folder


def index_of(folder, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["10KB", "1GB"])
def test_weights_in_half_precision_become_float32_in_every_part(variant, size, tmp_path):
    stored = pipeline().to(torch.float16)
    stored.save_pretrained(tmp_path / "half", variant=variant, max_shard_size=size)
    loaded = load_pipeline(tmp_path / "half").pipeline
    for part in ("unet", "vae", "text_encoder"):
        state, expected = getattr(loaded, part).state_dict(), getattr(stored, part).float().state_dict()
        assert all(
            torch.equal(state[name], expected[name]) and state[name].dtype == expected[name].dtype for name in state
        )
    loaded("a cat", num_inference_steps=1)


def test_parts_that_a_pipeline_was_saved_without_are_not_asked_for(tmp_path):
    sd3_pipeline().save_pretrained(tmp_path / "without T5")
    assert load_pipeline(tmp_path / "without T5").prompts(["a"])["encoder_hidden_states"].shape[2] == 10


CODE = {
    "pipeline": ("evil.py", {"_class_name": ["evil", "Evil"]}, "names no pipeline"),
    "part": ("unet/evil.py", {"unet": ["evil", "Evil"]}, "'evil'"),
    "no name": ("None.py", {}, "code of its own"),
    "name of a library": ("unet/diffusers.py", {}, "code of its own"),
    "module": ("evil.py", {"text_encoder": ["antigravity", "Evil"]}, "'antigravity'"),
    "path": ("evil.py", {"unet": ["../evil", "Evil"]}, "evil"),
}


@pytest.mark.parametrize("case", CODE)
def test_code_in_a_folder_is_refused_and_not_executed(case, good, tmp_path):
    """Versions of diffusers before 0.38 execute each of these."""
    file, entries, match = CODE[case]
    shutil.copytree(good, tmp_path / "folder")
    witness = tmp_path / "witness"
    names = "import diffusers\nclass Evil(diffusers.UNet2DConditionModel): pass\nUNet2DConditionModel = Evil\n"
    (tmp_path / "folder" / file).write_text(f"open({str(witness)!r}, 'w').close()\n{names}")
    index_of(tmp_path / "folder", **entries)
    with pytest.raises(ValueError, match=match):
        load_denoiser(tmp_path / "folder")
    assert not witness.exists()


def test_code_that_nothing_would_load_does_not_matter(good, tmp_path):
    shutil.copytree(good, tmp_path / "folder")
    (tmp_path / "folder/handler.py").write_text("raise SystemExit")
    assert load_denoiser(tmp_path / "folder").data_shape == (4, 8, 8)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def without_a_weight(path):
    state = load_file(path)
    del state["conv_out.weight"]
    save_file(state, path, metadata={"format": "pt"})


UNET = "unet/diffusion_pytorch_model.safetensors"
DAMAGES = {
    "unet": (lambda folder: cut(folder / UNET), "unet"),
    "text encoder": (lambda folder: cut(folder / "text_encoder/model.safetensors"), "header"),
    "adapters": (lambda folder: (folder / "pytorch_lora_weights.safetensors").write_bytes(b"abc"), "lora"),
    "missing weight": (lambda folder: without_a_weight(folder / UNET), "conv_out.weight"),
    "tokenizer": (lambda folder: [file.unlink() for file in (folder / "tokenizer").iterdir()], "cannot read"),
    "index": (lambda folder: (folder / "model_index.json").write_text('{"a": 1}'), "names no pipeline"),
    "list": (lambda folder: (folder / "model_index.json").write_text("[1]"), "names no pipeline"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_folders_end_in_one_line_that_names_them(case, good, tmp_path):
    damage, match = DAMAGES[case]
    shutil.copytree(good, tmp_path / "folder")
    damage(tmp_path / "folder")
    with pytest.raises(ValueError, match=match) as refused:
        load_pipeline(tmp_path / "folder")
    assert str(tmp_path / "folder") in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("make", [pipeline, flux_pipeline])
def test_a_pipeline_is_saved_and_loaded_with_our_scheduler(make, tmp_path):
    pipe = make()
    plain = load_levels(pipe, tmp_path / "plain")
    pipe.scheduler = scheduler_for(pipe, solver={"name": "dpmpp", "order": 2})
    levels = load_levels(pipe, tmp_path / "ours")
    assert levels == plain
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    loaded.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", "height": 16, "width": 16}
    first, second = (
        each("a cat", generator=torch.Generator().manual_seed(0), **options).images for each in (pipe, loaded)
    )
    assert torch.equal(first, second)


def load_levels(pipe, folder):
    pipe.save_pretrained(folder)
    denoiser = load_denoiser(folder)
    return denoiser.config["preconditioning"], denoiser.sigma_min, denoiser.sigma_max


def denoised(denoiser):
    generator = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.5, 4.0])
    with torch.no_grad():
        return denoiser(x, sigma, {"encoder_hidden_states": torch.randn(2, 7, 12, generator=generator)})


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["10KB", "1GB"])
def test_a_network_by_itself_and_weights_that_are_pickles_of_tensors(good, safe, size, tmp_path):
    stored, expected = pipeline(), denoised(load_denoiser(good))
    stored.save_pretrained(tmp_path / "whole", safe_serialization=safe, max_shard_size=size)
    assert any((tmp_path / "whole/unet").glob("*.safetensors")) is safe
    assert torch.equal(denoised(load_denoiser(tmp_path / "whole")), expected)
    assert torch.equal(denoised(load_denoiser(tmp_path / "whole/unet")), expected)
    shutil.move(tmp_path / "whole/unet", tmp_path / "alone")
    with pytest.raises(ValueError, match="nothing says what it predicts .*: put the scheduler_config.json"):
        load_denoiser(tmp_path / "alone")
    shutil.copy(tmp_path / "whole/scheduler/scheduler_config.json", tmp_path / "alone")
    assert torch.equal(denoised(load_denoiser(tmp_path / "alone")), expected)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "hacked"), "w"))

    pipeline().save_pretrained(tmp_path / "bad", safe_serialization=False)
    for part in ("unet", "text_encoder"):
        shutil.copytree(tmp_path / "bad", tmp_path / part)
        for stored in (*(tmp_path / part / part).glob("*.safetensors"), *(tmp_path / part / part).glob("*.bin")):
            stored.unlink()
        name = {"unet": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}[part]
        torch.save({"a": Bomb()}, tmp_path / part / part / name)
        with pytest.raises(ValueError, match="cannot read the diffusers folder"):
            load_denoiser(tmp_path / part)
        assert not (tmp_path / "hacked").exists()
    with pytest.raises(ValueError, match="cannot read the network of diffusers"):
        load_denoiser(tmp_path / "unet/unet")
    assert not (tmp_path / "hacked").exists()


def test_a_latent_consistency_model_takes_w_as_it_was_distilled(tmp_path):
    from tests.interop.diffusers.builders import unet

    made = pipeline(network=unet(w_channels=32))
    made.scheduler = diffusers.LCMScheduler.from_config(made.scheduler.config)
    made.save_pretrained(tmp_path / "lcm")
    assert (
        load_denoiser(tmp_path / "lcm").model.embedded
        is load_pipeline(tmp_path / "lcm", guidance_convention="w").denoiser.model.embedded
    )
    made.scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config)
    made.save_pretrained(tmp_path / "unknown")
    with pytest.raises(ValueError, match=r'write "guidance_convention": .*into its config.json'):
        load_denoiser(tmp_path / "unknown")
    config = json.loads((tmp_path / "unknown/unet/config.json").read_text())
    (tmp_path / "unknown/unet/config.json").write_text(
        json.dumps({**config, "guidance_convention": {"embeds": "scale"}})
    )
    assert load_denoiser(tmp_path / "unknown").w_range == (0.0, 14.0)
