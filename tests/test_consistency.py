"""Consistency on pairs: against closed forms, mirrored times, runs, what ships, what is refused."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from torch import nn

import small_runs
import toy_networks
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization, from_x_0_eps
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas, karras, rectified_flow
from dkdm.core.diffusion.steps import reverse_step
from dkdm.core.few_steps import flag, mirror
from dkdm.core.few_steps.grid import grid_levels, grid_of
from dkdm.core.few_steps.jumps import Jumps
from dkdm.core.few_steps.pairs import Pairs, PairsObjective, averaged_network, pair_ends
from dkdm.core.few_steps.tasks import for_both_tasks, tasks_of
from dkdm.core.objectives.objective import Objective
from dkdm.core.saving.checkpoint import WEIGHTS
from dkdm.core.saving.progress import MetricsFile
from dkdm.core.shards import Shards
from dkdm.core.sources.chains import Stride
from dkdm.core.sources.fill import empty_pool, fill_few_step
from dkdm.errors import UsageError
from dkdm.evaluation.energy import energy_distance
from dkdm.models import load_teacher
from dkdm.shipping.graph.network import graph_network, random_inputs
from dkdm.students import student_of
from factories import denoiser

T, CPU = 40, torch.device("cpu")
MIXTURE = GaussianMixture.of([[-1.2, -0.4], [0.8, 1.0]], std=[0.3, 0.5], weights=[0.4, 0.6])
PROCESSES = {
    "ddpm": from_betas(beta_schedule("squaredcos_cap_v2", T)),
    "flow": rectified_flow(T),
}
KINDS = [
    ("ddpm", "epsilon"),
    ("ddpm", "v_prediction"),
    ("flow", "flow_prediction"),
    ("flow", "sample"),
]


class Both(nn.Module):
    """A network that is one function at its time and another at the mirrored time."""

    def __init__(self, process, direct, jump):
        super().__init__()
        self.process, self.direct, self.jump = process, direct, jump
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, time):
        t = (self.process.network_time.float() - time.abs().unsqueeze(1)).abs().argmin(1)
        back, said = torch.signbit(time).unsqueeze(1), self.direct(x.double(), t)
        return torch.where(back, self.jump(x.double(), t), said).to(x.dtype) + self.weight


def student_like(teacher, kind, jump_to):
    """A student that denoises as its teacher does, and whose jumps end at `jump_to`(x, t)."""
    process = teacher.process

    def output(x, t, x_0):
        alpha, sigma = process.at(t)
        eps = (x - per_sample(alpha, x) * x_0) / per_sample(sigma, x)
        return from_x_0_eps(kind, x_0, eps, alpha, sigma)

    def direct(x, t):
        return output(x, t, teacher.predict(Batch(x, t, {})).x_0.double())

    def jump(x, t):
        return output(x, t, jump_to(x, t))

    return Denoiser(Both(process, direct, jump), process, Parameterization(kind), (2,))


def ddim_to_the_end(teacher, x, t):
    """x_0 after DDIM steps through every level from t on."""
    x, t = x.clone(), t.clone()
    while bool((t >= 0).any()):
        at = (t >= 0).nonzero().flatten()
        said = teacher.predict(Batch(x[at], t[at], {}))
        kind = teacher.parameterization
        x[at] = reverse_step(
            teacher.process, kind, x[at], said, t[at], t[at] - 1, x[at], eta=0.0
        ).double()
        t[at] -= 1
    return x


def pairs_of(teacher, student, **laws):
    pool = empty_pool(teacher, 32, CPU, torch.float32, Shards(1), eta=0.0)
    fill_few_step(pool, 4, 16)
    averaged = averaged_network(student.network, 0.95, CPU)
    return Pairs(pool, teacher, student.network, averaged, **laws)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_perfect_student_has_no_loss(name, kind):
    """Where pairs are neighbouring levels, jumps are DDIM through all levels, exactly."""
    process = PROCESSES[name]
    teacher = mixture_denoiser(MIXTURE, process, Parameterization("sample"))
    perfect = student_like(teacher, kind, lambda x, t: ddim_to_the_end(teacher, x, t))
    source = pairs_of(teacher, perfect, length=1e-9)
    objective = PairsObjective(Objective(perfect, teacher), teacher, perfect)
    batch = source.draw(12)
    assert torch.equal(batch.s, batch.t - 1) and batch.t.tolist()[12:] == [T - 1] * 3
    target = source.target(batch)
    assert float(objective(perfect, batch, target).detach().max()) < 1e-6
    # one that jumps to what the teacher says at once is not perfect
    hasty = student_like(teacher, kind, lambda x, t: teacher.predict(Batch(x, t, {})).x_0.double())
    objective = PairsObjective(Objective(hasty, teacher), teacher, hasty)
    assert float(objective(hasty, batch, target).detach().mean()) > 1e-5


@pytest.mark.parametrize("name", PROCESSES)
def test_the_target_is_that_of_the_mean_velocity(name):
    """u* = (d / tau) v + (1 - d / tau) u(x_s, s), computed in flow coordinates."""
    process = PROCESSES[name]
    teacher = mixture_denoiser(MIXTURE, process, Parameterization("sample"))
    student = student_like(teacher, "sample", lambda x, t: torch.sin(3 * x) + t.unsqueeze(1) / T)
    source = pairs_of(teacher, student)
    batch = source.draw(16)
    target = source.target(batch)
    found = PairsObjective(Objective(student, teacher), teacher, student).end(batch, target)

    def flow(t):
        alpha, sigma = process.at(t)
        return (alpha + sigma).unsqueeze(1), (sigma / (alpha + sigma)).unsqueeze(1)

    (scale, tau), (scale_s, tau_s) = flow(batch.t), flow(batch.s)
    place, v = batch.x / scale, (target.eps - target.x_0).double()
    on = place + (tau_s - tau) * v
    ends = torch.sin(3 * on * scale_s) + batch.s.clamp(min=0).unsqueeze(1) / T
    mean = torch.where(batch.s.unsqueeze(1) < 0, 0, (on - ends) / tau_s.clamp(min=1e-9))
    share = (tau - tau_s) / tau
    wanted = share * v + (1 - share) * mean
    expected, said = place - tau * wanted, found.x_0.double()
    torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-3)
    velocity = (found.eps - found.x_0).double()
    torch.testing.assert_close(tau * velocity, tau * wanted, rtol=1e-3, atol=1e-3)


def test_pairs_are_as_far_apart_as_asked():
    process = from_betas(beta_schedule("squaredcos_cap_v2", 1000))
    share = process.sigma / (process.alpha + process.sigma)
    t, length = torch.tensor([999, 600, 300, 40, 0]), torch.tensor([0.1, 0.05, 0.15, 0.2, 0.1])
    s = pair_ends(process, t, length.double())
    assert s.tolist()[3:] == [-1, -1] and bool((s < t).all())
    apart = (share[t] - share[s])[:3]
    torch.testing.assert_close(apart, length[:3].double(), rtol=0, atol=1e-3)


def test_a_batch_has_more_pure_noise_which_is_counted():
    teacher = denoiser()
    student = student_of("dit-tiny", teacher)
    source = pairs_of(teacher, student, start_share=0.25)
    before = source.evaluations
    batch = source.draw(8)
    target = source.target(batch)
    assert len(batch.t) == len(target.x_0) == 10 and source.evaluations == before + 10
    inner = source.inner.x.clone()
    with torch.no_grad():
        student.network.proj_out_2.bias.add_(1)
    source.advance(batch, target)
    assert not torch.equal(inner, source.inner.x)
    averaged = source.averaged.module.proj_out_2.bias
    assert torch.equal(averaged, student.network.proj_out_2.bias)  # the first counts alone
    with torch.no_grad():
        student.network.proj_out_2.bias.add_(1)
    source.advance(batch, target)
    torch.testing.assert_close(averaged, student.network.proj_out_2.bias - 0.95)


def shaken(model):
    """The same with weights that all matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    model.network.eval()
    return model


