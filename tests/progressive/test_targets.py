"""The identities behind every method of few steps: an exact flow map has zero loss, for every s, sigma' and ramp."""

import pytest
import torch

from diffdistill.denoiser import per_sample
from diffdistill.progressive.targets import eulerian_target, lagrangian_target, normalised, two_hop_target
from diffdistill.solvers import Euler, Heun, Interval, ProbabilityFlow
from diffdistill.training.forward_mode import forward_derivative
from tests.progressive.gaussian import GaussianFlow, levels

SIGMA, MID, END = levels([3.0, 0.8, 0.05], [2.0, 0.3, 0.02], [0.7, 0.0, 0.02])


def state():
    return torch.randn(3, 2, 5, 7, dtype=torch.float64)


def kappa(sigma, mid, end):
    return torch.where(mid == end, 1.0, end * (sigma - mid) / (mid * (sigma - end)))


def other(seed):
    """Some denoiser that is none in particular."""
    torch.manual_seed(seed)
    matrix = torch.randn(7, 7, dtype=torch.float64)
    return lambda x, sigma, cond=None, **_: (x @ matrix).tanh() + per_sample(sigma, x).sin()


def test_two_hops_are_a_convex_combination_of_their_answers():
    x, first, second = state(), other(1), other(2)
    found = two_hop_target(ProbabilityFlow(first), ProbabilityFlow(second), x, SIGMA, MID, END)
    a = first(x, SIGMA)
    x_mid = a + per_sample(MID / SIGMA, x) * (x - a)
    b = second(x_mid, MID)
    share = per_sample(kappa(SIGMA, MID, END), x)
    assert kappa(SIGMA, MID, END)[1] == 0 and kappa(SIGMA, MID, END)[2] == 1
    torch.testing.assert_close(found, share * a + (1 - share) * b, rtol=1e-11, atol=1e-11)


def test_where_the_first_hop_arrives_the_second_answers_nothing_even_at_zero():
    x, first, zero = state(), other(1), torch.zeros(3, dtype=torch.float64)
    found = two_hop_target(ProbabilityFlow(first), ProbabilityFlow(other(2)), x, SIGMA, zero, zero)
    torch.testing.assert_close(found, first(x, SIGMA), rtol=1e-12, atol=1e-12)


def test_a_hop_of_higher_order_counts_by_its_effective_answer():
    x, teacher, second = state(), GaussianFlow(), other(2)
    flow = ProbabilityFlow(teacher)
    found = two_hop_target(flow, ProbabilityFlow(second), x, SIGMA, MID, END, solver=Heun())
    x_mid, _ = Heun().step(flow, x, Interval(SIGMA, MID))
    q = per_sample(MID / SIGMA, x)
    a, b = (x_mid - q * x) / (1 - q), second(x_mid, MID)
    share = per_sample(kappa(SIGMA, MID, END), x)
    torch.testing.assert_close(found, (share * a + (1 - share) * b).detach(), rtol=1e-10, atol=1e-10)


