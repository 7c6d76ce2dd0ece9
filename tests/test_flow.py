"""rae_suite/flow.py and the sampling part of modeling_dit.py: times, draws, loss, solvers and guidance. Seconds on a
CPU; numbers without another source were computed by the published code (float32, CPU, torch 2.14)."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rae_suite.flow import (
    Draws,
    autoguidance_velocity,
    cfg_velocity,
    draw,
    drop_labels,
    interpolate,
    parse_time_distribution,
    predict_velocity,
    sample_ode,
    sampling_times,
    shift_factor,
    shift_times,
    training_times,
    velocity_loss,
    velocity_target,
)

SHIFT = math.sqrt(48)  # of 768 x 16 x 16 latents
LABELS, NULL = torch.tensor([3, 1]), 7


class ToyModel:
    """Velocity cos(3 t) x + label / 10, and the batch sizes, times and labels of its calls."""

    def __init__(self, gain: float = 1.0):
        self.gain, self.batches, self.times, self.labels = gain, [], [], []

    def __call__(self, x, t, labels):
        self.batches.append(len(x))
        self.times.append(t[0].item())
        self.labels.append(labels.tolist())
        self.sample = self.gain * torch.cos(3 * t)[:, None] * x + labels[:, None] / 10
        return self


def close(value, expected, **tolerance):
    torch.testing.assert_close(value, torch.as_tensor(expected), **{"rtol": 0, "atol": 1e-5, **tolerance})


# Times ----------------------------------------------------------------------------------------------------------------


def test_shift_factors():
    """sqrt(C h w / 4096): 256 px and 512 px of DINOv2-B, RAEv2; never towards data."""
    assert shift_factor(768 * 16 * 16) == pytest.approx(6.9282, abs=1e-4)
    assert shift_factor(768 * 32 * 32) == pytest.approx(13.8564, abs=1e-4)
    assert shift_factor(1024 * 16 * 16) == 8.0 and shift_factor(4096) == 1.0 and shift_factor(50, base=2) == 5.0
    for dim, base in ((4095, 4096), (0, 0)):
        with pytest.raises(ValueError, match=f"{dim}.*{base}"):
            shift_factor(dim, base)


def test_time_distributions_are_parsed():
    assert parse_time_distribution("uniform") is None
    assert parse_time_distribution("logit-normal_0_1") == (0.0, 1.0)
    assert parse_time_distribution("logit-normal_-0.5_0.8") == (-0.5, 0.8)
    for name in (
        "normal",
        "logit-normal",
        "logit-normal_0",
        "logit-normal_0_0",
        "logit-normal_0_-1",
        "logit-normal_nan_1",
        "logit-normal_0_inf",
        "logit-normal_0_1_2",
        "lognormal_0_1",
        "uniform_0_1",
        "",
    ):
        with pytest.raises(ValueError, match=f"logit-normal_M_S.*'{name}'"):
            parse_time_distribution(name)


def test_training_times_are_a_truncated_logit_normal():
    """Another way to the same distribution: draw normals, drop those whose sigmoid is above 0.999. With a mean this
    high the truncation takes a third away."""
    generator = torch.Generator().manual_seed(0)
    normal = 6.5 + 1.5 * torch.randn(400_000, generator=generator)
    expected = torch.sigmoid(normal)[torch.sigmoid(normal) <= 0.999]
    assert len(expected) < 0.7 * 400_000
    t = training_times(torch.rand(400_000, generator=generator), "logit-normal_6.5_1.5")
    levels = torch.linspace(0.05, 0.95, 10)
    close(t.quantile(levels), expected.quantile(levels), atol=1e-3)
    assert t.max() <= 0.999 and training_times(torch.tensor([0.0]), "logit-normal_0_1") == 0


def test_published_statistics_of_training_times():
    """Mean, median and 5-95 % of shifted times."""
    u = (torch.arange(100_000) + 0.5) / 100_000
    for distribution, mean, quantiles in (
        ("uniform", 0.787, (0.266, 0.874, 0.992)),
        ("logit-normal_0_1", 0.837, (0.572, 0.874, 0.973)),
    ):
        t = training_times(u, distribution, SHIFT)
        close(t.mean(), mean, atol=2e-3)
        close(t.quantile(torch.tensor([0.05, 0.5, 0.95])), quantiles, atol=2e-3)


def test_published_grid():
    """50 points are 49 steps; the last point is the shifted 0.001."""
    times = sampling_times(50, SHIFT)
    assert times.shape == (50,) and times.dtype == torch.float32
    close(times[:4], [1, 0.9970050, 0.9939017, 0.9906843], atol=1e-6)
    close(times[-4:], [0.3147054, 0.2319788, 0.1315051, 0.0068873], atol=1e-6)
    close(sampling_times(50, math.sqrt(192))[-1], 0.0136804, atol=1e-6)
    close(sampling_times(3), [1, 0.5005, 0.001], atol=1e-6)


def test_grid_to_zero():
    """`num_steps` steps that end at data exactly."""
    times = sampling_times(4, 3.0, end="zero")
    close(times, [1, 0.9, 0.75, 0.5, 0], atol=1e-6)
    assert times[-1] == 0 and len(sampling_times(1, end="zero")) == 2


@pytest.mark.parametrize("shift", [1.0, SHIFT, math.sqrt(192)])
@pytest.mark.parametrize("end", ["published", "zero"])
def test_grids_and_steps_equal_diffusers_scheduler_bit_for_bit(end, shift):
    """FlowMatchEulerDiscreteScheduler, given the unshifted points, has the same times, and its steps the same bits. It
    appends a 0, which the published run does not step to."""
    times = sampling_times(50, shift, end)
    points = 1 - torch.linspace(0, 0.999, 50) if end == "published" else torch.linspace(1, 0, 51)[:-1]
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=points.tolist())
    assert torch.equal(times, scheduler.sigmas[: len(times)])
    noise, states = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), []

    def velocity(x, t):
        return predict_velocity(ToyModel(), x, t, LABELS)

    final = sample_ode(velocity, noise, times, callback=lambda *step: states.append(step))
    x = noise
    for (i, t_next, state), timestep in zip(states, scheduler.timesteps, strict=end == "zero"):
        x = scheduler.step(velocity(x, times[i]), timestep, x).prev_sample
        assert torch.equal(state, x) and t_next == times[i + 1]
    assert len(states) == len(times) - 1 and torch.equal(final, x)
    close(scheduler.timesteps / 1000, times[: len(points)], atol=1e-7)


def test_wrong_sampling_settings_are_refused():
    for arguments, message in (
        ({"num_steps": 5, "end": "one"}, "published or zero.*'one'"),
        ({"num_steps": 1}, "at least 2.*got 1"),
        ({"num_steps": 0, "end": "zero"}, "at least 1.*got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling_times(**arguments)
    with pytest.raises(ValueError, match="euler or heun2.*'heun3'"):
        sample_ode(lambda x, t: x, torch.ones(1), sampling_times(3), "heun3")
    for times in (torch.ones(1), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=rf"at least 2.*\({times.shape[0]}"):
            sample_ode(lambda x, t: x, torch.ones(1), times)


# The training step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_generator", [False, True])
def test_published_draws(own_generator):
    """Order and values after seed 0, from torch's global generator and from one of our own."""
    data = torch.zeros(6, 4, 4, 4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draws = draw(data, torch.Generator().manual_seed(0) if own_generator else None)
    assert torch.equal(torch.get_rng_state(), state) == own_generator
    uniform = [0.9321445, 0.9998322, 0.9560798, 0.9672545, 0.7691023, 0.9515370]
    close(training_times(draws.u_time, "uniform", SHIFT), uniform)
    logit_normal = [0.9139520, 0.9960544, 0.9333767, 0.9435630, 0.8148517, 0.9294768]
    close(training_times(draws.u_time, "logit-normal_0_1", SHIFT), logit_normal)
    torch.manual_seed(0)
    assert torch.equal(draws.noise, torch.randn_like(data)) and torch.equal(draws.u_time, torch.rand(6))
    assert torch.equal(draws.u_drop, torch.rand(6))


def test_published_loss():
    """Per sample, of a toy model, after seed 0."""
    data = torch.sin(0.11 * torch.arange(6 * 64)).view(6, 4, 4, 4)
    torch.manual_seed(0)
    noise, u_time, _ = draw(data)
    losses = {}
    for distribution in ("uniform", "logit-normal_0_1"):
        t = training_times(u_time, distribution, SHIFT)
        x_t = interpolate(data, noise, t)
        losses[distribution] = velocity_loss(0.5 * x_t + t.view(-1, 1, 1, 1), velocity_target(data, noise))
    close(losses["uniform"], [1.685870, 1.840211, 1.959354, 1.725582, 1.534607, 1.360069])
    close(losses["uniform"].mean(), 1.684282)
    close(losses["logit-normal_0_1"].mean(), 1.675347)


def test_interpolation_ends_and_derivative():
    """x_0 is data, x_1 noise, and dx/dt the target."""
    data, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    assert torch.equal(interpolate(data, noise, torch.zeros(2)), data)
    assert torch.equal(interpolate(data, noise, torch.ones(2)), noise)
    t = torch.tensor([0.25, 0.75])
    change = (interpolate(data, noise, t + 0.125) - interpolate(data, noise, t)) / 0.125
    close(change, velocity_target(data, noise))


def test_loss_is_float32():
    """16-bit predictions are compared in float32."""
    predicted, target = torch.randn(2, 3, 2, 2).bfloat16(), torch.randn(2, 3, 2, 2)
    loss = velocity_loss(predicted, target)
    assert loss.dtype == torch.float32 and torch.equal(loss, velocity_loss(predicted.float(), target))


def test_label_dropout():
    """Strictly below the probability; 0 drops nothing, 1 everything."""
    labels, u = torch.arange(5), torch.tensor([0.0, 0.09, 0.1, 0.5, 0.99])
    assert drop_labels(labels, u, 0.1, 10).tolist() == [10, 10, 2, 3, 4]
    assert torch.equal(drop_labels(labels, u, 0.0, 10), labels)
    assert drop_labels(labels, u, 1.0, 10).tolist() == [10] * 5
    assert labels.tolist() == [0, 1, 2, 3, 4] and drop_labels(labels, u, 0.1, 10).dtype == torch.int64


def test_draws_are_a_tuple():
    """Recorded numbers can stand in for drawn ones."""
    noise, u_time, u_drop = Draws(*map(torch.ones, (1, 2, 3)))
    assert (len(noise), len(u_time), len(u_drop)) == (1, 2, 3)


# Solvers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shift, num_steps, expected",
    [
        (SHIFT, 50, 0.9976001),
        (SHIFT, 25, 1.0490335),
        (math.sqrt(192), 50, 1.0449306),
        (math.sqrt(192), 25, 1.1769660),
        (1.0, 50, 0.9698715),
        (1.0, 25, 0.9856370),
    ],
)
def test_published_euler(shift, num_steps, expected):
    """v = cos(3 t) x from x = 1."""
    final = sample_ode(lambda x, t: torch.cos(3 * t) * x, torch.ones(1), sampling_times(num_steps, shift))
    close(final, [expected])