def answer(model, t):
    random = torch.Generator().manual_seed(int(t))
    x = torch.randn(3, *model.sample_shape, generator=random)
    cond = model.conditioning.draw(3, random)
    with torch.no_grad():
        return model.predict(Batch(x, torch.full((3,), t % 50), cond)).output


MIRRORED = ["unet-mini", "dit-tiny", "linear-tiny", "mobile-tiny"]


@pytest.mark.parametrize("spec", MIRRORED)
def test_a_mirrored_network_answers_as_the_other_at_the_mirrored_time(spec):
    model = shaken(student_of(spec, denoiser()))
    assert mirror.can_mirror(model)
    both = mirror.both(model)
    other = Denoiser(
        mirror.jumping(model),
        model.process,
        model.parameterization,
        model.sample_shape,
        model.conditioning,
        model.constants,
    )
    for t in (49, 20, 3):
        random = torch.Generator().manual_seed(t)
        x, cond = torch.randn(3, 1, 8, 8, generator=random), model.conditioning.draw(3, random)
        with torch.no_grad():
            then = both.predict(Batch(x, torch.full((3,), t + 50), cond)).output
            now = other.predict(Batch(x, torch.full((3,), t), cond)).output
            plain = model.predict(Batch(x, torch.full((3,), t), cond)).output
        assert float((now - then).abs().max()) == 0.0
        assert not torch.allclose(now, plain, atol=1e-3)


