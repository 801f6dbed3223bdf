"""Compiled and recorded denoisers answer as the denoiser does; what a GPU alone can show is skipped without one."""

import inspect
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffdistill import sample
from diffdistill.denoiser import Denoiser, per_sample
from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.learned import EndpointDistillation, StepwiseDistillation
from diffdistill.models import ClassifierFreeGuidance, build_autoencoder, build_denoiser, guidance_student, guided
from diffdistill.models.acceleration import Compiled, CudaGraphs, accelerated
from diffdistill.progressive.stage2 import STEPS, StepDistillation
from diffdistill.solvers import (
    SOLVERS,
    AMEDPlugin,
    AMEDPredictor,
    Interval,
    LearnedTable,
    ProbabilityFlow,
    intervals,
    make_schedule,
    make_solver,
)
from diffdistill.solvers.amed import LearnedSteps
from diffdistill.solvers.features import feature_tap
from diffdistill.solvers.flow import dynamic_thresholding
from diffdistill.solvers.integration import integrate
from diffdistill.training.denoising import Denoising
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.reconstruction import Reconstruction
from diffdistill.training.weighting import make_weighting
from tests.builders import tiny_denoiser

X, SIGMA, LABELS = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 2.0, 30.0]), torch.tensor([0, 3, -1])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Recorder:
    """Like a CUDA graph on the CPU: a replay reads and fills the tensors of the recording, and runs no hook."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, evaluate):
        self.recordings += 1
        outputs = evaluate()

        def replay():
            self.replays += 1
            for static, new in zip(outputs, evaluate(), strict=True):
                if static is not None:
                    static.copy_(new)

        return outputs, replay


def eager(denoiser):
    return Compiled(denoiser, backend="eager")


def recorded(denoiser):
    return CudaGraphs(denoiser, record=Recorder())


class Small(Denoiser):
    """A denoiser of two layers, since torch.compile takes seconds for a U-Net."""

    data_shape, num_classes, flow_map = (2, 8, 8), 4, True

    def __init__(self):
        super().__init__()
        self.down, self.up = torch.nn.Conv2d(2, 5, 2, stride=2), torch.nn.ConvTranspose2d(5, 2, 2, stride=2)

    @property
    def bottleneck(self):
        return self.down

    def forward(self, x, sigma, cond=None, s=None):
        label = torch.zeros(len(x)) if cond is None else cond.to(x.dtype)
        return self.up(self.down(x)).cos() * per_sample(1 / (1 + sigma) + 0.1 * label, x)


WAYS = {
    "recorded": (tiny_denoiser, recorded),
    "compiled": (Small, eager),
    "both": (Small, lambda denoiser: recorded(eager(denoiser))),
    "compiled U-Net": pytest.param((tiny_denoiser, eager), marks=pytest.mark.slow),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def made(request):
    """A denoiser, and what makes it faster."""
    torch._dynamo.reset()
    build, way = request.param
    return build(), way


@torch.no_grad()
@pytest.mark.parametrize("guide", [None, 1.5, torch.tensor([0.0, 1.0, 2.0])])
def test_answers_are_those_of_the_denoiser(made, guide):
    denoiser, way = made
    denoiser = denoiser if guide is None else guided(denoiser, guide)
    fast = way(denoiser)
    for x, sigma, cond in ((X, SIGMA, LABELS), (2 * X, SIGMA / 2, LABELS.flip(0)), (X, SIGMA, None)):
        torch.testing.assert_close(fast(x, sigma, cond), denoiser(x, sigma, cond), rtol=0, atol=0)
    for name in ("cost", "data_shape", "num_classes", "sigma_max", "conditional", "w_range"):
        assert getattr(fast, name) == getattr(denoiser, name)


@torch.no_grad()
def test_a_student_takes_its_w():
    student = guided(guidance_student(tiny_denoiser(), (0.0, 4.0)), 3.0)
    torch.testing.assert_close(recorded(student)(X, SIGMA, LABELS), student(X, SIGMA, LABELS), rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["dpmpp", "ipndm", "heun"])
def test_multistep_solvers_keep_past_evaluations(made, solver):
    # A replay fills the same memory again: without copies the history would change behind the solver's back.
    denoiser, way = made
    options = {"solver": make_solver(solver), "cond": LABELS}
    options["sigmas"] = make_schedule("polynomial", num_steps=5, sigma_min=0.002, sigma_max=80.0)
    expected = sample(denoiser, X, **options)
    torch.testing.assert_close(sample(way(denoiser), X, **options), expected, rtol=0, atol=0)


@pytest.mark.parametrize("inner", ["euler", "ipndm"])
def test_learned_solvers_read_the_bottleneck(made, inner):
    denoiser, way = made
    denoiser = ClassifierFreeGuidance(denoiser, 1.0)
    solver = AMEDPlugin(make_solver(inner), AMEDPredictor(0.5, 0.5, initial="published"))
    for parameter in solver.predictor.parameters():
        parameter.data.normal_(std=0.5)
    sigmas = make_schedule("polynomial", num_steps=3, sigma_min=0.002, sigma_max=80.0)
    options = {"solver": solver, "sigmas": sigmas, "cond": LABELS}
    expected = sample(denoiser, X, **options)
    fast = way(denoiser)
    for _ in range(2):  # a second run sets new hooks
        torch.testing.assert_close(sample(fast, X, **options), expected, rtol=0, atol=0)


def test_training_of_a_learned_solver_compiles():
    torch._dynamo.reset()
    torch.manual_seed(1)
    solver = AMEDPlugin(make_solver("ipndm"), AMEDPredictor(0.5, 0.5, initial="published"))
    levels, fine = (make_schedule("polynomial", num_steps=n, sigma_min=0.1, sigma_max=80.0) for n in (2, 4))
    options = {"sigmas": levels, "teacher": make_solver("ipndm"), "teacher_sigmas": fine}
    denoiser = Small()
    plain, compiled = (StepwiseDistillation(denoiser, solver, **options) for _ in range(2))
    compiled.compile_networks("eager")
    for seed in range(2):  # a second batch sets new hooks
        batch = {"noise": torch.randn(3, 2, 8, 8), "y": LABELS.clamp(min=0)}
        values = [
            [loss.value for loss in objective.losses(batch, torch.Generator().manual_seed(seed))]
            for objective in (plain, compiled)
        ]
        torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)
        gradients = [torch.autograd.grad(value[-1], list(solver.predictor.parameters())) for value in values]
        torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_all_of_many_weights_are_compiled():
    torch._dynamo.reset()
    counter, denoiser = CompileCounter(), Small()
    for w in range(1, 11):
        Compiled(guided(denoiser, w / 10), backend=counter)(X, SIGMA, LABELS)
    assert counter.frame_count == 10


@torch.no_grad()
def test_one_recording_for_each_shape_condition_and_precision():
    recorder = Recorder()
    denoiser = tiny_denoiser()
    fast = CudaGraphs(denoiser, record=recorder)
    for _ in range(3):
        fast(X, SIGMA, LABELS)
    assert (recorder.recordings, recorder.replays) == (1, 3)
    fast(X[:2], SIGMA[:2], LABELS[:2])
    fast(X, SIGMA)
    with torch.autocast("cpu", torch.bfloat16):
        found = fast(X, SIGMA, LABELS)
        assert torch.equal(found, denoiser(X, SIGMA, LABELS))
    assert recorder.recordings == 4
    for batch in range(1, 12):
        fast(X[:1].expand(batch, -1, -1, -1), SIGMA[:1].expand(batch))
    assert len(fast._graphs) == 8


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA GPU, but this model is on cpu"):
        accelerated(tiny_denoiser(), cuda_graph=True)
    with pytest.raises(RuntimeError, match="computes no gradients"):
        recorded(tiny_denoiser())(X, SIGMA)


@torch.no_grad()
def test_channels_last_changes_the_layout_alone():
    denoiser = tiny_denoiser()
    expected = denoiser(X, SIGMA, LABELS)
    fast = accelerated(denoiser, channels_last=True)
    assert fast.model.enc["8x8_conv"].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(X, SIGMA, LABELS), expected)


class Crossings(TorchDispatchMode):
    """The operations that read from one device and write to another."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor) and t.ndim]
        assert len({t.device.type for t in tensors}) <= 1, operation
        return result


