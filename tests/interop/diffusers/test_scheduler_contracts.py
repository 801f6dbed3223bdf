"""What stock pipelines and people's own loops read of a scheduler, one contract a test."""

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill import sample
from diffdistill.interop.diffusers import SolverScheduler, as_in_stock_pipelines, scheduler_for
from diffdistill.interop.diffusers.scheduler_sources import CONVENTIONS
from diffdistill.solvers import SOLVERS, AMEDPlugin, AMEDPredictor, make_schedule, make_solver
from tests.interop.diffusers.builders import SD_BETAS, diffusers, pipeline
from tests.interop.diffusers.stock import close

SHAPE = (2, 3, 4, 5)
MIX = torch.randn(3, 3, generator=torch.Generator().manual_seed(4)) / 2
V_ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


def made(kind, **options):
    return getattr(diffusers, kind)(**options)


def ours(own, **options):
    return scheduler_for(SimpleNamespace(scheduler=own), **options)


def network(x, t):
    return torch.tanh(torch.einsum("ij,bjhw->bihw", MIX.to(x.dtype), x) + 1e-3 * float(t)).to(x.dtype)


def noise(seed=0, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loop(scheduler, latents, *, first=0, net=network, **options):
    """People's own loop, from the timestep with the number `first`."""
    for t in scheduler.timesteps[first:]:
        given = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(net(given, t), t, latents, **options).prev_sample
    return latents


def run(scheduler, latents, num_steps=10, **options):
    scheduler.set_timesteps(num_steps)
    return loop(scheduler, (latents * getattr(scheduler, "init_noise_sigma", 1.0)).to(latents.dtype), **options)


def first_order(own):
    """The stock scheduler that takes Euler's steps on the levels of another."""
    settings = {setting: value for setting, value in own.config.items() if not setting.startswith("_")}
    if ours(own)._source.flow:
        if type(own).__name__.startswith("FlowMatch"):
            return diffusers.FlowMatchEulerDiscreteScheduler.from_config(settings)
        return diffusers.DPMSolverMultistepScheduler.from_config(
            {**settings, "solver_order": 1, "algorithm_type": "dpmsolver++"}
        )
    if type(own).__name__.startswith("EDM"):
        return diffusers.EDMEulerScheduler.from_config(settings)
    if CONVENTIONS[type(own).__name__] == "unscaled":
        return diffusers.EulerDiscreteScheduler.from_config(settings)
    if type(own).__name__.startswith("CogVideoX"):
        return diffusers.CogVideoXDDIMScheduler.from_config(settings)
    if hasattr(own, "lambda_t"):
        final = settings.get("final_sigmas_type", "sigma_min")
        return diffusers.DPMSolverMultistepScheduler.from_config(
            {**settings, "solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": final}
        )
    return diffusers.DDIMScheduler.from_config({"clip_sample": False, **settings})


FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SOURCES = {
    **{name: (name, {}) for name in CONVENTIONS if not name.startswith(("LCM", "TCD", "DPMSolverSDE"))},
    "cosine betas": ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}),
    "2000 steps": ("DDIMScheduler", {"num_train_timesteps": 2000, "clip_sample": False}),
    "zero SNR": ("DDIMScheduler", {**SD_BETAS, **V_ZERO, "clip_sample": False}),
    "zero SNR, x unscaled": ("EulerDiscreteScheduler", {**SD_BETAS, **V_ZERO}),
    "clipped": ("DDIMScheduler", {"clip_sample_range": 0.4}),
    "thresholded": (
        "DDIMScheduler",
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.3},
    ),
    "sample": ("DDIMScheduler", {"prediction_type": "sample", "clip_sample": False}),
    "karras": ("EulerDiscreteScheduler", {**SD_BETAS, "use_karras_sigmas": True}),
    "beta": ("EulerDiscreteScheduler", {**SD_BETAS, "use_beta_sigmas": True}),
    "down to sigma_min": ("EulerDiscreteScheduler", {**SD_BETAS, "final_sigmas_type": "sigma_min"}),
    "ends where it is": ("DDIMScheduler", {**SD_BETAS, "set_alpha_to_one": False, "clip_sample": False}),
    "continuous": (
        "EulerDiscreteScheduler",
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ),
    "EDM of v": ("EDMEulerScheduler", {"prediction_type": "v_prediction"}),
    "shifted by 12": ("FlowMatchEulerDiscreteScheduler", {"shift": 12.0}),
    "shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "inverted": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    "DPM-Solver of flow": ("DPMSolverMultistepScheduler", {**FLOW_SIGMAS, "flow_shift": 3.0}),
    "DEIS of flow": ("DEISMultistepScheduler", {**FLOW_SIGMAS, "flow_shift": 3.0}),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_ddim_takes_the_steps_of_the_stock_scheduler(name, num_steps):
    own = made(SOURCES[name][0], **SOURCES[name][1])
    scheduler = ours(own)
    end, stock = run(scheduler, noise(), num_steps), run(first_order(own), noise(), num_steps)
    # Where latents are x itself, the stock scheduler loses digits at large levels.
    lost = 0.0 if scheduler._source.scaled else 2e-7 * float(scheduler.noise_levels[0])
    torch.testing.assert_close(end, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()) + lost)


