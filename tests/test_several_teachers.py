"""Several teachers of one student: each answers for its own conditions, at its own levels."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

import dkdm
import programs
from dkdm.cli import main, repeated
from dkdm.config import LossOptions
from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.matching import level_weights, on_levels_of
from dkdm.core.denoisers.teachers import Teachers, common_levels, parts_of, pattern_of
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.process import Process
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.core.objectives.objective import Objective
from dkdm.core.saving import checkpoint
from dkdm.core.sources.several import shared_out
from dkdm.errors import UsageError
from dkdm.evaluation.fingerprint import fingerprint
from dkdm.models import load_teacher
from dkdm.models.components import Autoencoder, Component
from dkdm.models.prompts import with_prompts
from dkdm.runs.config_file import code_named_in
from dkdm.runs.earlier import teacher_of
from dkdm.runs.objective import objective_of
from dkdm.runs.side_by_side import side_by_side
from dkdm.runs.teachers import (
    arm_of,
    make_source,
    opened_teachers,
    prepare_source,
    ready_teachers,
    shared_classes,
)
from factories import denoiser
from small_runs import SMALL
from test_prompts import Encoders
from toy_runs import toy

CPU = torch.device("cpu")
TESTS = Path(__file__).parent
FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 40,
    "prediction_type": "flow_prediction",
}
EPSILON = {"prediction_type": "epsilon"}


def first():
    """Two classes, on a DDPM process, which predicts eps and clips x_0."""
    labels = ClassLabels(2, null_class=2, names=("shirt", "coat"))
    return replace(denoiser(2, scheduler=EPSILON), name="clothes", conditioning=labels)


def second():
    """Three classes, on a flow."""
    return replace(denoiser(3, scheduler=FLOW, seed=1), name="shoes")


def both(**changes):
    return side_by_side([first(), second()], **changes)


def rows(teacher, labels):
    cond = teacher.conditioning.of(labels)
    random = torch.Generator().manual_seed(5)
    x = torch.randn(len(labels), *teacher.sample_shape, generator=random)
    return x, cond


def test_classes_stand_side_by_side_under_their_names():
    labels = both().conditioning
    assert (labels.num_classes, labels.null_class) == (5, 5)
    assert labels.names == ("shirt", "coat", "shoes 0", "shoes 1", "shoes 2")
    assert labels.drawn == (0, 1, 2, 3, 4)


def test_offsets_put_classes_apart_or_into_one_place():
    apart = both(offsets=[4, 0]).conditioning
    assert apart.drawn == (0, 1, 2, 4, 5)
    assert apart.names[3:] == ("class 3", "shirt", "coat")
    shared = both(offsets=[0, 0])
    assert shared_classes(shared) == [
        "class 0 (shirt or shoes 0) has 2 of 2 teachers",
        "class 1 (coat or shoes 1) has 2 of 2 teachers",
    ]
    assert shared.conditioning.names == ("shirt or shoes 0", "coat or shoes 1", "shoes 2")
    x, cond = rows(shared, [0, 2])
    t = torch.tensor([10, 10])
    found = shared.predict(Batch(x, t, cond))  # class 0 by the first that has it, 2 by the other
    wanted = shared.members[0].predict(Batch(x[:1], t[:1], {"class_labels": torch.tensor([0])}))
    torch.testing.assert_close(found.x_0[:1], wanted.x_0)


def test_a_teacher_without_conditions_is_a_class_and_no_class_is_one_of_all():
    blank = replace(denoiser(None), name="runs/plain", conditioning=Unconditional())
    absent = replace(second(), conditioning=ClassLabels(3, "absent"))
    teachers = side_by_side([absent, blank])
    assert teachers.conditioning.names == ("shoes 0", "shoes 1", "shoes 2", "plain")
    assert teachers.conditioning.null_class == 4
    places = teachers.places
    own = {"class_labels": torch.tensor([2, -1])}
    assert places[0].to_all(own, 2)["class_labels"].tolist() == [2, 4]
    assert places[0].to_own({"class_labels": torch.tensor([2, 4])})["class_labels"].tolist() == [
        2,
        -1,
    ]
    assert places[1].to_all({}, 3)["class_labels"].tolist() == [3, 3, 3]
    assert places[1].to_own({"class_labels": torch.tensor([3])}) == {}
    neither = [replace(one, conditioning=Unconditional()) for one in (blank, blank)]
    assert side_by_side(neither).conditioning.null_class is None


def test_levels_of_all_lie_on_one_axis_by_their_noise():
    processes = [first().process, second().process]
    levels = common_levels(processes)
    ratio = levels.process.sigma / levels.process.alpha
    assert bool((ratio.diff() >= 0).all())
    for process, at in zip(processes, levels.positions, strict=True):
        assert torch.equal(levels.process.alpha[at], process.alpha)
        assert torch.equal(levels.process.sigma[at], process.sigma)
    assert torch.cat(levels.positions).sort().values.tolist() == list(range(90))
    table = levels.spread([torch.arange(50.0), None])
    assert torch.equal(table[levels.positions[0]], torch.arange(50, dtype=torch.float64))
    assert bool((table[levels.positions[1]] == 1).all())


def test_each_row_is_evaluated_by_its_teacher_at_the_same_ratio():
    teachers = both()
    x, cond = rows(teachers, [3, 0, 4, 1])
    t = torch.tensor([5, 20, 30, 40])
    found = teachers.predict(Batch(x, t, cond), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    alone = on_levels_of(teachers.members[1], teachers.process)
    for model, these, labels, scale in [
        (teachers.members[0], [1, 3], [0, 1], [2.0, 4.0]),
        (alone, [0, 2], [1, 2], [1.0, 3.0]),
    ]:
        own = {"class_labels": torch.tensor(labels)}
        wanted = model.predict(Batch(x[these], t[these], own), torch.tensor(scale))
        torch.testing.assert_close(found.x_0[these], wanted.x_0)
        torch.testing.assert_close(found.eps[these], wanted.eps)
    assert torch.equal(found.output, found.eps)  # as an output of the first, which predicts eps


def test_each_sample_is_drawn_by_its_teacher_on_its_own_levels():
    teachers = both()
    noises, cond = rows(teachers, [4, 0, 2])
    drawn = teachers.sample(lambda _: noises, cond, 4)
    own = [({"class_labels": torch.tensor([2, 0])}, [0, 2], 1)]
    own += [({"class_labels": torch.tensor([0])}, [1], 0)]
    for condition, these, number in own:
        some = noises[these]
        wanted = teachers.members[number].sample(lambda _, some=some: some, condition, 4)
        torch.testing.assert_close(drawn[these], wanted)
    with pytest.raises(UsageError, match="no teacher knows"):
        both(offsets=[4, 0]).sample(lambda _: noises, {"class_labels": torch.full((3,), 3)}, 4)


def several(tmp_path, teachers=None, student=None, **changes):
    teachers = teachers or [first(), second()]
    given = {"output_dir": tmp_path, "stride": "random:8", "condition_dropout": 0.2, "eta": 1.0}
    config = replace(SMALL, **(given | changes))
    teacher = ready_teachers(teachers, config)
    found = make_source(teacher, student or pattern_of(teacher), config, CPU)
    prepare_source(found, teacher, config)
    return teacher, found, config


def test_every_pool_moves_as_it_does_alone(tmp_path):
    _, found, config = several(tmp_path, train_batch_size=10, pool_size=30)
    assert [len(share.source.t) for share in found.shares] == [12, 18]
    small = replace(config, train_batch_size=4, pool_size=12)
    alone = make_source(first(), first(), small, CPU)
    prepare_source(alone, first(), small)
    for _ in range(3):
        batch, one = found.draw(10), alone.draw(4)
        assert torch.equal(batch.x[:4], one.x)
        found.advance(batch, found.target(batch))
        alone.advance(one, alone.target(one))
    pool = found.shares[0].source
    assert torch.equal(pool.x, alone.x) and torch.equal(pool.t, alone.t)
    other = found.shares[1].source
    assert not torch.equal(other.x[:12], pool.x)  # random numbers of its own
    assert found.evaluations == alone.evaluations + other.evaluations


@pytest.mark.parametrize("weighting", ["uniform", "capped"])
def test_the_loss_is_that_of_each_teacher_alone(tmp_path, weighting):
    student = denoiser(5, scheduler={"num_train_timesteps": 70}, seed=2)  # predicts v
    teacher, found, _ = several(tmp_path, None, student, train_batch_size=10, pool_size=30)
    loss = LossOptions(loss_weighting=weighting)
    seen = on_levels_of(student, found.process)
    teaching = arm_of(teacher, SMALL).teaching(SMALL.images_choice)
    objective = objective_of(student, seen, teacher, loss, None, teaching)
    batch = found.draw(10)
    together = objective(seen, batch, found.target(batch))
    parts = []
    for share, one, part in zip(found.shares, parts_of(teacher), batch.rows, strict=True):
        alone = on_levels_of(student, one.process)
        of_one = Objective(alone, one, loss, level_weights(student, one, weighting))
        cond = share.place.to_all(part.cond, len(part.t))
        parts.append(of_one(alone, part._replace(cond=cond), share.source.target(part)))
    torch.testing.assert_close(together, torch.cat(parts))
    assert bool((batch.s < batch.t).all())


def test_a_perfect_student_of_both_has_no_loss(tmp_path):
    means, std = [[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]], [0.2, 0.3, 0.4]
    process = from_betas(beta_schedule("squaredcos_cap_v2", 50))
    total = process.alpha + process.sigma
    flow = Process(process.alpha / total, process.sigma / total, process.network_time)
    law = GaussianMixture.of
    student = mixture_denoiser(
        law(means, std, classes=[0, 1, 2]), process, Parameterization("v_prediction")
    )
    teachers = [
        mixture_denoiser(law(means[:2], std[:2], classes=[0, 1]), flow, Parameterization("sample")),
        mixture_denoiser(law(means[2:], std[2:], classes=[0]), process, Parameterization("edm")),
    ]
    _, found, _ = several(tmp_path, teachers, condition_dropout=0.0)
    teacher = side_by_side(teachers)
    seen = on_levels_of(student, found.process)
    teaching = arm_of(teacher, SMALL).teaching(SMALL.images_choice)
    objective = objective_of(student, seen, teacher, LossOptions(), None, teaching)
    batch = found.draw(8)
    target = found.target(batch)
    assert float(objective(seen, batch, target).max()) < 1e-6
    others = batch._replace(cond={"class_labels": (batch.cond["class_labels"] + 1) % 3})
    assert float(objective(seen, others, target).mean()) > 1e-2


def test_a_batch_is_shared_out_in_proportion():
    assert shared_out(10, [2, 3]) == [4, 6]
    assert shared_out(128, [5, 5]) == [64, 64]
    assert shared_out(7, [1, 1, 1]) == [3, 2, 2]
    assert shared_out(4, [1000, 1]) == [3, 1]
    with pytest.raises(UsageError, match="--train-batch-size 1 is smaller"):
        shared_out(1, [1, 1])


def test_classes_and_weights_reach_the_teacher_that_has_them(tmp_path):
    chosen = {"classes": (4, 1, 2), "class_weights": (1, 6, 1)}
    teacher, found, _ = several(tmp_path, train_batch_size=8, pool_size=24, **chosen)
    kinds = [one.conditioning for one in parts_of(teacher)]
    assert [kind.classes for kind in kinds] == [(1,), (2, 0)]
    assert found.counts == [6, 2]
    assert teacher.conditioning.drawn == (1, 2, 4)
    for wrong, said in [((0, 7), "class id 7 is of no teacher"), ((0,), "shoes has none")]:
        with pytest.raises(UsageError, match=said):
            several(tmp_path, classes=wrong)


@pytest.mark.parametrize("source", ["shuffled", "iterative"])
def test_other_pools_are_shared_out_too(tmp_path, source):
    given = {"train_batch_size": 5, "pool_size": None, "source": source, "fill": "none"}
    teacher, found, config = several(tmp_path, **given)
    batch = found.draw(5)
    found.advance(batch, found.target(batch))
    assert arm_of(teacher, config).plan(teacher, config).entries == 5
    assert [len(share.source.t) for share in found.shares] == [2, 3]


def test_what_one_of_them_cannot_do_is_said_with_its_name(tmp_path):
    blank = replace(denoiser(None), name="plain")
    with pytest.raises(UsageError, match="plain: guidance and condition dropout need"):
        several(tmp_path, [first(), blank])


def test_all_that_differs_is_said_at_once():
    other = toy((2, 64))
    ranged = replace(second(), name="ranged", value_range=(0.0, 1.0))
    with pytest.raises(UsageError) as refused:
        side_by_side([first(), replace(other, name="sound"), ranged])
    said = str(refused.value)
    assert "clothes and sound: samples of shape (1, 8, 8) and (2, 64)" in said
    assert "clothes and ranged: values in (-1.0, 1.0) and (0.0, 1.0)" in said
    assert "\n" not in said


class Halved(Encoders):
    """Text encoders that answer otherwise."""

    def encode(self, texts):
        return {key: rows / 2 for key, rows in super().encode(texts).items()}


def text_teacher(name, texts, tmp_path, fingerprint="abc", encoders=Encoders):
    prompts = encoders().conditioning(fingerprint)
    conditioning = with_prompts(prompts, texts, root=tmp_path)
    return replace(first(), name=name, conditioning=conditioning)


def test_prompts_are_of_the_teacher_whose_file_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path))
    teachers = [
        text_teacher("a", ("cat", "dog"), tmp_path),
        text_teacher("b", ("car", "dog", "bus"), tmp_path),
    ]
    united = side_by_side(teachers)
    assert united.conditioning.texts == ("cat", "dog", "car", "bus")
    one, two = united.places
    assert two.to_all({"prompt": torch.tensor([0, 1, 2, 3])}, 4)["prompt"].tolist() == [0, 3, 2, 4]
    assert one.knows({"prompt": torch.arange(5)}).tolist() == [True, True, True, False, False]
    some = with_prompts(united.conditioning, ("bus", "cat"), root=tmp_path)
    fewer = replace(united, conditioning=some).places
    assert fewer[1].to_own({"prompt": torch.tensor([1])})["prompt"].tolist() == [3]
    assert [place.own.tolist() for place in fewer] == [[0, -2, 1], [0, 3, -2]]
    with pytest.raises(UsageError, match="the prompt 'x' is of none"):
        replace(united, conditioning=with_prompts(united.conditioning, ("x",), root=tmp_path))
    with pytest.raises(UsageError, match="text encoders abc and prompts through text encoders x"):
        side_by_side([teachers[0], text_teacher("c", ("cat",), tmp_path, "x", Halved)])
    copied = text_teacher("d", ("cow",), tmp_path, "the same in other files")
    assert side_by_side([teachers[0], copied]).conditioning.texts == ("cat", "dog", "cow")
    with pytest.raises(UsageError, match="and classes"):
        side_by_side([teachers[0], second()])


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("--teacher a --seed 1", "--teacher a --seed 1"),
        ("--teacher a --teacher b", "--teacher a --more-teachers b"),
        ("--teacher=a --seed 1 --teacher=b", "--teacher=a --seed 1 --more-teachers b"),
        ("--teacher a --teacher=b --teacher c", "--teacher a --more-teachers b c"),
        ("--prompts p --prompts q --teacher a", "--prompts p --teacher a --more-prompts q"),
    ],
)
def test_repeated_options_name_several(given, read):
    assert repeated(given.split()) == read.split()


@pytest.mark.parametrize("given", ["--teacher a --teacher", "--teacher a --teacher --student b"])
def test_a_repeated_option_without_a_value_is_refused(given):
    with pytest.raises(UsageError, match="--teacher was given without a value"):
        repeated(given.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_offset": (0, 5)}, "--label-offset 0 5: give a number for each"),
        ({"more_teachers": ("b",), "teacher_share": (1,)}, "--teacher-share 1"),
        ({"more_teachers": ("b",), "more_prompts": ("p", "q")}, "3 files for 2 teachers"),
    ],
)
def test_numbers_that_do_not_fit_the_teachers_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        opened_teachers(dkdm.DistillConfig(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "synthetic"}, "--source synthetic takes one teacher"),
        ({"keep_finished": 4}, "--keep-finished takes one teacher"),
        ({"feature_weight": 1.0}, "--feature-weight"),
    ],
)
def test_what_needs_one_teacher_is_refused_before_the_run(options, said, tmp_path):
    config = replace(SMALL, output_dir=tmp_path / "run", **options)
    with pytest.raises(UsageError, match=said):
        dkdm.distill([first(), second()], "dit-tiny", config)
    assert not (tmp_path / "run").exists()


def test_a_file_may_not_name_code_among_more_teachers():
    config = dkdm.DistillConfig(teacher="runs/a", more_teachers=("evil:make", "runs/b"))
    assert list(code_named_in(config)) == [("more_teachers", "evil:make")]


def clothes():
    return first()


def shoes():
    return second()


STEPS = 5


def command(folder, *more):
    return [
        *("distill", "--output-dir", str(folder), "--student", "factories:student_of_five"),
        *("--teacher", "test_several_teachers:clothes"),
        *("--teacher", "test_several_teachers:shoes"),
        *("--max-train-steps", str(STEPS), "--train-batch-size", "10", "--pool-size", "30"),
        *("--stride", "random:6", "--fill-steps", "2", "--checkpointing-steps", "2"),
        *("--logging-steps", "1", "--evaluation-samples", "10", "--validation-steps", "0"),
        *("--validation-sampling-steps", "2", "--checkpoints-total-limit", "9", "--replay", "2"),
        *("--condition-dropout", "0.2", "--no-check", "--report-to", "none", *more),
    ]


KILLED = """
import os, signal, sys
from dkdm.cli import main
from dkdm.core.saving.progress import MetricsFile
write = MetricsFile.write
def write_and_die(self, entry):
    write(self, entry)
    if entry["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.write = write_and_die
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(folder)) == 0
    return folder