def test_every_embedding_of_a_transformer_is_mirrored():
    """The DiT of diffusers embeds the time in each of its blocks and at its end."""
    model = shaken(student_of("dit-tiny", denoiser()))
    assert isinstance(model.network, DiTTransformer2DModel)
    now, other = model.network.state_dict(), mirror.jumping(model).state_dict()
    changed = [key for key in now if not torch.equal(now[key], other[key])]
    embedders = [key for key in now if key.endswith("timestep_embedder.linear_1.weight")]
    assert changed == embedders and len(embedders) > 1
    again = mirror.denoising(
        Denoiser(
            mirror.jumping(model),
            model.process,
            model.parameterization,
            model.sample_shape,
            model.conditioning,
            model.constants,
        )
    )
    assert all(torch.equal(now[key], value) for key, value in again.state_dict().items())


class Raw(nn.Module):
    """A network that is fed its time as a number."""

    def __init__(self, bias=True):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=bias)

    def forward(self, x, t, class_labels=None):
        time = (t / 50 + class_labels)[:, None, None, None]
        both = torch.stack([x, time.expand(x.shape)], -1)
        return self.layer(both).squeeze(-1)


class Table(nn.Module):
    """A network with a table of times, and without any bias."""

    def __init__(self):
        super().__init__()
        self.times, self.layer = nn.Embedding(50, 8), nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.last = nn.Conv2d(8, 1, 1, bias=False)

    def forward(self, x, t, class_labels=None):
        del class_labels
        hidden = self.layer(x) + self.times(t.long())[:, :, None, None]
        return self.last(torch.tanh(hidden))


def flagged(model):
    """A model whose network has the flag, with shifts that are not 0 any more."""
    found = flag.with_flag(model)
    assert found is not None
    for layer in found.modules():
        if hasattr(layer, flag.SHIFT):
            torch.nn.init.normal_(getattr(layer, flag.SHIFT))
    return replace(model, network=found)


def layers_with(name, network):
    return [key for key, layer in network.named_modules() if hasattr(layer, name)]


OWN = {"raw": Raw, "table": Table}
WITH_FLAG = {  # parts of the names of the layers that have it
    "dit-tiny": ["timestep_embedder", "norm1.linear", "proj_out_1"],
    "uvit-tiny": ["embed"],
    "raw": ["layer"],
    "table": ["times"],
}