NETWORKS = {
    "song": {},
    "dhariwal": {"network": {"name": "dhariwal_unet", "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1}},
}


def fakes_a_gpu():
    """Whether fake tensors compute on a GPU that is not there: in PyTorch 2.6 convolutions and copies ask for one."""
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        try:
            x.copy_(x)
        except RuntimeError:
            return False
    return True


FAKES = pytest.mark.skipif(not fakes_a_gpu(), reason="this PyTorch fakes no GPU without a driver")


@FAKES
@pytest.mark.parametrize(("network", "solver"), [("dhariwal", "euler"), ("song", "heun"), ("song", "unipc")])
def test_a_run_neither_waits_for_the_gpu_nor_copies(network, solver):
    # On PyTorch's fake tensors: a read by the host raises, and a copy between devices is seen by `Crossings`.
    config = {**tiny_denoiser().config, **NETWORKS[network]}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            teacher = build_denoiser(config)
            student = build_denoiser({**config, "network": {**config["network"], "w_channels": 8}, "w_range": [0, 4]})
            x, levels = torch.empty(3, 2, 8, 8), torch.empty(4, 3, dtype=torch.float64)
            labels = torch.zeros(3, dtype=torch.long)
        steps = [Interval(levels[i], levels[i + 1], i, 3, sigma_after=levels[i + 1]) for i in range(3)]
        for denoiser in (teacher, ClassifierFreeGuidance(teacher, 1.0), guided(student, 2.0)):
            flow = ProbabilityFlow(denoiser, labels)
            with Crossings():
                *_, last = integrate(flow, x, make_solver(solver), steps)
            assert last.device.type == "cuda"


class OnGpu(torch.Generator):
    """A generator that says it is on a GPU, where fake tensors are."""

    device = torch.device("cuda")


class Stream:
    """Noise for stochastic solvers that lies on the GPU already."""

    def draw(self, *, dtype, device):
        return torch.empty(3, 2, 8, 8, dtype=dtype, device=device)


def on_gpu(module):
    """A module with fake tensors of a GPU in place of its own."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    # Not `empty_like`: what holds a known constant would be computed for real.
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    grad = tensor.requires_grad
                    tensors[name] = torch.nn.Parameter(fake, grad) if tensors is part._parameters else fake
    return module


# Without deis and tcd, which look levels that all samples share up in tensors on the CPU: they would be fake too.
@FAKES
@pytest.mark.parametrize("name", [*sorted(SOLVERS.keys() - {"deis", "tcd"}), "plugin", "steps"])
def test_no_solver_waits_for_the_gpu_or_copies(name):
    sigmas = make_schedule("polynomial", num_steps=3, sigma_min=0.02, sigma_max=80.0).tolist()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        denoiser, predictor, table = (
            on_gpu(Small()),
            on_gpu(AMEDPredictor(0.1, 0.2, initial="published")),
            on_gpu(LearnedTable(4)),
        )
        x, labels = torch.empty(3, 2, 8, 8, device="cuda"), torch.zeros(3, dtype=torch.long, device="cuda")
        solvers = [LearnedSteps(make_solver("ipndm"), table)]
        if name == "plugin":
            solvers = [AMEDPlugin(make_solver(inner), predictor) for inner in ("dpmpp", "unipc", "dpm2")]
        elif name in SOLVERS:
            options = {"predictor": predictor} if name == "amed" else {}
            first_step = "afs" in inspect.signature(SOLVERS[name]).parameters
            solvers = [make_solver(name, **options), *([make_solver(name, afs=True, **options)] if first_step else [])]
        for solver in solvers:
            with feature_tap(denoiser, solver) as features, Crossings():
                flow = ProbabilityFlow(denoiser, labels, thresholding=dynamic_thresholding, features=features)
                *_, last = integrate(flow, x, solver, intervals([*sigmas, 0.0], 3, "cuda"), Stream())
            assert last.device.type == "cuda"


def objectives():
    """Every objective, by name, around small networks."""
    teacher, weighting = tiny_denoiser(), make_weighting("edm")
    levels = {"noise_levels": make_noise_levels("cosine"), "weighting": weighting}
    yield "denoising", Denoising(tiny_denoiser(), **levels)
    yield "stage 1", GuidanceDistillation(teacher, guidance_student(teacher, (0.0, 4.0)), **levels)
    grid = make_schedule("cosine", num_steps=4, sigma_min=0.002, sigma_max=80.0)
    for name, steps in STEPS.items():
        models = (guidance_student(teacher, (0.0, 4.0)) for _ in range(2))
        yield name, StepDistillation(*models, steps=steps(grid), weighting=weighting, w_range=(0.0, 4.0))
    autoencoder = build_autoencoder({"data_shape": [2, 8, 8], "channels": [8], "latent_channels": 3})
    yield "autoencoder", Reconstruction(autoencoder)
    plugin = AMEDPlugin(make_solver("ipndm"), AMEDPredictor(0.5, 0.5, initial="published"))
    yield "endpoint", EndpointDistillation(teacher, plugin, sigmas=grid)
    options = {"sigmas": grid[::2], "teacher": make_solver("ipndm"), "teacher_sigmas": grid}
    yield "stepwise", StepwiseDistillation(teacher, plugin, **options)


@FAKES
@pytest.mark.parametrize("name", ["denoising", "stage 1", *STEPS, "autoencoder", "endpoint", "stepwise"])
def test_no_loss_waits_for_the_gpu_or_copies(name):
    objective = dict(objectives())[name]
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu(objective.train())
        shape, labels = (3, 2, 8, 8), torch.zeros(3, dtype=torch.long, device="cuda")
        batch = {key: torch.empty(shape, device="cuda") for key in ("x", "noise", "target")} | {"y": labels}
        with Crossings():
            losses = list(objective.losses(batch, OnGpu()))
        assert all(part.device.type == "cuda" for loss in losses for part in (loss.value, *loss.logs.values()))


@GPU
@pytest.mark.parametrize("switch", ["cuda_graph", "compile", "channels_last"])
@pytest.mark.parametrize("bf16", [False, True])
def test_on_a_gpu_switches_change_rounding_alone(switch, bf16):
    denoiser = guided(tiny_denoiser().cuda(), 1.0)
    sigmas = make_schedule("polynomial", num_steps=5, sigma_min=0.002, sigma_max=80.0)
    run = partial(sample, noise=X.cuda(), solver=make_solver("dpmpp"), sigmas=sigmas, cond=LABELS.cuda())
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        expected = run(denoiser)
        fast = accelerated(denoiser, **{switch: True})
        for _ in range(2):
            torch.testing.assert_close(run(fast), expected, rtol=0, atol=0.1 if bf16 else 1e-3)


@GPU
def test_on_a_gpu_a_model_that_waits_is_named():
    class Waits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, device="cuda"))

        def forward(self, x, sigma, cond=None):
            return x * float(self.weight)

    with pytest.raises(ValueError, match="cannot be recorded as a CUDA graph"), torch.no_grad():
        CudaGraphs(Waits())(X.cuda(), SIGMA.cuda())