def test_the_shortcut_of_an_exact_flow_map_is_its_own_answer():
    x, exact = state(), GaussianFlow()
    first = ProbabilityFlow(lambda x, sigma, cond: exact(x, sigma, s=MID))
    second = ProbabilityFlow(lambda x, sigma, cond: exact(x, sigma, s=END))
    found = two_hop_target(first, second, x, SIGMA, MID, END)
    torch.testing.assert_close(found, exact(x, SIGMA, s=END).detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("ramp", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_the_eulerian_target_of_an_exact_flow_map_is_its_own_answer(share, ramp):
    x, exact, s = state(), GaussianFlow(), share * SIGMA
    denoised, target = eulerian_target(
        exact, lambda x, sigma, cond: exact(x, sigma, s=s), x, SIGMA, s, None, ramp=1.0 if share < 1 else ramp
    )
    torch.testing.assert_close(denoised, exact(x, SIGMA, s=s).detach())
    torch.testing.assert_close(target, denoised, rtol=1e-11, atol=1e-11)


def test_before_the_ramp_the_target_is_the_teacher_and_a_wrong_student_has_another():
    x, exact, s = state(), GaussianFlow(), 0.3 * SIGMA
    _, target = eulerian_target(exact, lambda x, sigma, cond: x.sin(), x, SIGMA, s, None, ramp=0.0)
    torch.testing.assert_close(target, exact(x, SIGMA).detach(), rtol=1e-12, atol=1e-12)
    denoised, target = eulerian_target(exact, exact, x, SIGMA, s, None, ramp=1.0)  # which ignores s
    assert (denoised - target).abs().max() > 1e-2


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_the_lagrangian_target_of_an_exact_flow_map_is_its_own_answer(share):
    x, exact, s = state(), GaussianFlow(), share * SIGMA
    denoised, target = lagrangian_target(exact, lambda x, sigma, cond, s: exact(x, sigma, s=s), x, SIGMA, s, None)
    torch.testing.assert_close(target, denoised, rtol=1e-11, atol=1e-11)
    wrong, target = lagrangian_target(exact, lambda x, sigma, cond, s: exact(x, sigma), x, SIGMA, s, None)
    assert (wrong - target).abs().max() > 1e-3 or share == 1.0


def test_the_eulerian_target_is_the_limit_of_two_hops():
    """The first hop shrinks: the error of the two-hop target falls with it, in first order."""
    x, teacher, student = state(), GaussianFlow(), other(3)
    s = 0.2 * SIGMA
    denoised, limit = eulerian_target(teacher, student, x, SIGMA, s, None, ramp=1.0)
    errors = []
    for step in (1e-2, 1e-3):
        found = two_hop_target(ProbabilityFlow(teacher), ProbabilityFlow(student), x, SIGMA, (1 - step) * SIGMA, s)
        # Two hops of the lengths `step` and the rest move the answer by step / (1 - s / sigma) times the limit.
        moved = (found - denoised) * per_sample((1 - s / SIGMA) / step, x)
        errors.append((moved - (limit - denoised)).abs().max().item())
    assert errors[1] < 0.15 * errors[0]


def test_a_normalised_step_points_to_the_target_and_is_shorter_than_one():
    denoised, target, weight = state(), state(), SIGMA**-2 + 1
    found = normalised(denoised, target, weight)
    scale = per_sample(weight.sqrt(), denoised)
    tangent, step = scale * (denoised - target), scale * (denoised - found)
    length = tangent.flatten(1).norm(dim=1)
    torch.testing.assert_close(step.flatten(1).norm(dim=1), length / (length + 0.1))
    torch.testing.assert_close(step / per_sample(length / (length + 0.1), step), tangent / per_sample(length, tangent))
    torch.testing.assert_close(normalised(denoised, denoised, weight), denoised)


def test_a_forward_derivative_is_that_of_finite_differences_and_keeps_no_graph():
    network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.GroupNorm(1, 7)).double()
    x, direction = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    value, slope = forward_derivative(network, (x,), (direction,))
    assert not value.requires_grad and not slope.requires_grad
    torch.testing.assert_close(value, network(x).detach())
    h = 1e-6
    expected = (network(x + h * direction) - network(x - h * direction)) / (2 * h)
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-7, atol=1e-8)


def test_halving_is_the_row_with_the_teacher_twice_to_the_bit():
    """The arithmetic of the package's first version, written out: two Euler steps and the inverse of one."""
    x, teacher, zero = state().float(), GaussianFlow(), torch.zeros(3, dtype=torch.float64)
    flow, euler = ProbabilityFlow(teacher), Euler()
    for end in (0.5 * MID, zero):
        with torch.no_grad():
            x_mid, _ = euler.step(flow, x, Interval(SIGMA, MID))
            x_next, _ = euler.step(flow, x_mid, Interval(MID, end))
            expected = Euler.invert(x, x_next, Interval(SIGMA, end))
        assert torch.equal(two_hop_target(flow, flow, x, SIGMA, MID, end), expected)