def test_heun_is_of_second_order():
    """Halving the steps divides the error by four; Euler's by two. dx/dt = (1 + t) x has a known solution."""

    def error(solver, steps):
        final = sample_ode(lambda x, t: (1 + t) * x, torch.ones(1), sampling_times(steps, 1.0, "zero"), solver)
        return abs(final.item() - math.exp(-1.5))

    assert 3.5 < error("heun2", 8) / error("heun2", 16) < 4.5
    assert 1.7 < error("euler", 32) / error("euler", 64) < 2.3


def test_sampling_draws_nothing_and_keeps_its_input():
    """It is a function of the noise, without gradients, in float32 also from 16-bit noise and a 16-bit model."""
    noise = torch.randn(2, 3).bfloat16()
    copy, state = noise.clone(), torch.get_rng_state()
    weight = torch.ones(3, requires_grad=True)
    final = sample_ode(lambda x, t: (weight * x).bfloat16(), noise, sampling_times(4))
    assert final.dtype == torch.float32 and not final.requires_grad
    assert torch.equal(noise, copy) and torch.equal(torch.get_rng_state(), state)
    assert predict_velocity(lambda x, t, y: ToyModel()(x.bfloat16(), t.bfloat16(), y), noise, 0.5, LABELS).dtype == (
        torch.float32
    )