def test_levels_of_flow_in_unipc():
    own = made("UniPCMultistepScheduler", **FLOW_SIGMAS, flow_shift=3.0)
    scheduler = ours(own)
    for each in (own, scheduler):
        each.set_timesteps(5)
    torch.testing.assert_close(scheduler.sigmas, own.sigmas, rtol=1e-6, atol=0)
    assert torch.equal(scheduler.timesteps, own.timesteps)


@pytest.mark.parametrize("shift", [1.0, 12.0])
@pytest.mark.parametrize("name", ["euler", "dpmpp", "heun", "dpm3", "unipc", "deis", "ipndm"])
def test_many_steps_of_flow_do_not_repeat_a_level(name, shift):
    own = made("FlowMatchEulerDiscreteScheduler", shift=shift)
    end = run(ours(own, solver=name), noise(), 100)
    close_to = run(first_order(own), noise(), 800)
    assert float((end - close_to).abs().max()) < 0.1


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
@pytest.mark.parametrize("name", ["ddim", "heun", "dpm3", "dpmpp"])
def test_a_loop_may_begin_at_any_step(kind, name):
    own = made(kind, **({} if kind.startswith("Flow") else SD_BETAS))
    scheduler, stages = ours(own, solver=name), make_solver(name).stages
    scheduler.set_timesteps(10)
    levels = scheduler.noise_levels
    begin = 5 * stages
    x0 = noise(1)
    start = (
        scheduler.scale_noise(x0, scheduler.timesteps[begin : begin + 1], noise())
        if kind.startswith("Flow")
        else (scheduler.add_noise(x0, noise(), scheduler.timesteps[begin : begin + 1]))
    )
    end = loop(scheduler, start, first=begin)
    if name == "ddim":
        stock = first_order(own)
        stock.set_timesteps(10)
        close(end, loop(stock, start, first=5))
    other = ours(own, solver=name, sigmas=levels[5:])
    other.set_timesteps(5)
    assert scheduler.step_index == len(scheduler.timesteps)
    torch.testing.assert_close(end, loop(other, start), rtol=1e-4, atol=1e-4)


def test_the_place_in_the_schedule():
    scheduler = ours(made("EulerDiscreteScheduler", **SD_BETAS), solver="heun")
    scheduler.set_timesteps(3)
    assert scheduler.step_index is None and scheduler.begin_index is None and scheduler.order == 2
    assert scheduler.timesteps.tolist() == [999.0, 499.5, 499.5, 0.0, 0.0]
    assert len(scheduler.sigmas) == 6 and scheduler.num_inference_steps == 3
    assert scheduler.index_for_timestep(499.5) == 2 and scheduler.index_for_timestep(scheduler.timesteps[1]) == 1
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2
    scheduler.scale_model_input(noise(), scheduler.timesteps[2])
    assert scheduler.step_index == 2
    with pytest.raises(ValueError, match=r"timestep 7 is none of this schedule: 999, 499.5"):
        scheduler.index_for_timestep(7)