def test_a_killed_run_goes_on_exactly(whole, tmp_path):
    folder = tmp_path / "run"
    done = programs.run(KILLED, *command(folder), path=TESTS, absent=())
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(command(folder, "--resume-from-checkpoint", "latest")) == 0
    manifests = [
        json.loads((run / f"checkpoint-{STEPS}" / "manifest.json").read_text())
        for run in (folder, whole)
    ]
    assert manifests[0] == manifests[1]
    parts = {"source/teacher-0/shard-0.safetensors", "source/teacher-1/replay.safetensors"}
    assert parts <= manifests[0].keys()
    assert main(command(folder, "--resume-from-checkpoint", "latest", "--teacher-share", "1", "1"))


def test_more_steps_do_not_change_the_sizes_of_pools_that_were_left_open(tmp_path):
    def run(steps, *more):
        given = command(tmp_path / "run", "--evaluation-samples", "0", "--rho", "9", *more)
        at = given.index("--pool-size")
        return main([*given[:at], *given[at + 2 :], "--max-train-steps", str(steps)])

    def sizes():
        newest = checkpoint.newest(tmp_path / "run")
        parts = [newest / f"source/teacher-{i}/shard-0.safetensors" for i in (0, 1)]
        return [int(checkpoint.read_tensors(part)["size"]) for part in parts]

    assert run(2) == 0
    before = sizes()
    assert run(4, "--resume-from-checkpoint", "latest") == 0
    assert sizes() == before
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["teacher_pool_size"] == before and config["pool_size"] is None
    assert run(4, "--resume-from-checkpoint", "latest", "--teacher-pool-size", "9", "9") == 2