# Guidance -------------------------------------------------------------------------------------------------------------


def run(kind: str, scale: float, interval: tuple, num_steps: int = 5, solver: str = "euler") -> tuple:
    """The final state of a run from ones, its times, the model and the weaker model."""
    model, weaker = ToyModel(), ToyModel(0.5)
    velocities = {
        "none": lambda x, t: predict_velocity(model, x, t, LABELS),
        "cfg": lambda x, t: cfg_velocity(model, x, t, LABELS, NULL, scale, interval),
        "autoguidance": lambda x, t: autoguidance_velocity(model, weaker, x, t, LABELS, scale, interval),
    }
    times = sampling_times(num_steps)
    return sample_ode(velocities[kind], torch.ones(2, 3), times, solver), times, model, weaker


def test_unguided_sampling_is_one_pass_per_step():
    """49 passes for 50 points, each of the batch's size; Heun's solver takes two a step."""
    _, times, model, _ = run("none", 1.0, (0.0, 1.0), num_steps=50)
    assert model.batches == [2] * 49 and model.times == times[:-1].tolist()
    _, times, model, _ = run("none", 1.0, (0.0, 1.0), solver="heun2")
    assert model.batches == [2] * 8
    assert model.times == [t for pair in zip(times[:-1].tolist(), times[1:].tolist(), strict=True) for t in pair]