def test_timesteps_out_of_turn():
    for name, error, message in (("dpmpp", ValueError, "out of turn"), ("ddim", None, "")):
        scheduler = ours(made("DDIMScheduler", clip_sample=False), solver=name)
        scheduler.set_timesteps(5)
        latents = scheduler.step(noise(), 800, noise()).prev_sample
        if error is None:  # of which every step stands alone, as in stock DDIM
            close(scheduler.step(noise(), torch.tensor(800), noise()).prev_sample, latents)
        else:
            with pytest.raises(error, match=message):
                scheduler.step(noise(), 800, latents)
    scheduler = ours(made("DDIMScheduler", clip_sample=False), solver="dpmpp")
    end = run(scheduler, noise(), 5)
    with pytest.raises(IndexError, match="at its end"):
        scheduler.step(noise(), scheduler.timesteps[0], end)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="timestep 3 is none"):
        scheduler.step(noise(), 3, noise())


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpm3", "dpmpp_3s"])
def test_timesteps_are_known_before_the_run(name):
    scheduler = ours(made("DDIMScheduler", **SD_BETAS, clip_sample=False), solver=name)
    scheduler.set_timesteps(3)
    before, asked = scheduler.timesteps.clone(), []
    loop(scheduler, noise(), net=lambda x, t: asked.append(float(t)) or network(x, t))
    assert torch.equal(before, scheduler.timesteps) and asked == before.tolist()


def test_config_of_the_source():
    own = made("DDPMScheduler", **SD_BETAS, variance_type="learned_range")
    scheduler = ours(own, solver="heun")
    assert {setting: scheduler.config[setting] for setting in own.config} == dict(own.config)
    assert scheduler.config.num_train_timesteps == 1000 and scheduler.config.variance_type == "learned_range"
    back = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
    close(back.sigmas, diffusers.EulerDiscreteScheduler.from_config(own.config).sigmas)
    for config in (own.config, {**own.config, "_class_name": "DDPMScheduler"}, back.config):
        again = SolverScheduler.from_config(config, solver={"name": "heun"})
        again.set_timesteps(4)
        assert float(again.noise_levels[0]) < 15 and type(again.solver).__name__ == "Heun"
    changed = SolverScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    assert changed.config.timestep_spacing == "trailing" and type(changed.solver).__name__ == "Heun"
    with pytest.raises(ValueError, match="no known scheduler"):
        SolverScheduler.from_config({"beta_start": 0.1})
    json.loads(scheduler.to_json_string())


def test_settings_that_a_pipeline_changes():
    scheduler = ours(made("DDIMScheduler", **SD_BETAS, clip_sample=True))
    scheduler.register_to_config(clip_sample=False)
    close(run(scheduler, noise()), run(made("DDIMScheduler", **SD_BETAS, clip_sample=False), noise()))


def test_eta_is_ddims():
    own = made("DDIMScheduler", **SD_BETAS, clip_sample=False)
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    close(
        run(ours(own), noise(), 5, eta=0.6, generator=draw()),
        run(own, noise(), 5, eta=0.6, generator=draw()),
    )
    clipped = made("DDIMScheduler", **SD_BETAS)
    options = {"use_clipped_model_output": True}
    close(run(ours(clipped), noise(), 5, **options), run(clipped, noise(), 5, **options))
    with pytest.raises(ValueError, match=r"eta=0.6: Heun takes none"):
        run(ours(own, solver="heun"), noise(), 5, eta=0.6)
    with pytest.raises(ValueError, match="variance_noise: Euler is deterministic"):
        run(ours(own), noise(), 5, variance_noise=noise())


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_sigmas_and_previews_mean_the_same(kind):
    own = made(kind)
    scheduler = ours(own, solver="dpmpp")
    for each in (scheduler, own):
        each.set_timesteps(5)
    if hasattr(own, "sigmas"):
        torch.testing.assert_close(scheduler.sigmas, own.sigmas.cpu().float(), rtol=1e-6, atol=0)
    assert torch.equal(scheduler.timesteps, own.timesteps) and scheduler.timesteps.dtype == own.timesteps.dtype
    t, latents = own.timesteps[0], noise() * getattr(own, "init_noise_sigma", 1.0)
    given = own.scale_model_input(latents, t) if hasattr(own, "scale_model_input") else latents
    scheduler.scale_model_input(latents, t)
    result = scheduler.step(network(given, t), t, latents)
    stock = own.step(network(given, t), t, latents)
    if hasattr(stock, "pred_original_sample"):
        close(result.pred_original_sample, stock.pred_original_sample)
    assert torch.equal(result[0], result.prev_sample) and len(scheduler) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", ["zero SNR", "zero SNR, x unscaled", "shifted", "karras", "EDM of v"])
