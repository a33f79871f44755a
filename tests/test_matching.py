"""Students of another process or parameterization: exact on a closed form, and as diffusers samples
them."""

import json
import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import dkdm
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.matching import (
    covered,
    gauge_of,
    level_weights,
    matched_process,
    on_levels_of,
    ratio_range,
)
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization, from_x_0_eps, scale_input
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas, karras, rectified_flow
from dkdm.core.objectives.objective import Objective
from dkdm.errors import UsageError
from dkdm.models.schedulers import NAMED, SIGMA_RANGE, from_scheduler_config
from dkdm.models.student_process import with_process
from dkdm.shipping.pipeline_folder import scheduler_config, write_pipeline
from dkdm.students import student_of
from factories import denoiser

MIXTURE = GaussianMixture.of([[-1.2, -0.4], [0.8, 1.0]], std=[0.3, 0.5], weights=[0.4, 0.6])
TEACHERS = {
    "ddpm": from_scheduler_config(NAMED["ddpm-linear"]),
    "cosine": from_scheduler_config(NAMED["ddpm-cosine"]),
    "zero-snr": from_scheduler_config(
        NAMED["ddpm-cosine"] | {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}
    ),
    "flow": rectified_flow(1000, shift=3.0),
    "edm": karras(100),
}
KINDS = {
    "ddpm": "epsilon",
    "cosine": "v_prediction",
    "zero-snr": "sample",
    "flow": "flow_prediction",
    "edm": "edm",
}
STUDENTS = [
    ("ddpm-linear", "epsilon"),
    ("ddpm-cosine", "v_prediction"),
    ("ddpm-cosine", "sample"),
    ("flow", "flow_prediction"),
    ("edm", "edm"),
]


class Perfect(nn.Module):
    """The exact student of a process at any time, by that process's own formula for time."""

    def __init__(self, process, parameterization):
        super().__init__()
        self.process, self.own = process, parameterization

    def pair(self, time):
        name = self.process.scheduler["_class_name"]
        if name.startswith("FlowMatch"):
            return 1 - time / 1000, time / 1000
        if name.startswith("EDM"):
            return torch.ones_like(time), (4 * time).exp()
        angles = torch.atan2(self.process.sigma, self.process.alpha)
        known = self.process.network_time.numpy()
        angle = torch.from_numpy(np.interp(time.numpy(), known, angles.numpy()))
        return angle.cos(), angle.sin()

    def forward(self, x, time):
        alpha, sigma = self.pair(time.double())
        kind, data = self.own.prediction, self.own.sigma_data
        x = x.double()
        state = x / scale_input(kind, torch.ones_like(x), sigma, data)
        x_0 = MIXTURE.posterior_mean(state, alpha, sigma)
        eps = (state - per_sample(alpha, x) * x_0) / per_sample(sigma, x)
        return from_x_0_eps(kind, x_0, eps, alpha, sigma, data)


def teacher_of(name):
    return mixture_denoiser(MIXTURE, TEACHERS[name], Parameterization(KINDS[name]))


def perfect(teacher, process, prediction):
    like = with_process(teacher, prediction, process)
    network = Perfect(like.process, like.parameterization)
    return Denoiser(network, like.process, like.parameterization, (2,))


def states(process, count, seed=0):
    random = torch.Generator().manual_seed(seed)
    t = torch.randint(process.num_levels, (count,), generator=random)
    eps = torch.randn(count, 2, generator=random, dtype=torch.float64)
    return process.add_noise(MIXTURE.sample(count, random), eps, t), t


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize(("process", "prediction"), STUDENTS)
def test_a_perfect_student_of_any_kind_has_no_loss(name, process, prediction):
    teacher = teacher_of(name)
    student = perfect(teacher, process, prediction)
    seen = on_levels_of(student, teacher.process)
    x, t = states(teacher.process, 4000)
    # Float32 times tell the levels of nearly pure noise apart no better than this.
    inside = covered(student.process, teacher.process)[t] & (teacher.process.snr()[t] > 1e-5)
    batch = Batch(x[inside], t[inside], {}, t[inside])
    objective = Objective(seen, teacher, level_weights=level_weights(student, teacher))
    loss = objective(seen, batch, teacher.predict(batch))
    assert loss.max() < 1e-5
    assert loss.mean() < 1e-8
    assert inside.float().mean() > 0.9
    wrong = replace(seen, rescale=seen.rescale * 1.1) if seen.rescale is not None else None
    if wrong is not None:
        off = objective(wrong, batch, teacher.predict(batch))
        assert off.mean() > 1e-4