@pytest.mark.parametrize("kind", ["cfg", "autoguidance"])
def test_scale_one_costs_nothing(kind):
    """It is the unguided run, bit for bit, with its passes."""
    final, _, model, weaker = run(kind, 1.0, (0.0, 1.0))
    assert torch.equal(final, run("none", 1.0, (0.0, 1.0))[0])
    assert model.batches == [2] * 4 and weaker.batches == []


@pytest.mark.parametrize("scale", [2.5, 0.0, 0.5])
def test_guided_passes_are_made_inside_the_interval_only(scale):
    """CFG doubles the batch there, autoguidance asks the weaker model there."""
    inside = [t for t in sampling_times(5)[:-1].tolist() if 0.3 <= t <= 0.8]
    assert len(inside) == 2
    _, times, model, _ = run("cfg", scale, (0.3, 0.8))
    assert model.times == times[:-1].tolist()
    assert model.batches == [4 if t in inside else 2 for t in model.times]
    guided = model.labels[model.batches.index(4)]
    assert guided == [*LABELS.tolist(), NULL, NULL]
    _, times, model, weaker = run("autoguidance", scale, (0.3, 0.8))
    assert model.times == times[:-1].tolist() and model.batches == [2] * 4
    assert weaker.times == inside and weaker.batches == [2, 2] and weaker.labels == [LABELS.tolist()] * 2


@pytest.mark.parametrize("kind", ["cfg", "autoguidance"])
@pytest.mark.parametrize("end", [0, 1])
def test_interval_ends_are_included(kind, end):
    """Also where a time like 0.3 or 0.9 is rounded up or down to float32."""
    x = torch.ones(2, 3)
    for time in (0.3, 0.9, 0.1, 0.7):
        t = torch.tensor(time)
        beside = torch.nextafter(t, torch.tensor(2.0 * end - 1.0))  # just outside
        interval = (time, 1.0) if end == 0 else (0.0, time)
        for at, is_on in ((t, True), (beside, False)):
            model, weaker = ToyModel(), ToyModel(0.5)
            if kind == "cfg":
                v = cfg_velocity(model, x, at, LABELS, NULL, 2.0, interval)
            else:
                v = autoguidance_velocity(model, weaker, x, at, LABELS, 2.0, interval)
            assert torch.equal(v, predict_velocity(ToyModel(), x, at, LABELS)) != is_on, (time, at)


def test_guidance_formulas():
    """null + scale (label - null), and weaker + scale (model - weaker), on all channels."""
    x, t = torch.randn(2, 3), torch.tensor(0.25)
    label, null = (predict_velocity(ToyModel(), x, t, y) for y in (LABELS, torch.tensor([NULL, NULL])))
    close(cfg_velocity(ToyModel(), x, t, LABELS, NULL, 1.5), null + 1.5 * (label - null))
    weak = predict_velocity(ToyModel(0.5), x, t, LABELS)
    close(autoguidance_velocity(ToyModel(), ToyModel(0.5), x, t, LABELS, 1.42), weak + 1.42 * (label - weak))


def test_shift_of_one_is_none():
    t = torch.linspace(0, 1, 11)
    assert torch.equal(shift_times(t, 1.0), t)