@pytest.mark.parametrize("spec", WITH_FLAG)
def test_a_flag_is_a_shift_that_goes_into_the_biases(spec):
    teacher = denoiser()
    student = replace(teacher, network=OWN[spec]()) if spec in OWN else student_of(spec, teacher)
    model = flagged(shaken(student))
    names = layers_with(flag.SHIFT, model.network)
    assert names and all(any(part in name for part in WITH_FLAG[spec]) for name in names)
    both, t = flag.both(model), torch.tensor([49, 3, 20, 49, 3, 20])
    random = torch.Generator().manual_seed(0)
    x, cond = torch.randn(6, 1, 8, 8, generator=random), model.conditioning.draw(6, random)
    jumps = replace(model, network=flag.jumping(model))
    bare = replace(model, network=flag.denoising(jumps))
    before, after = model.network.state_dict(), bare.network.state_dict()
    shifts = before.keys() - after.keys()
    assert {key.rpartition(".")[0] for key in shifts} == set(names)
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert after.keys() == jumps.network.state_dict().keys()
    with torch.no_grad():
        told = both.predict(Batch(x, t + torch.tensor([50, 0]).repeat(3), cond)).output
        jump, direct = (one.predict(Batch(x, t, cond)).output for one in (jumps, bare))
        usual = model.predict(Batch(x, t, cond)).output
    torch.testing.assert_close(told[::2], jump[::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told[1::2], direct[1::2], rtol=1e-4, atol=1e-5)
    assert torch.equal(usual, direct) and not torch.allclose(jump, direct, atol=1e-3)


def test_the_mirror_is_chosen_where_it_can_be():
    """The other networks have the flag."""
    model = student_of("dit-tiny", denoiser())
    assert for_both_tasks(model, model) is model and tasks_of(model) is mirror
    raw = replace(denoiser(), network=Raw())
    assert tasks_of(raw) is mirror and tasks_of(for_both_tasks(raw, raw)) is flag
    flow, kind = rectified_flow(200), Parameterization("flow_prediction")
    assert not mirror.can_mirror(Denoiser(toy_networks.Mlp(4), flow, kind, (4,)))  # is periodic
    of_numbers = mixture_denoiser(MIXTURE, karras(20), Parameterization("edm"))
    assert not mirror.can_mirror(of_numbers)  # the logarithm of sigma is below 0 too


def test_a_network_without_a_bias_is_refused(tmp_path):
    with pytest.raises(UsageError, match="Raw: .* give such a layer a bias, or use"):
        small_runs.run(tmp_path, student=Raw(bias=False), **FEW)
    assert not list(tmp_path.iterdir())


FEW = {
    "objective": "consistency",
    "student_steps": "1:4",
    "max_train_steps": 8,
    "few_step_share": 0.5,
    "eta": 0.0,
    "evaluation_samples": 0,
    "checkpointing_steps": 2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consistency")
    return small_runs.run(folder, **FEW | {"evaluation_samples": 4})[0]


def manifest(folder, step):
    """Hashes of a checkpoint's files, but for the one that names the run's folders."""
    found = json.loads((folder / f"checkpoint-{step}" / "manifest.json").read_text())
    return {name: entry for name, entry in found.items() if name != "run.json"}


def test_the_last_part_goes_on_with_the_pool_of_the_first(finished):
    first, last = manifest(finished / "plain", 4), manifest(finished, 4)
    shards = [name for name in first if name.startswith("source/shard")]
    assert shards and set(last) >= {*shards, "source/pairs.safetensors"}
    assert "source/averaged.safetensors" in last
    config = json.loads((finished / "config.json").read_text())
    assert config["fill"] == "none"
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    counted = json.loads(lines[0])["teacher_evaluations"]
    assert 10 <= counted <= 18  # a batch of 8, 2 at T-1, and chains that begin anew: no filling


def drawn(model, steps, generator):
    def noise(_):
        return torch.randn(2, 1, 8, 8, generator=generator)

    return model.sample(noise, model.conditioning.of([0, 1]), steps)


def test_a_run_ships_jumps_and_the_same_weights_for_many_steps(finished):
    few, many = load_teacher(finished), load_teacher(finished / "many-steps")
    assert isinstance(few, Jumps) and few.intervals.steps == (1, 2, 4)
    assert type(many) is Denoiser
    jump, both = answer(few, 30), mirror.both(many)
    random = torch.Generator().manual_seed(30)
    x, cond = torch.randn(3, 1, 8, 8, generator=random), many.conditioning.draw(3, random)
    with torch.no_grad():
        then = both.predict(Batch(x, torch.full((3,), 80), cond)).output
    assert float((jump - then).abs().max()) == 0.0
    table = json.loads((finished / "few_steps.json").read_text())
    found = {(row["model"], row["num_steps"]) for row in table["rows"]}
    assert {("student", 1), ("student", 4), ("student, many steps", 25)} <= found
    assert ("student", 25) not in found and ("plain student", 25) in found


def test_diffusers_jumps_and_noises_again_as_dkdm_does(finished):
    with warnings.catch_warnings(action="ignore"):
        pipeline = DiffusionPipeline.from_pretrained(finished, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    model = load_teacher(finished)
    for steps in (1, 2, 4):
        images = pipeline(
            class_labels=[0, 1],
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(steps),
            output_type="latent",
        ).images
        expected = drawn(model, steps, torch.Generator().manual_seed(steps))
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guidance_scale must be 1"):
        pipeline(class_labels=[0], guidance_scale=2.0)


def test_a_jump_is_written_as_a_graph(finished):
    model = load_teacher(finished)
    inputs = random_inputs(model, 2)
    found = graph_network(model, inputs)(**inputs)
    cond = {"class_labels": inputs["class_labels"]}
    expected = model.sample(lambda _: inputs["noise"], cond, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class KilledError(Exception):
    """In place of a kill."""


def students_of_runs(kind):
    """The student of a small run; a U-ViT, whose time is a token, has the flag."""
    return student_of(kind, denoiser()) if kind else None


@pytest.fixture(scope="module")
def flagged_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flagged")
    return small_runs.run(folder, student=students_of_runs("uvit-tiny"), **FEW)[0]


@pytest.mark.parametrize(("kind", "usual"), [("", "finished"), ("uvit-tiny", "flagged_run")])
def test_a_run_killed_in_the_last_part_resumes_bit_by_bit(
    kind, usual, request, tmp_path, monkeypatch
):
    write, finished = MetricsFile.write, request.getfixturevalue(usual)

    def write_and_die(self, entry):
        write(self, entry)
        if self.path.parent.name == "run" and entry["step"] == 3:
            raise KilledError

    monkeypatch.setattr(MetricsFile, "write", write_and_die)
    with pytest.raises(KilledError):
        small_runs.run(tmp_path, student=students_of_runs(kind), **FEW)
    monkeypatch.undo()
    more = FEW | {"resume_from_checkpoint": "latest"}
    folder, *_ = small_runs.run(tmp_path, student=students_of_runs(kind), **more)
    assert manifest(folder, 4) == manifest(finished, 4)


def test_a_student_with_a_flag_ships_two_ordinary_networks(flagged_run):
    """They differ in one bias, and diffusers reads both."""
    few, many = load_teacher(flagged_run), load_teacher(flagged_run / "many-steps")
    assert isinstance(few, Jumps) and type(many) is Denoiser
    one, other = few.network.state_dict(), many.network.state_dict()
    assert [key for key in one if not torch.equal(one[key], other[key])] == ["embed.bias"]
    weights = flagged_run / "checkpoint-4" / "unet_ema" / WEIGHTS
    averaged = load_file(weights)
    shift = averaged.pop(f"embed.{flag.SHIFT}")
    assert shift.abs().min() > 0 and averaged.keys() == one.keys()
    assert all(torch.equal(averaged[key], value) for key, value in other.items())
    assert torch.equal(one["embed.bias"], other["embed.bias"] + shift)
    with warnings.catch_warnings(action="ignore"):
        pipeline = DiffusionPipeline.from_pretrained(flagged_run, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        class_labels=[0, 1],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    expected = drawn(few, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_a_student_of_another_process_jumps_on_its_own_levels(tmp_path):
    folder, *_ = small_runs.run(
        tmp_path, student="dit-tiny", **FEW | {"max_train_steps": 2, "student_process": "flow"}
    )
    model, many = load_teacher(folder), load_teacher(folder / "many-steps")
    grid = model.intervals
    torch.testing.assert_close(grid.scale, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(grid.time, 1000 * grid.tau[:-1], rtol=0, atol=1.0)
    assert many.process.scheduler["_class_name"].startswith("FlowMatch")
    assert drawn(model, 4, torch.Generator().manual_seed(0)).isfinite().all()


@pytest.mark.slow
def test_a_learned_variance_stays_and_does_not_matter_in_few_steps(tmp_path):
    teacher = denoiser(scheduler={"variance_type": "learned_range"}, out_channels=2)
    folder, *_ = small_runs.run(tmp_path, teacher, **FEW | {"max_train_steps": 2})
    model = load_teacher(folder)
    assert model.parameterization.learns_variance
    inputs = random_inputs(model, 2)
    found = graph_network(model, inputs)(**inputs)
    cond = {"class_labels": inputs["class_labels"]}
    torch.testing.assert_close(found, model.sample(lambda _: inputs["noise"], cond, 1))


REFUSED = [
    ({"eta": 1.0}, "--eta 1: .* not on one trajectory: give --eta 0"),
    ({"source": "synthetic"}, "--objective consistency: --source synthetic has no states"),
    ({"guidance_on": "chain", "guidance_scale": "2"}, "--guidance-on chain"),
    ({"lora_rank": 2, "student_init": "teacher"}, "--lora-rank"),
    ({"more_teachers": ("builtin:fashion",)}, "takes one --teacher"),
    ({"student_steps": "9997,9998,9999"}, "--student-steps .* 50 levels .* give fewer steps"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_pairs_cannot_be_learnt_with_is_refused_before_work(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        small_runs.run(tmp_path, **FEW | changes)
    assert not list(tmp_path.iterdir())


def test_samples_are_drawn_in_the_steps_of_the_grid_alone():
    teacher = denoiser()
    levels = grid_levels(teacher.process, 4)
    model = Jumps.of(teacher, grid_of(teacher, teacher.process, levels, (1, 4)))
    with pytest.raises(UsageError, match="3 sampling steps"):
        drawn(model, 3, torch.Generator())
    assert drawn(model, 4, torch.Generator().manual_seed(0)).isfinite().all()


class Number(toy_networks.Mlp):
    """A network of points that is fed its time as a number, which is not 0 at the data."""

    def forward(self, x, time):
        return self.layers(torch.cat([x, (time / 1000 - 0.5).unsqueeze(1).expand(-1, 16)], 1))


@pytest.mark.slow
@pytest.mark.parametrize(("made", "tasks"), [(toy_networks.Mlp, mirror), (Number, flag)])
def test_one_step_is_far_better_than_the_plain_students_and_many_steps_stay(made, tasks):
    """Energy distances to a mixture, at as many optimizer steps; half of them are plain."""
    random = torch.Generator().manual_seed(0)
    means = 1.3 * torch.randn(8, 4, generator=random, dtype=torch.float64)
    mixture, process = GaussianMixture.of(means, std=0.25), rectified_flow(200)
    kind = Parameterization("flow_prediction")
    teacher = mixture_denoiser(mixture, process, kind)
    levels = grid_levels(process, 8)
    grid = grid_of(teacher, process, levels, (1, 2, 4, 8))

    def pool():
        made = empty_pool(
            teacher, 4096, CPU, torch.float32, Shards(1), stride=Stride(1, 39), eta=0.0
        )
        fill_few_step(made, 8, 1024)
        return made

    torch.manual_seed(0)
    student = Denoiser(made(4, period=500), process, kind, (4,))
    student = for_both_tasks(student, student)
    assert tasks_of(student) is tasks
    plain = Objective(student, teacher)
    toy_networks.trained(pool(), student, plain, 1500)
    averaged = averaged_network(student.network, 0.95, CPU)
    source = Pairs(pool(), teacher, student.network, averaged)
    led = Denoiser(averaged.module, process, kind, (4,))
    toy_networks.trained(source, student, PairsObjective(plain, teacher, led), 1500)
    jumps = Jumps.of(Denoiser(tasks.jumping(student), process, kind, (4,)), grid)
    real = mixture.sample(4000, random)

    def distance(model, steps):
        noise = torch.Generator().manual_seed(1)

        def drawn(_):
            return torch.randn(4000, 4, generator=noise)

        return energy_distance(model.sample(drawn, {}, steps), real).distance

    found = {steps: distance(jumps, steps) for steps in (1, 2, 4)}
    many = {steps: distance(student, steps) for steps in (1, 16)}
    assert found[1] < many[1] / 20 and found[4] < many[1] / 20
    assert many[16] < found[1]
