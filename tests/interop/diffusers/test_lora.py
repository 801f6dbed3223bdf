"""Low-rank adapters: what they train, how they are kept, and how they reach stock pipelines."""

import copy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffdistill import load_denoiser, sample
from diffdistill.denoiser import Distilled
from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.interop.diffusers import as_in_stock_pipelines, from_network, from_pipeline, merge_adapters
from diffdistill.interop.diffusers.adapters import TARGETS, add_adapters
from diffdistill.interop.diffusers.export import export_student
from diffdistill.models import guidance_student, guided, save_denoiser
from diffdistill.progressive.halving import Halving, halve_steps
from diffdistill.solvers import make_schedule, make_solver
from diffdistill.training import Run, Trainer
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.weighting import make_weighting
from tests.builders import tiny_denoiser
from tests.interop.diffusers.builders import diffusers, pipeline, scheduler, text_batch, unet
from tests.training.problems import settings

SCALES = [1, 3, 8]


class Latents:
    """Latents and text for training."""

    def __init__(self, count=8):
        generator = torch.Generator().manual_seed(3)
        self.held = {
            "x": torch.randn(count, 4, 8, 8, generator=generator),
            "y.encoder_hidden_states": torch.randn(count, 7, 12, generator=generator),
        }

    def __len__(self):
        return len(self.held["x"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.held.items()}

    def tensors(self):
        return self.held


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return from_pipeline(pipeline())


def student_of(teacher, **options):
    student = guidance_student(teacher.denoiser, (0.0, 14.0))
    return add_adapters(student, **{"rank": 4, "alpha": 8.0, **options})


def moved(student):
    """The same student with adapters and an input of w that matter."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return student.eval()


def evaluated(denoiser, w):
    generator = torch.Generator().manual_seed(8)
    x, sigma = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0.3, 2.0, 11.0]).double()
    with torch.no_grad():
        return guided(denoiser, w)(x, sigma, text_batch())


def stage_one(teacher, path, updates, **changes):
    objective = GuidanceDistillation(
        teacher.denoiser,
        student_of(teacher),
        noise_levels=make_noise_levels("on_schedule", sigmas=torch.tensor([9.0, 2.0, 0.5])),
        weighting=make_weighting("snr_plus_one", sigma_data=1.0),
    )
    fast = {"decay": "constant", "learning_rate": 1e-2, "batch_size": 4, "warmup": 0, "updates": updates}
    trainer = Trainer(objective, Latents(), settings(**fast, **changes), Run(path, {}))
    return trainer, trainer.train()


def test_fresh_adapters_change_nothing_and_only_they_and_the_input_of_w_train(teacher):
    plain = guidance_student(teacher.denoiser, (0.0, 14.0))
    student = student_of(teacher)
    assert torch.equal(evaluated(student, 5.0), evaluated(plain, 5.0))
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert "model.module.time_embedding.cond_proj.weight" in trained
    assert all("lora_" in name or "cond_proj" in name for name in trained)
    # Attention, feed-forward layers, what takes the time, and convolutions have one.
    for end in TARGETS:
        assert any(f"{end}.lora_A" in name for name in trained) or end == "conv_shortcut"
    again = student_of(teacher)
    torch.testing.assert_close(again.state_dict(), student.state_dict(), rtol=0, atol=0)


def test_training_moves_adapters_alone_and_resumes_bit_for_bit_from_small_checkpoints(teacher, tmp_path):
    before = {name: p.clone() for name, p in student_of(teacher).named_parameters()}
    trainer, model = stage_one(teacher, tmp_path / "whole", 5)
    for name, parameter in model.named_parameters():
        learns = "lora_" in name or "cond_proj" in name
        assert torch.equal(parameter, before[name]) != learns, name
    stage_one(teacher, tmp_path / "parts", 3)
    _, resumed = stage_one(teacher, tmp_path / "parts", 5)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    state = torch.load(trainer.run.newest_checkpoint(), weights_only=True)
    assert not [name for name in (*state["trained"], *state["average"]) if "base_layer" in name or "conv_in" in name]
    # In memory too, what is frozen is there once.
    student, average = trainer.objective.trained.model.module, trainer.average.module.model.module
    assert student.conv_in.weight is average.conv_in.weight
    assert student.time_embedding.cond_proj.weight is not average.time_embedding.cond_proj.weight


def test_a_student_is_saved_and_merged_with_its_adapters(teacher, tmp_path):
    student = moved(student_of(teacher))
    save_denoiser(student, tmp_path / "student.safetensors")
    loaded = load_denoiser(tmp_path / "student.safetensors")
    merged = merge_adapters(copy.deepcopy(student))
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    save_denoiser(merged, tmp_path / "merged.safetensors")
    for w in (0.0, 7.0):
        expected = evaluated(student, w)
        for other in (loaded, merged, load_denoiser(tmp_path / "merged.safetensors")):
            torch.testing.assert_close(evaluated(other, w), expected, rtol=1e-4, atol=1e-4)
    assert (evaluated(student, 0.0) - evaluated(student, 7.0)).abs().max() > 1e-2


def test_stage_two_goes_on_with_the_same_adapters(teacher, tmp_path):
    student = moved(student_of(teacher))
    halving = Halving(
        sigmas=make_schedule("trailing", num_steps=4, table=student.preconditioning.table),
        sampler="deterministic",
        weighting=make_weighting("snr_plus_one", sigma_data=1.0),
        trainer={"updates": 2, "batch_size": 4, "learning_rate": 1e-3, "device": "cpu", "ema_half_life": 20.0},
    )
    before = {name: p.clone() for name, p in student.named_parameters()}
    paths = halve_steps(student, Latents(), halving, Run(tmp_path, {}))
    last = load_denoiser(paths[1])
    assert last.distilled.num_steps == 1 and last.model.lora.rank == 4
    for name, parameter in last.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name or "cond_proj" in name), name


@pytest.mark.parametrize("adapters", ["merged", "apart"])
def test_an_exported_student_runs_in_stock_diffusers(teacher, tmp_path, adapters):
    student = moved(student_of(teacher))
    sigmas = make_schedule("trailing", num_steps=4, table=student.preconditioning.table)
    student.distilled = Distilled(tuple(sigmas.tolist()))
    folder = export_student(student, teacher, tmp_path / "out", adapters=adapters)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if adapters == "apart":
        pipe.load_lora_weights(folder)
        assert "load_lora_weights" in (folder / "README.md").read_text()
        small, whole = ((folder / name).stat().st_size for name in FILES)
        assert small < whole
    noise = torch.randn(2, 4, 8, 8)
    cond = teacher.prompts(["a cat", "dog"])
    start = as_in_stock_pipelines(noise, float(sigmas[0]))
    for scale in SCALES:
        options = {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "latent"}
        stock = pipe(["a cat", "dog"], latents=noise.clone(), **options).images
        ours = sample(guided(student, scale - 1.0), start, solver=make_solver("euler"), sigmas=sigmas, cond=cond)
        torch.testing.assert_close(stock, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    torch.testing.assert_close(evaluated(load_denoiser(folder), 5.0), evaluated(student, 5.0), rtol=1e-4, atol=1e-4)


FILES = ("pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors")


def test_bad_input(teacher, tmp_path, monkeypatch):
    student = student_of(teacher)
    with pytest.raises(ValueError, match="rank 4 already"):
        add_adapters(student, rank=5)
    for options, match in (({"rank": 0}, "rank.*0"), ({"alpha": -1.0}, "-1.0"), ({"targets": []}, "empty")):
        with pytest.raises(ValueError, match=match):
            add_adapters(guidance_student(teacher.denoiser, (0.0, 4.0)), **options)
    with pytest.raises(TypeError, match="rnk"):
        add_adapters(guidance_student(teacher.denoiser, (0.0, 4.0)), rnk=3)
    with pytest.raises(ValueError, match=r"lora\.targets=nowhere"):
        add_adapters(guidance_student(teacher.denoiser, (0.0, 4.0)), targets=["nowhere"])
    with pytest.raises(ValueError, match="networks of diffusers"):
        add_adapters(tiny_denoiser())
    with pytest.raises(ValueError, match="no adapters"):
        export_student(guidance_student(teacher.denoiser, (0.0, 4.0)), teacher, tmp_path / "out", adapters="apart")
    with pytest.raises(ValueError, match="fuse_lora"):
        from_network(student.model.module, scheduler())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"diffdistill\[diffusers\]"):
        add_adapters(from_network(unet(), scheduler()))


def test_both_stages_take_adapters_from_their_config(teacher, tmp_path):
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
    import distill_guidance
    import distill_steps
    from common.configs import compose
    from diffdistill.data.latents import write_index, write_shard

    (tmp_path / "latents").mkdir()
    write_index(tmp_path / "latents", [write_shard(tmp_path / "latents", 0, Latents().held, {})], (4, 8, 8), {})
    save_denoiser(teacher.denoiser, tmp_path / "teacher.safetensors")
    fast = ["trainer.updates=2", "trainer.batch_size=4", "trainer.accumulation=1", "trainer.device=cpu"]
    shared = ["lora={rank:2}", f"data.path={tmp_path / 'latents'}", "trainer.precision=fp32", *fast]
    stage1 = ["experiment=meng2023/laion512_text_stage1", f"teacher={tmp_path / 'teacher.safetensors'}"]
    one = distill_guidance.distill(compose("distill_guidance", [*stage1, f"out={tmp_path / 'one'}", *shared]))
    stage2 = ["experiment=meng2023/laion512_text_stage2", f"teacher={one}", "start_steps=2", "stages=null"]
    paths = distill_steps.distill(compose("distill_steps", [*stage2, f"out={tmp_path / 'two'}", *shared]))
    student = load_denoiser(paths[1])
    assert student.model.lora.rank == 2
    frozen = [p for name, p in student.named_parameters() if name.endswith("conv_in.weight")]
    assert torch.equal(frozen[0], teacher.denoiser.model.module.conv_in.weight)