def test_half_precision_is_as_exact_as_the_stock_scheduler(dtype, source):
    own = made(SOURCES[source][0], **SOURCES[source][1])

    def error(scheduler):
        exact = run(scheduler, noise(dtype=dtype).float(), generator=torch.Generator().manual_seed(1))
        result = run(scheduler, noise(dtype=dtype), generator=torch.Generator().manual_seed(1))
        assert result.dtype == dtype
        return float((result.float() - exact).norm() / exact.norm())

    euler = own
    if source == "zero SNR":
        euler = diffusers.EulerDiscreteScheduler.from_config(own.config)
    allowed = 2 * error(euler)
    for name in SOLVERS:
        if name not in ("amed", "edm_sde", "euler", "flow_map"):
            assert error(ours(own, solver=name)) < allowed, name


def test_half_precision_holds_noise_alone():
    levels = make_schedule("flow", num_steps=5)
    for name in ("euler", "dpmpp", "unipc"):
        solver = make_solver(name)
        denoiser = lambda x, sigma, cond: (0.5 * x / (1 + sigma[0])).tanh()  # noqa: E731
        half = sample(denoiser, noise().half(), solver=solver, sigmas=levels)
        full = sample(denoiser, noise().half().float(), solver=solver, sigmas=levels)
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), full, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("amed", "edm_sde", "flow_map")])
def test_copies_amid_a_run(name):
    pickle.loads(pickle.dumps(make_solver(name)))
    scheduler = ours(made("DDPMScheduler"), solver=name)
    scheduler.set_timesteps(4)
    latents = noise()
    for t in scheduler.timesteps[:3]:
        latents = scheduler.step(
            network(latents, t), t, latents, generator=torch.Generator().manual_seed(1)
        ).prev_sample
    ends = []
    for each in (scheduler, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        x = latents
        for t in scheduler.timesteps[3:]:
            x = each.step(network(x, t), t, x, generator=torch.Generator().manual_seed(2)).prev_sample
        ends.append(x)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-5)


def test_paths_of_noise_are_the_generators():
    own = made("EulerDiscreteScheduler", **SD_BETAS, timestep_spacing="trailing")
    ends = []
    for num_steps in (20, 40, 160):
        scheduler = ours(own, solver="dpmpp_sde", schedule="karras")
        ends.append(run(scheduler, noise(), num_steps, net=lambda x, t: x, generator=torch.Generator().manual_seed(5)))
    near, nearer = (float((end - ends[2]).abs().mean()) for end in ends[:2])
    assert nearer < 0.8 * near
    again = run(scheduler, noise(), 160, net=lambda x, t: x, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again, ends[2])


def test_networks_are_left_without_hooks_and_copies_read_their_own():
    torch.manual_seed(1)
    pipe = pipeline()
    block = pipe.unet.mid_block
    predictor = AMEDPredictor()
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    plugin = AMEDPlugin(make_solver("dpm2"), predictor)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    z = torch.randn(1, 4, 8, 8)
    for _ in range(3):
        pipe.scheduler = scheduler_for(pipe, solver=plugin)
    assert not block._forward_hooks
    expected = pipe("cat", latents=z.clone(), **options).images
    assert not block._forward_hooks
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    close(pipe("cat", latents=z.clone(), **options).images, expected)
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.1)
    close(other("cat", latents=z.clone(), **options).images, expected)


