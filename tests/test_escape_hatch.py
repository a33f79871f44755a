"""Networks of any convention as teachers: the examples of docs/teachers.md, in closed form.

The networks here are what a perfectly trained one of each convention would compute, written from
that convention alone: nothing of dkdm's own time or parameterization is in them.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline

import dkdm
import pipelines
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Prediction, clip_x_0, scale_input
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import zero_terminal_snr
from dkdm.core.diffusion.time import network_time
from dkdm.core.objectives.objective import simple_loss
from dkdm.errors import UsageError
from dkdm.models.student_process import with_process
from dkdm.shipping.pipeline_folder import shipping_notes, write_pipeline
from dkdm.students import given_student, student_of
from factories import counting

DOCUMENT = Path(__file__).parents[1] / "docs" / "teachers.md"
SHAPE = (3, 32, 32)
MIXTURE = GaussianMixture.of(
    means=0.2 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), std=0.3
)
BETAS = torch.linspace(1e-4, 0.02, 1000)


def data_and_noise(x, alpha, sigma):
    """(E[x_0 | x], E[eps | x]) at x = alpha x_0 + sigma eps."""
    alpha, sigma = alpha.double(), sigma.double()
    x_0 = MIXTURE.posterior_mean(x, alpha, sigma)
    return x_0, (x - per_sample(alpha, x) * x_0) / per_sample(sigma, x)


def ddpm(x, t):
    alpha_bar = torch.cumprod(1 - BETAS.double(), dim=0)[t.long()]
    return data_and_noise(x, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())[1]


def edm(x, sigma):
    return data_and_noise(x, torch.ones_like(sigma), sigma)[0]


def flow_to_data(x, t):
    data, noise = data_and_noise(x, t, 1 - t)
    return data - noise


def flow_of_data(x, t):
    return data_and_noise(x, 1 - t, t)[0]


EXAMPLES = {
    "A DDPM": ddpm,
    "EDM's D(x, sigma)": edm,
    "A flow whose time is 1 at the data": flow_to_data,
    "A flow that predicts the clean sample": flow_of_data,
}


def example(title, network):
    """The teacher that the document's example of this title makes of a network."""
    text = DOCUMENT.read_text()
    code = re.search(rf"\*\*{re.escape(title)}\*\*.*?```python\n(.*?)```", text, re.DOTALL)[1]
    names = {"dkdm": dkdm, "torch": torch, "network": network}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names["teacher"]


def states(process, count=50):
    """Noisy samples of the mixture at levels from the first to the last."""
    random = torch.Generator().manual_seed(1)
    t = torch.linspace(0, process.num_levels - 1, count).round().long()
    x_0 = MIXTURE.sample(count, random)
    eps = torch.randn(x_0.shape, generator=random, dtype=torch.float64)
    return Batch(process.add_noise(x_0, eps, t), t, {}, t)


def assert_exact(teacher):
    """It predicts x_0 and eps of the closed form at every level.

    Times are handed over in float32: t = 0.999 is known to 6e-8, and 1 - t to 6e-5 of itself.
    """
    batch = states(teacher.process)
    x_0, eps = data_and_noise(batch.x, *teacher.process.at(batch.t))
    found = teacher.predict(batch)
    torch.testing.assert_close(found.x_0, x_0, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("title", "network"), EXAMPLES.items(), ids=EXAMPLES.keys())
def test_the_examples_are_exact(title, network):
    assert_exact(example(title, network))


@pytest.mark.parametrize(
    ("title", "argument"),
    [
        ("EDM's D(x, sigma)", "time"),
        ("A flow whose time is 1 at the data", "time"),
        ("A flow whose time is 1 at the data", "call"),
        ("A flow that predicts the clean sample", "time"),
    ],
)
def test_every_argument_of_the_examples_is_needed(title, argument):
    teacher = example(title, EXAMPLES[title])
    without = replace(teacher, **{argument: None})
    batch = states(teacher.process)
    found, expected = (model.predict(batch).x_0 for model in (without, teacher))
    wrong = ~torch.isclose(found, expected, rtol=0, atol=0.01)
    assert wrong.double().mean() > 0.2


@pytest.mark.parametrize(("title", "network"), EXAMPLES.items(), ids=EXAMPLES.keys())
def test_a_perfect_student_of_the_usual_convention_has_nothing_to_learn(title, network):
    teacher = example(title, network)
    student = mixture_denoiser(MIXTURE, teacher.process, teacher.parameterization)
    batch = states(teacher.process)
    loss = simple_loss(student, student.predict(batch), teacher.predict(batch), batch.t)
    assert loss.max() < 1e-6