@pytest.mark.parametrize("name", ["ddpm", "zero-snr"])
@pytest.mark.parametrize(("process", "prediction"), STUDENTS)
def test_it_samples_the_same_distribution_inside_the_teachers_range(name, process, prediction):
    teacher = teacher_of(name)
    like = with_process(teacher, prediction, process)
    low, high = ratio_range(teacher.process)
    own_low, own_high = ratio_range(like.process)
    assert low <= own_low * (1 + 1e-6) and own_high <= high * (1 + 1e-6)
    student = mixture_denoiser(MIXTURE, like.process, like.parameterization)
    random = torch.Generator().manual_seed(3)
    x = student.sample(
        lambda _: torch.randn(4000, 2, generator=random, dtype=torch.float64), {}, 250
    )
    mean, covariance = MIXTURE.moments()
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.06)
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0, atol=0.06)
    values = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    empirical = (x[:, :1] <= values).double().mean(0)
    assert (empirical - MIXTURE.cdf(values)).abs().max() < 0.035


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("process", NAMED)
def test_states_keep_their_ratio_and_have_x_0_and_eps_in_common(name, process):
    other = TEACHERS[name]
    own = from_scheduler_config(NAMED[process])
    matched = matched_process(own, other)
    inside = covered(own, other)
    ones = torch.ones_like(matched.alpha)
    torch.testing.assert_close(gauge_of(own).norm(matched.alpha, matched.sigma), ones)
    torch.testing.assert_close(
        (matched.alpha * other.sigma)[inside], (other.alpha * matched.sigma)[inside]
    )
    assert inside.float().mean() > 0.9
    assert (torch.diff(matched.network_time) >= 0).all()


def test_on_its_own_levels_a_process_is_matched_with_itself():
    for process in TEACHERS.values():
        matched = matched_process(process, process)
        torch.testing.assert_close(matched.alpha, process.alpha, rtol=0, atol=1e-12)
        torch.testing.assert_close(matched.network_time, process.network_time, rtol=1e-9, atol=1e-9)


def test_the_teachers_own_process_changes_nothing():
    teacher = denoiser()
    assert with_process(teacher) is teacher
    student = student_of("unet-tiny", teacher)
    assert on_levels_of(student, teacher.process) is student
    assert level_weights(student, teacher) is None


def test_another_parameterization_keeps_the_process():
    teacher = denoiser()
    student = student_of("unet-tiny", teacher, prediction="sample")
    assert student.process is teacher.process
    assert student.parameterization == Parameterization("sample")


def test_a_learned_variance_stays_with_the_process_it_is_of():
    teacher = denoiser(out_channels=2, scheduler={"variance_type": "learned_range"})
    same = student_of("unet-tiny", teacher, prediction="epsilon")
    assert same.parameterization.variance == "learned_range"
    assert student_of("unet-tiny", teacher, process="flow").parameterization == Parameterization(
        "flow_prediction"
    )
    seen = on_levels_of(replace(same, process=karras(50)), teacher.process)
    with pytest.raises(UsageError, match="L_vlb is not defined between them"):
        Objective(seen, teacher)


@pytest.mark.parametrize(
    ("prediction", "process", "message"),
    [
        ("epsilon", "flow", "FlowMatchEulerDiscreteScheduler samples flow_prediction only"),
        ("flow_prediction", "ddpm-cosine", "DDPMScheduler samples epsilon and sample and v_pred"),
        ("flow_prediction", "teacher", "DDPMScheduler samples epsilon"),
        (
            None,
            "cosine",
            "noise process 'cosine': give ddpm-linear, ddpm-cosine, flow, edm, or",
        ),
    ],
)
def test_what_no_scheduler_samples_is_refused(prediction, process, message):
    with pytest.raises(UsageError, match=message):
        with_process(denoiser(), prediction, process)