def test_encoding_and_back():
    own = made("DDIMScheduler", **SD_BETAS, clip_sample=False, timestep_spacing="trailing")
    for name in ("ddim", "heun", "dpmpp"):
        up, down = ours(own, solver=name, inverse=True), ours(own, solver=name)
        x = noise() * 0.3
        small = lambda x, t: 0.1 * network(x, t)  # noqa: E731
        back = run(down, run(up, x, 100, net=small), 100, net=small)
        assert up.timesteps[0] < up.timesteps[-1]
        assert float((back - x).abs().max()) < (0.1 if name == "ddim" else 0.03)
    with pytest.raises(ValueError, match="EulerAncestral is stochastic: it does not encode"):
        ours(own, solver="euler_ancestral", inverse=True)


def test_what_is_refused_by_name():
    for kind in ("UnCLIPScheduler", "CMStochasticIterativeScheduler", "IPNDMScheduler", "RePaintScheduler"):
        with pytest.raises(ValueError, match=f"unknown scheduler of diffusers '{kind}': choose one of Cog"):
            ours(made(kind))
    with pytest.raises(ValueError, match="stochastic_sampling"):
        ours(made("FlowMatchEulerDiscreteScheduler", stochastic_sampling=True))
    with pytest.raises(ValueError, match="use_flow_sigmas=True"):
        ours(made("DPMSolverMultistepScheduler", use_flow_sigmas=True))
    scheduler = ours(made("DDIMScheduler"))
    with pytest.raises(TypeError, match="DDIMScheduler takes no mu in set_timesteps"):
        scheduler.set_timesteps(4, mu=1.0)
    with pytest.raises(ValueError, match=r"step 1 of 3 goes from [\d.]+ to"):
        scheduler.set_timesteps(timesteps=[900, 500, 500])
    with pytest.raises(ValueError, match="timestep 1000 is none of DDIMScheduler"):
        scheduler.add_noise(noise(), noise(), torch.tensor([1000]))
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"answers \[2, 3, 4, 1\] for latents"):
        scheduler.step(noise()[..., :1], scheduler.timesteps[0], noise())


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_noise_is_added_as_by_the_stock_scheduler(kind):
    own = made(kind)
    scheduler = ours(own, solver="heun")
    for each in (own, scheduler):
        each.set_timesteps(5)
    for t in own.timesteps[[1, 3]]:
        times = t.expand(len(noise()))
        if hasattr(own, "scale_noise"):
            close(scheduler.scale_noise(noise(1), times, noise()), own.scale_noise(noise(1), times, noise()))
        else:
            close(scheduler.add_noise(noise(1), noise(), times), own.add_noise(noise(1), noise(), times))


def test_the_start_of_the_package_is_that_of_the_pipeline():
    scheduler = ours(made("DDIMScheduler", **SD_BETAS, clip_sample=False, timestep_spacing="trailing"))
    end = run(scheduler, noise(), 5)
    levels, time = scheduler.noise_levels, scheduler._source.time

    def denoiser(x, sigma, cond):
        level = float(sigma[0])
        return x - level * network(x / (1 + level**2) ** 0.5, time(level))

    start = as_in_stock_pipelines(noise(), float(levels[0]))
    close(end, sample(denoiser, start, solver=make_solver("ddim"), sigmas=levels))


def test_views_of_timesteps_are_not_read(monkeypatch):
    scheduler = ours(made("DDIMScheduler", clip_sample=False), solver="dpmpp")
    scheduler.set_timesteps(5)
    monkeypatch.setattr("diffdistill.interop.diffusers.scheduler_timetable.number", lambda timestep: 1 / 0)
    loop(scheduler, noise(), net=lambda x, t: 0.1 * x)
