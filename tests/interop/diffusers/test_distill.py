"""Both stages on a tiny latent text model, from images and captions to a folder that stock diffusers runs."""

import io
import tarfile

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill import load_denoiser, sample
from diffdistill.data import load_data
from diffdistill.interop.diffusers import as_in_stock_pipelines, from_network, load_pipeline
from diffdistill.interop.diffusers.caching import cache_latents, captioned
from diffdistill.models import guided
from diffdistill.solvers import make_schedule, make_solver
from tests.interop.diffusers import builders
from tests.interop.diffusers.builders import diffusers, pipeline, unet
from tests.scripts.calling import call

CAPTIONS = ["a cat", "a car"]


def run(script, *overrides):
    done = call(script, *overrides)
    assert done.returncode == 0, done.stderr
    return done.stdout


def png(seed):
    from PIL import Image

    torch.manual_seed(seed)
    content = io.BytesIO()
    Image.fromarray((torch.rand(20, 24, 3) * 255).byte().numpy()).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Everything from the command line: a teacher's folder, latents, stage 1, stage 2 to two steps, and the export."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    network = unet()
    with torch.no_grad():  # so that the text matters, and guidance by it is a function that is quickly learned
        for name, parameter in network.named_parameters():
            if "attn2" in name:
                parameter.mul_(0.0 if "to_q" in name else 4.0)
    pipeline(network=network).save_pretrained(home / "teacher")
    (home / "images").mkdir()
    for i, caption in enumerate(CAPTIONS * 8):
        (home / f"images/{i:02d}.png").write_bytes(png(i))
        (home / f"images/{i:02d}.txt").write_text(caption)
    shared = [f"teacher={home / 'teacher'}", f"data.path={home / 'latents'}", "trainer.batch_size=16"]
    fast = ["trainer.accumulation=1", "trainer.warmup=5", "trainer.precision=fp32", "trainer.device=cpu"]
    run(
        "cache_latents",
        f"model={home / 'teacher'}",
        f"images={home / 'images'}",
        f"out={home / 'latents'}",
        "shard_size=5",
        "device=cpu",
    )
    run(
        "distill_guidance",
        "experiment=meng2023/laion512_text_stage1",
        f"out={home / 'one'}",
        *shared,
        *fast,
        "w=[2.0,4.0]",
        "trainer.updates=1000",
        "trainer.learning_rate=2e-3",
        "trainer.decay=linear",
        "trainer.weight_decay=0",
        "trainer.ema_half_life=null",
    )
    run(
        "distill_steps",
        "experiment=meng2023/laion512_text_stage2",
        f"out={home / 'two'}",
        *[option for option in shared if not option.startswith("teacher")],
        f"teacher={home / 'one'}",
        *fast,
        "start_steps=4",
        "stages=null",
        "trainer.updates=5",
    )
    run("export", f"model={home / 'two/stages/002'}", f"teacher={home / 'teacher'}", f"out={home / 'exported'}")
    return home


def test_the_cache_holds_latents_and_embeddings(trained):
    data = load_data("latents", path=trained / "latents")
    assert len(data) == 16 and data.shape == (4, 8, 8)
    assert len(list((trained / "latents").glob("*.safetensors"))) == 4
    held = data.tensors()
    assert held["y.encoder_hidden_states"].shape == (16, 7, 12)
    for i in (0, 4, 5, 15):
        for name, value in data[i].items():
            assert torch.equal(value, held[name][i])
    parts = load_pipeline(trained / "teacher")
    expected = parts.prompts(CAPTIONS)["encoder_hidden_states"]
    torch.testing.assert_close(held["y.encoder_hidden_states"][:2], expected, rtol=1e-3, atol=2e-3)


def test_the_distance_to_the_guided_teacher_falls_by_five(trained):
    teacher, student = load_denoiser(trained / "teacher"), load_denoiser(trained / "one")
    parts = load_pipeline(trained / "teacher")
    cond = parts.prompts(CAPTIONS * 16)
    torch.manual_seed(7)
    sigma = teacher.preconditioning.table[torch.randint(1000, (32,))]
    data = load_data("latents", path=trained / "latents").tensors()["x"]
    x = data.repeat(2, 1, 1, 1) + sigma.float().view(-1, 1, 1, 1) * torch.randn(32, 4, 8, 8)
    w = 2 + 2 * torch.rand(32)
    with torch.no_grad():
        target = guided(teacher, w)(x, sigma, cond)
        weight = (1 + sigma**-2).float().view(-1, 1, 1, 1)
        before = (weight * (teacher(x, sigma, cond) - target) ** 2).mean()
        after = (weight * (guided(student, w)(x, sigma, cond) - target) ** 2).mean()
    print(f"distance {before:.4g} -> {after:.4g}, a factor of {before / after:.1f}")
    assert after < before / 5