def test_processes_without_a_common_ratio_are_refused(tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(NAMED["edm"] | {"sigma_min": 30000.0, "sigma_max": 90000.0}))
    with pytest.raises(UsageError, match="EDMEulerScheduler has no signal-to-noise ratio in comm"):
        with_process(denoiser(), None, str(path))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_process_can_be_named_by_its_schedulers_config(tmp_path, shift):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(NAMED["flow"] | {"shift": shift}))
    like = with_process(teacher_of("ddpm"), None, str(path))
    assert like.parameterization.prediction == "flow_prediction"
    assert like.process.scheduler["shift"] == shift


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("ddpm-cosine", {"prediction_type": "v_prediction"}, Parameterization("v_prediction")),
        ("ddpm-cosine", {"prediction_type": "sample"}, Parameterization("sample")),
        ("edm", {"sigma_data": 1.25}, Parameterization("edm", sigma_data=1.25)),
    ],
)
def test_a_schedulers_config_says_what_its_network_predicts(tmp_path, name, changes, expected):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(NAMED[name] | changes))
    teacher = replace(teacher_of("ddpm"), parameterization=Parameterization("epsilon"))
    like = with_process(teacher, None, str(path))
    assert like.parameterization == expected
    assert scheduler_config(like).items() >= changes.items()


def test_a_students_own_time_is_exact_between_its_levels():
    """Where a formula gives it; 18 levels are too few to interpolate."""
    few = replace(teacher_of("edm"), process=karras(18), time="sigma")
    seen = on_levels_of(few, karras(1000))
    ratio = seen.process.sigma / seen.process.alpha
    torch.testing.assert_close(seen.network_time, ratio, rtol=1e-12, atol=0)
    index = on_levels_of(replace(few, time="index"), karras(1000))
    assert index.network_time.min() >= 0 and index.network_time.max() <= 17


def test_an_error_of_x_0_that_becomes_one_of_eps_is_bounded():
    teacher = replace(teacher_of("cosine"), parameterization=Parameterization("sample"))
    student = replace(teacher, parameterization=Parameterization("epsilon"))
    weights, snr = level_weights(student, teacher), teacher.process.snr()
    assert (weights * snr).max() <= 100 * (1 + 1e-9)  # eps errs by alpha / sigma times as much
    assert snr.max() > 1e4
    assert level_weights(teacher, teacher) is None


def test_levels_that_the_student_lacks_weigh_nothing():
    teacher = teacher_of("cosine")
    student = perfect(teacher, "ddpm-linear", "v_prediction")
    weights = level_weights(student, teacher)
    inside = covered(student.process, teacher.process)
    assert 0 < (~inside).sum() < 10
    assert torch.equal(weights, inside.double())


def test_an_amplified_error_is_bounded():
    teacher = replace(teacher_of("cosine"), parameterization=Parameterization("epsilon"))
    student = perfect(teacher, "flow", "flow_prediction")
    weights, snr = level_weights(student, teacher), teacher.process.snr()
    inside = covered(student.process, teacher.process)
    assert (~inside).sum() <= 2
    torch.testing.assert_close(weights, (100 * snr).clamp(max=1) * inside)
    amplified = weights * (1 + snr.rsqrt()) ** 2  # an error of eps, as one of the flow's velocity
    assert amplified.max() < 400 and (1 + snr.rsqrt()).square().max() > 1e8
    assert level_weights(student_of("unet-tiny", denoiser()), denoiser()) is None


def test_an_amplified_target_is_clipped_as_in_the_chain():
    teacher = denoiser(scheduler={"prediction_type": "epsilon"})
    student = student_of("unet-tiny", teacher, prediction="sample")
    objective = Objective(student, teacher)
    t = torch.tensor([49, 49])
    batch = Batch(torch.randn(2, 1, 8, 8), t, {"class_labels": torch.tensor([0, 1])}, t)
    with torch.no_grad():
        target, found = teacher.predict(batch), student.predict(batch)
    assert target.x_0.abs().max() > 1.5
    expected = (found.output - target.x_0.clamp(-1, 1)).square().flatten(1).mean(1)
    torch.testing.assert_close(objective(student, batch, target), expected)


def test_levels_can_weigh_as_densely_as_the_students_own():
    teacher = teacher_of("ddpm")
    student = perfect(teacher, "flow", "flow_prediction")
    weights = level_weights(
        replace(student),
        replace(teacher, parameterization=Parameterization("v_prediction")),
        "student",
    )
    inside = covered(student.process, teacher.process)
    flow = teacher.process.sigma / (teacher.process.alpha + teacher.process.sigma)
    density = torch.gradient(flow)[0]
    expected = density / density.mean()
    torch.testing.assert_close(weights[inside][5:-5], expected[inside][5:-5], rtol=0.02, atol=0.02)
    assert weights.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("process", ["ddpm-linear", "ddpm-cosine", "edm", "flow"])