def latent(folder, seed, name):
    """A teacher on latents of an autoencoder in `folder`, with weights of this seed."""
    torch.manual_seed(seed)
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(
        1, 1, latent_channels=1, norm_num_groups=4, block_out_channels=(4,), **kinds
    )
    vae.save_pretrained(folder / "vae")
    component = Component(folder / "vae", "diffusers", "AutoencoderKL")
    return replace(first(), name=name, bundle=Bundle(autoencoder=Autoencoder(component)))


def test_latents_are_of_one_autoencoder(tmp_path):
    one, same = (latent(tmp_path / name, 1, name) for name in ("one", "same"))
    assert side_by_side([one, same]).bundle is one.bundle
    with pytest.raises(UsageError, match="one and other: in latents of AutoencoderKL .* and lat"):
        side_by_side([one, latent(tmp_path / "other", 2, "other")])
    with pytest.raises(UsageError, match=r"in latents of .* and pixels: give"):
        side_by_side([one, second()])


def test_what_comes_out_names_all_teachers_and_is_measured_beside_them(whole):
    names = "test_several_teachers:clothes", "test_several_teachers:shoes"
    config = json.loads((whole / "config.json").read_text())
    assert (config["teacher"], config["more_teachers"]) == (names[0], [names[1]])
    card, page = (whole / "README.md").read_text(), (whole / "report.html").read_text()
    found = json.loads((whole / "evaluation.json").read_text())
    assert found["teacher"]["name"] == " and ".join(names)
    assert found["class_names"] == ["shirt", "coat", "shoes 0", "shoes 1", "shoes 2"]
    for name in names:
        assert f"`{name}` (UNet2DModel, " in card
        assert f"`{name}`: unknown" in card
        assert name in page
    assert "2 teachers" in page
    pool = json.loads((whole / "pool.json").read_text())
    assert (pool["entries"], pool["t"]["end"], sum(pool["t"]["counts"])) == (30, 90, 30)
    student = load_teacher(str(whole), options=None)
    assert student.conditioning.num_classes == 5
    again = teacher_of(dkdm.config.read_config(whole / "config.json"))
    assert isinstance(again, Teachers)
    assert again.conditioning == pattern_of(again).conditioning
    turned = replace(again, members=again.members[::-1])
    assert fingerprint(again) != fingerprint(turned)


@pytest.mark.slow
def test_few_steps_are_learnt_of_both(tmp_path):
    few = {"objective": "few-step", "few_step_heads": 4, "student_steps": "1:4"}
    config = replace(SMALL, output_dir=tmp_path / "run", few_step_pool=8, check=False, **few)
    folder = dkdm.distill([first(), second()], "dit-tiny", config)
    plain = json.loads((folder / "plain" / "pool.json").read_text())
    assert plain["t"]["end"] == 90
    student = load_teacher(str(folder))
    assert student.conditioning.names == ("shirt", "coat", "shoes 0", "shoes 1", "shoes 2")
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert math.isfinite(json.loads(last)["loss"])


def test_a_list_of_one_is_that_one_and_an_empty_one_is_refused(tmp_path):
    (only,) = opened_teachers(dkdm.DistillConfig(), [first()])
    config = replace(SMALL, output_dir=tmp_path)
    assert not isinstance(ready_teachers([only], config), Teachers)
    with pytest.raises(UsageError, match="empty list"):
        dkdm.distill([], "dit-tiny", config)