@pytest.mark.parametrize(("title", "network"), EXAMPLES.items(), ids=EXAMPLES.keys())
def test_a_student_is_fed_and_called_in_the_usual_way(title, network):
    teacher = example(title, network)
    student = student_of("unet-tiny", teacher)
    kinds = {"EDM's D(x, sigma)": "edm", "A flow that predicts the clean sample": "flow_prediction"}
    own = teacher.parameterization
    assert student.parameterization == replace(own, prediction=kinds.get(title, own.prediction))
    assert torch.equal(student.network_time, teacher.process.network_time)
    batch = states(teacher.process, 2)
    batch = batch._replace(x=batch.x.float())
    kind, sigma = student.parameterization.prediction, teacher.process.at(batch.t)[1]
    shown = scale_input(kind, batch.x, sigma)
    assert torch.equal(
        student.predict(batch).output,
        student.network(shown, student.network_time[batch.t].float()).sample,
    )


# --- what else networks are fed ------------------------------------------------------------------


def alpha_sigma_of_log_snr(log_snr):
    """Of a variance-preserving process: alpha^2 = sigmoid(log-SNR)."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


TIMES = {
    "log_snr": (dkdm.from_betas(BETAS), lambda x, u: (x, *alpha_sigma_of_log_snr(u.double()))),
    "fraction": (dkdm.rectified_flow(1000), lambda x, t: (x, 1 - t, t)),
    "sigma": (dkdm.karras(1000), lambda x, s: (x, torch.ones_like(s), s)),
    "c_noise": (dkdm.karras(1000), lambda x, c: (x, torch.ones_like(c), (4 * c.double()).exp())),
    "a function": (dkdm.karras(1000), lambda x, k: (x, torch.ones_like(k), 1 / k)),
}


@pytest.mark.parametrize("kind", TIMES)
def test_times_of_every_kind(kind):
    process, convention = TIMES[kind]
    time = (lambda p: 1 / p.sigma) if kind == "a function" else kind
    own = dkdm.Parameterization("sample")
    teacher = dkdm.Denoiser(
        lambda x, t: data_and_noise(*convention(x, t))[0], process, own, SHAPE, time=time
    )
    assert_exact(teacher)


def test_times_of_a_variance_preserving_process_are_those_of_its_ratio():
    """Fraction and sigma are of sigma / alpha, so that a flow's network may be used on betas."""
    process = dkdm.from_betas(BETAS)
    alpha, sigma = process.alpha, process.sigma
    fraction = network_time(process, "fraction")
    torch.testing.assert_close(fraction / (1 - fraction), sigma / alpha)
    torch.testing.assert_close(network_time(process, "data_fraction"), 1 - fraction)
    torch.testing.assert_close(network_time(process, "sigma"), sigma / alpha)
    assert torch.equal(network_time(process, "index"), torch.arange(1000).double())


def test_an_unknown_time_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="time is 'seconds': give one of index, fraction"):
        dkdm.Denoiser(edm, dkdm.karras(10), dkdm.Parameterization("sample"), SHAPE, time="seconds")


# --- values in [0, 1] ----------------------------------------------------------------------------