def test_what_is_saved_loads_in_diffusers_and_here_with_the_same_levels(process, tmp_path):
    sd = from_betas(beta_schedule("scaled_linear", 1000, 0.00085, 0.012))
    teacher = mixture_denoiser(MIXTURE, sd, Parameterization("v_prediction"))
    like = with_process(teacher, None, process)
    config = scheduler_config(like)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    again = from_scheduler_config(json.loads((tmp_path / "scheduler_config.json").read_text()))
    assert torch.equal(again.alpha, like.process.alpha)
    assert torch.equal(again.network_time, like.process.network_time)
    stock = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path)
    if hasattr(stock, "alphas_cumprod"):
        torch.testing.assert_close(
            stock.alphas_cumprod, like.process.alpha.square().float(), rtol=1e-4, atol=1e-7
        )
        assert stock.config.prediction_type == like.parameterization.prediction
    assert ratio_range(like.process)[1] <= ratio_range(sd)[1] * (1 + 1e-6)
    if process == "flow":
        assert config[SIGMA_RANGE][1] == pytest.approx(0.936, abs=0.002)
        assert like.process.start_std == pytest.approx(
            math.hypot(1 - config[SIGMA_RANGE][1], config[SIGMA_RANGE][1])
        )


def test_a_flow_student_of_a_ddpm_teacher_samples_with_the_stock_scheduler():
    """The shipped pipeline's own lines around the stock scheduler, on the exact network."""
    sd = from_betas(beta_schedule("scaled_linear", 1000, 0.00085, 0.012))
    teacher = mixture_denoiser(MIXTURE, sd, Parameterization("epsilon"))
    like = with_process(teacher, None, "flow")
    network = Perfect(like.process, like.parameterization)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(like.process.scheduler)
    low, high = like.process.scheduler[SIGMA_RANGE]
    scheduler.set_timesteps(sigmas=torch.linspace(high, max(high / 200, low), 200).tolist())
    x = like.process.start_std * torch.randn(
        4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for time in scheduler.timesteps:
        assert low * 1000 * (1 - 1e-6) <= time <= high * 1000 * (1 + 1e-6)
        x = scheduler.step(network(x, time.expand(len(x))), time, x).prev_sample
    mean, covariance = MIXTURE.moments()
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.08)
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0, atol=0.12)


@pytest.mark.parametrize("process", ["ddpm-linear", "flow", "edm"])
def test_a_run_with_another_process_trains_resumes_and_ships(process, tmp_path):
    options = {
        "student_process": process,
        "train_batch_size": 4,
        "evaluation_samples": 0,
        "validation_steps": 0,
        "validation_sampling_steps": 3,
        "fill_steps": 2,
        "pool_size": 16,
        "lr_scheduler": "constant",
        "seed": 1,
    }
    teacher = denoiser()
    folder = dkdm.distill(
        teacher,
        "unet-mini",
        dkdm.DistillConfig(output_dir=tmp_path / "run", max_train_steps=3, **options),
    )
    model = dkdm.load_teacher(str(folder))
    like = with_process(teacher, None, process)
    assert model.parameterization.prediction == like.parameterization.prediction
    assert torch.equal(model.process.sigma, like.process.sigma)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[0, 1, 2], num_inference_steps=3, output_type="pt").images
    assert images.shape == (3, 1, 8, 8) and images.isfinite().all()
    resumed = replace(
        dkdm.DistillConfig(output_dir=tmp_path / "parts", max_train_steps=3, **options),
        checkpointing_steps=2,
    )
    dkdm.distill(denoiser(), "unet-mini", replace(resumed, max_train_steps=2))
    dkdm.distill(denoiser(), "unet-mini", replace(resumed, resume_from_checkpoint="latest"))
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (folder / name).read_bytes()


def test_write_pipeline_of_a_restricted_flow_is_never_a_stock_one(tmp_path):
    teacher = denoiser(classes=None, scheduler={"beta_schedule": "linear"})
    student = student_of("unet-tiny", teacher, process="flow")
    write_pipeline(tmp_path, student)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DenoiserPipeline"]
    assert "first_sigma" in (tmp_path / "pipeline.py").read_text()