def test_the_student_of_stage_two_runs_in_stock_diffusers(trained):
    student = load_denoiser(trained / "two/stages/002")
    assert student.distilled.num_steps == 2
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(trained / "exported", safety_checker=None)
    noise = torch.randn(2, 4, 8, 8)
    stock = pipe(
        CAPTIONS[:2], latents=noise.clone(), num_inference_steps=2, guidance_scale=3.0, output_type="latent"
    ).images
    parts = load_pipeline(trained / "teacher")
    sigmas = torch.tensor(student.distilled.sigmas, dtype=torch.float64)
    table = student.preconditioning.table
    assert torch.equal(sigmas, make_schedule("trailing", num_steps=2, table=table))
    start = as_in_stock_pipelines(noise, float(sigmas[0]))
    ours = sample(
        guided(student, 2.0), start, solver=make_solver("euler"), sigmas=sigmas, cond=parts.prompts(CAPTIONS[:2])
    )
    torch.testing.assert_close(stock, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


def test_webdataset_shards_and_bad_sources(tmp_path):
    with tarfile.open(tmp_path / "00.tar", "w") as archive:
        for name, content in (
            ("a.png", png(0)),
            ("a.txt", b"one"),
            ("b.txt", b"two"),
            ("b.png", png(1)),
            ("b.json", b"{}"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert [(name, caption) for name, _, caption in captioned(tmp_path)] == [("a", "one"), ("b", "two")]
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        list(captioned(tmp_path / "folder"))
    (tmp_path / "folder/c.png").write_bytes(png(2))
    with pytest.raises(ValueError, match=r"c\.txt"):
        list(captioned(tmp_path / "folder"))
    with pytest.raises(FileNotFoundError, match="diffdistill cache-latents"):
        load_data("latents", path=tmp_path / "folder")


@pytest.fixture
def captions(tmp_path):
    """Four images and captions, with names that are not ASCII."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        (folder / f"猫 {i}.png").write_bytes(png(i))
        (folder / f"猫 {i}.txt").write_text("a cät", encoding="utf-8")
    return folder


def test_latents_of_another_origin_are_never_kept(trained, captions, tmp_path):
    """Also where the run before was killed, so that there is no index yet."""
    parts, out = load_pipeline(trained / "teacher"), tmp_path / "out"
    cache_latents(parts, captions, out, shard_size=2)
    whole = load_data("latents", path=out).tensors()
    (out / "index.json").unlink()
    for changes in ({"dtype": "float32"}, {"seed": 1}):
        with pytest.raises(ValueError, match="other settings"):
            cache_latents(parts, captions, out, shard_size=2, **changes)
    another = load_pipeline(trained / "teacher")
    with torch.no_grad():
        next(another.pipeline.vae.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="other settings"):
        cache_latents(another, captions, out, shard_size=2)
    kept = (out / "000000.safetensors").stat().st_mtime_ns
    (out / "000001.safetensors").write_bytes(b"damaged")
    cache_latents(parts, captions, out, shard_size=2)
    assert (out / "000000.safetensors").stat().st_mtime_ns == kept
    again = load_data("latents", path=out).tensors()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_damaged_sources_are_named(trained, captions, tmp_path):
    parts = load_pipeline(trained / "teacher")
    cases = {
        "z.png': it is no picture": ("z.png", b"no image"),
        "z.png': image file is truncated": ("z.png", png(5)[:100]),
        "z.txt is not UTF-8": ("z.txt", b"\xff\xfe"),
        "0.tar is no tar archive": ("0.tar", b"x" * 2000),
    }
    for match, (name, content) in cases.items():
        (captions / "z.png").write_bytes(png(5))
        (captions / "z.txt").write_text("z")
        (captions / name).write_bytes(content)
        with pytest.raises(ValueError, match=match):
            cache_latents(parts, captions, tmp_path / "out")
    tarfile.open(captions / "0.tar", "w").close()
    with pytest.raises(FileNotFoundError, match="no images"):
        cache_latents(parts, captions, tmp_path / "out")


def test_conditions_of_both_kinds_reach_the_objective():
    from diffdistill.training.conditions import condition_of

    denoiser = from_network(unet(), builders.scheduler())
    batch = {"x": torch.zeros(2, 4, 8, 8), "y.encoder_hidden_states": torch.ones(2, 7, 12), "index": torch.arange(2)}
    assert list(condition_of(batch, denoiser)) == ["encoder_hidden_states"]
    with pytest.raises(ValueError, match="no condition"):
        condition_of({"x": batch["x"]}, denoiser)