BETWEEN = dkdm.Clipping(range=0.5, center=0.5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_values_between_zero_and_one(eta):
    """A network that overshoots: its chain stays where its data are, and so do the pictures."""
    teacher = dkdm.Denoiser(
        lambda x, t: 3 * torch.tanh(x),
        dkdm.from_betas(BETAS, clipping=BETWEEN),
        dkdm.Parameterization("sample"),
        SHAPE,
        value_range=(0.0, 1.0),
    )
    random = torch.Generator().manual_seed(0)
    x_0 = teacher.sample(lambda _: torch.randn(2, *SHAPE, generator=random), {}, 10, eta)
    assert (x_0.min(), x_0.max()) == (0, 1)
    pixels = teacher.to_pixels(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    assert pixels.tolist() == [-1, -0.5, 0, 1]


def test_its_student_ships_with_them(tmp_path):
    """The folder keeps the range, its pipeline draws in it; what diffusers cannot do is said."""
    betas = torch.linspace(1e-4, 0.2, 50)
    teacher = dkdm.Denoiser(
        lambda x, t: torch.zeros_like(x),
        dkdm.from_betas(betas, clipping=BETWEEN, spacing="trailing"),
        dkdm.Parameterization("sample"),
        (1, 16, 16),
        value_range=(0.0, 1.0),
    )
    student = student_of("unet-tiny", teacher)
    write_pipeline(tmp_path, student)
    assert shipping_notes(student, tmp_path) == [
        "its chain was clipped to 0..1, and the folder's scheduler does not: "
        "only DDPM and DDIM of diffusers clip, and only around 0"
    ]
    again = dkdm.load_teacher(str(tmp_path))
    assert again.value_range == (0.0, 1.0)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    x = torch.tensor([-0.5, 0.0, 0.25, 1.0, 2.0]).reshape(1, 1, 1, 5)
    assert pipeline._finished(x, "pt").flatten().tolist() == [0, 0, 0.25, 1, 1]
    latents = pipeline(num_inference_steps=2, output_type="latent").images
    assert latents.shape == (1, 1, 16, 16)


@pytest.mark.parametrize(
    "fields",
    [
        {"clipping": dkdm.Clipping(range=2.0), "spacing": "trailing"},
        {"clipping": dkdm.Clipping(range=1.5, quantile=0.9), "steps_offset": 1},
        {},
    ],
)
def test_what_a_process_does_is_saved_with_it(fields, tmp_path):
    """As diffusers reads it, and dkdm again."""
    process = dkdm.from_betas(BETAS, **fields)
    teacher = dkdm.Denoiser(ddpm, process, dkdm.Parameterization("epsilon"), (1, 16, 16))
    write_pipeline(tmp_path, student_of("unet-tiny", teacher))
    again = dkdm.load_teacher(str(tmp_path)).process
    for name in ("clipping", "spacing", "steps_offset"):
        assert getattr(again, name) == getattr(process, name)
    scheduler = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == process.timesteps(10)
    x, t = torch.randn(2, 1, 16, 16), scheduler.timesteps[1].expand(2)
    eps = torch.randn(2, 1, 16, 16)
    theirs = scheduler.step(eps, t[0], x).pred_original_sample
    x_0 = (x - process.at(t)[1][0] * eps) / process.at(t)[0][0]
    found = Prediction(eps, x_0, eps)
    alpha, sigma = process.at(t)
    ours = clip_x_0(found, x, alpha, sigma, process.clipping).x_0
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("title", ["EDM's D(x, sigma)", "A flow that predicts the clean sample"])
def test_a_student_of_another_output_than_its_scheduler_reads_samples_there(title, tmp_path):
    """The shipped scheduler draws what dkdm draws with the student."""
    teacher = replace(example(title, EXAMPLES[title]), sample_shape=(1, 16, 16))
    student = student_of("unet-tiny", teacher)
    torch.manual_seed(0)
    torch.nn.init.normal_(student.network.conv_out.weight, std=0.02)
    write_pipeline(tmp_path, student)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    theirs = pipeline(num_inference_steps=50, generator=random, output_type="latent").images
    start = torch.randn(1, 1, 16, 16, generator=random.manual_seed(0))
    ours = student.sample(lambda _: start, {}, 50)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameterization": dkdm.Parameterization("sample")}, "predicts sample is misread, by E"),
        ({"time": "sigma"}, "fed other times than its `time`, 'sigma', by EDMEulerScheduler"),
    ],
)
def test_a_given_student_that_its_scheduler_misreads_is_refused(changes, message):
    own = dkdm.Parameterization("edm")
    student = dkdm.Denoiser(torch.nn.Conv2d(3, 3, 1), dkdm.karras(50), own, SHAPE)
    student = replace(student, call=lambda network, x, time, cond: network(x), **changes)
    with pytest.raises(UsageError, match=message):
        given_student(student, student)
    given_student(replace(student, process=replace(student.process, scheduler={})), student)


def test_a_given_student_may_round_its_times():
    flow, own = dkdm.rectified_flow(50), dkdm.Parameterization("flow_prediction")
    student = dkdm.Denoiser(
        torch.nn.Conv2d(3, 3, 1), flow, own, SHAPE, call=lambda n, x, t, c: n(x)
    )
    given_student(replace(student, time=lambda process: (50 * process.sigma).float()), student)


def test_a_flow_on_betas_has_a_student_that_predicts_v():
    betas = zero_terminal_snr(BETAS.double())
    own = dkdm.Parameterization("flow_prediction")
    teacher = dkdm.Denoiser(ddpm, dkdm.from_betas(betas), own, SHAPE)
    assert with_process(teacher).parameterization.prediction == "v_prediction"


def test_a_range_of_latents_is_not_one_of_pictures(tmp_path):
    pipelines.ldm_kl().save_pretrained(tmp_path / "teacher")
    teacher = dkdm.load_teacher(str(tmp_path / "teacher"))
    write_pipeline(tmp_path / "run", replace(teacher, value_range=(-4.0, 4.0)))
    index = json.loads((tmp_path / "run" / "model_index.json").read_text())
    assert index["_class_name"] == "LDMPipeline"
    assert "_value_range" not in index


def test_without_a_range_pixels_are_the_samples():
    teacher = dkdm.Denoiser(edm, dkdm.karras(10), dkdm.Parameterization("sample"), SHAPE)
    x = torch.randn(2, *SHAPE)
    assert teacher.to_pixels(x) is x


def test_labels_may_have_another_name():
    """The document's labelled example: labels as `y`, drawn, guided and counted as any."""
    code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    last = next(i for i, block in enumerate(code) if "class Labelled" in block)
    code, names = code[: last + 1], {}
    for block in code:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    teacher, counts = counting(names["teacher"])
    t = torch.tensor([0, 999])
    labels = torch.tensor([3, 10])
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        guided = teacher.predict(Batch(x, t, {"class_labels": labels}, t), 2.0).output
        plain = teacher.network.layer(x)
    # The output is the plain one plus the label: u + 2 (c - u) adds 2c - 10.
    torch.testing.assert_close(guided - plain, per_sample(torch.tensor([-4.0, 10.0]), x) + 0 * x)
    assert sum(counts) == 4
