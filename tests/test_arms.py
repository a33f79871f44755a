"""The arms of --source: each trains, counts and resumes; laws of the ladder; images."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import dkdm
from dkdm.config import DistillConfig, ImageOptions
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.core.objectives.objective import Objective
from dkdm.core.saving import checkpoint
from dkdm.core.shards import Shards
from dkdm.core.sources.chains import Guidance, Stride
from dkdm.core.sources.fill import empty_pool, fill_few_step
from dkdm.core.sources.images import Images
from dkdm.core.sources.ladder import Iterative, Shuffled
from dkdm.core.sources.mixed import Mixed, Taught, images_in_batch
from dkdm.core.sources.pool import Pool
from dkdm.core.sources.synthetic import draw_set, empty_set
from dkdm.data.teacher_images import balanced_share, images_of
from dkdm.errors import UsageError
from dkdm.runs.arms import ARMS
from factories import counting, denoiser
from test_distill_toy import Mlp

CPU = torch.device("cpu")
LEVELS = 40
COSINE = from_betas(beta_schedule("squaredcos_cap_v2", LEVELS))
MIXTURE = GaussianMixture.of([[-2.4, -0.8], [1.6, 2.0]], std=[0.3, 0.5], classes=[0, 1])
TARGETS = [(name, "noise") for name in ARMS] + [("images", "teacher"), ("mixed", "teacher")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of five 8x8 images; the brightness is the class."""
    folder = tmp_path_factory.mktemp("images")
    for label in range(3):
        (folder / str(label)).mkdir()
        for i in range(5):
            Image.new("L", (8, 8), 100 * label + i).save(folder / str(label) / f"{i}.png")
    return folder


def options(folder, output, source, target="noise", **changes):
    given = {
        "output_dir": output,
        "source": source,
        "images": str(folder),
        "images_target": target,
        "train_batch_size": 6,
        "max_train_steps": 4,
        "pool_size": 12,
        "fill_steps": 2,
        "lr_scheduler": "constant",
        "synthetic_samples": 9 if source == "synthetic" else None,
        "synthetic_steps": 3,
        "stride": "random:8",
        "condition_dropout": 0.2,
        "evaluation_samples": 0,
        "validation_steps": 0,
        "logging_steps": 1,
    }
    return DistillConfig(**{**given, **changes})


def made(config, teacher):
    """The arm's source, prepared."""
    arm = ARMS[config.pool.source]
    source = arm.make(teacher, teacher, config, CPU)
    arm.prepare(source, teacher, config)
    return source


def step(source, count=6):
    batch = source.draw(count)
    target = source.target(batch)
    source.advance(batch, target)
    return batch, target


# --- every arm -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), TARGETS)
def test_a_source_goes_on_exactly_and_counts_each_evaluation(folder, tmp_path, source, target):
    teacher, counts = counting(denoiser())
    config = options(folder, tmp_path, source, target, keep_finished=8)
    first = made(config, teacher)
    for _ in range(3):
        step(first)
    assert (first.evaluations or 0) == sum(counts)
    for name, part in first.parts().items():
        state = {key: torch.as_tensor(value) for key, value in part.state_dict().items()}
        checkpoint.write_tensors(tmp_path / f"{name}.safetensors", state)
    again = ARMS[source].make(teacher, teacher, config, CPU)
    for name, part in again.parts().items():
        part.load_state_dict(checkpoint.read_tensors(tmp_path / f"{name}.safetensors"))
    assert again.evaluations == first.evaluations
    for _ in range(3):
        (batch, learnt), (same, equal) = step(first), step(again)
        assert torch.equal(batch.x, same.x)
        assert torch.equal(batch.t, same.t)
        assert torch.equal(batch.cond["class_labels"], same.cond["class_labels"])
        assert torch.equal(learnt.eps, equal.eps)


def test_a_run_resumes_exactly(folder, tmp_path):
    def run(name, **changes):
        config = options(folder, tmp_path / name, "mixed", **changes)
        dkdm.distill(denoiser(), "dit-tiny", config)
        return checkpoint.read_tensors(tmp_path / name / "transformer" / checkpoint.WEIGHTS)

    whole = run("whole")
    run("parts", max_train_steps=2)
    again = run("parts", resume_from_checkpoint="latest")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "states of the teacher's chains and on images" in card
    assert "No image was read" not in card and "data-free" not in card
    assert str(folder) not in card


class Quick(Mlp):
    def __init__(self):
        super().__init__(largest_time=float(COSINE.network_time[-1]), width=48)

    def forward(self, x, time, class_labels):
        del class_labels
        return super().forward(x, time)


def filled(teacher, kind, size, **fields):
    pool = empty_pool(teacher, size, CPU, torch.float32, kind=kind, shards=Shards(2), **fields)
    if kind is not Iterative:
        fill_few_step(pool, 10, 512)
    return pool


def synthetic(teacher, student):
    source = empty_set(teacher, student, 1024)
    draw_set(source, teacher, 10, 1.0, 1024)
    return source


def real(student):
    x_0 = MIXTURE.sample(4096, torch.Generator().manual_seed(0)).float()
    cond = {"class_labels": torch.full((4096,), 2)}
    return Images(x_0, cond, student.process, student.parameterization, student.conditioning)


ON_THE_MIXTURE = {
    "dynamic": lambda teacher, _: filled(teacher, Pool, 1024),
    "shuffled": lambda teacher, _: filled(teacher, Shuffled, 256),
    "iterative": lambda teacher, _: filled(teacher, Iterative, 64, stride=Stride(13, 13)),
    "synthetic": synthetic,
    "images": lambda _, student: real(student),
    "taught": lambda teacher, student: Taught(real(student), teacher),
    "mixed": lambda teacher, student: Mixed(filled(teacher, Pool, 1024), real(student)),
}


@pytest.mark.parametrize("name", ON_THE_MIXTURE)
def test_every_arm_teaches_the_mixture(name):
    """The student's distance to the exact teacher, over all levels."""
    assert set(ARMS) <= set(ON_THE_MIXTURE)
    own = Parameterization("v_prediction")
    teacher = mixture_denoiser(MIXTURE, COSINE, own)
    student = Denoiser(Quick(), COSINE, own, (2,), teacher.conditioning)
    source, objective = ON_THE_MIXTURE[name](teacher, student), Objective(student, teacher)
    random = torch.Generator().manual_seed(1)
    x_0, t = MIXTURE.sample(1000, random).float(), torch.arange(1000) % LEVELS
    x = COSINE.add_noise(x_0, torch.randn(1000, 2, generator=random), t)
    seen = Batch(x, t, {"class_labels": torch.full((1000,), 2)})
    exact = teacher.predict(seen)
    with torch.no_grad():
        before = float(objective(student, seen, exact).mean())
    optimizer = torch.optim.Adam(student.network.parameters(), 8e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for _ in range(120):
        batch = source.draw(64)
        target = source.target(batch)
        loss = objective(student, batch, target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        source.advance(batch, target)
    with torch.no_grad():
        error = float(objective(student, seen, exact).mean())
    assert error < 0.35 * before


# --- the ladder ----------------------------------------------------------------------------------


def ladder(kind, size, **fields):
    teacher = mixture_denoiser(MIXTURE, COSINE, Parameterization("epsilon"))
    return empty_pool(teacher, size, CPU, torch.float32, kind=kind, shards=Shards(2), **fields)


def levels_of(pool, batch_size, steps):
    return torch.stack([step(pool, batch_size)[0].t for _ in range(steps)])


def test_iterative_is_at_one_level_whatever_the_stride():
    pool = ladder(Iterative, 16, stride=Stride(1, 9))
    t = levels_of(pool, 16, 400)
    assert (t == t[:, :1]).all()
    strides = (t[:-1, 0] - t[1:, 0]) % LEVELS
    assert set(strides.tolist()) == set(range(1, 10))
    counts = t[:, 0].bincount(minlength=LEVELS)
    assert ((counts - 10.0) ** 2 / 10).sum() < 85  # chi-square, 39 degrees of freedom: p = 3e-5


@pytest.mark.parametrize(("kind", "size"), [(Shuffled, 64), (Shuffled, 256), (Pool, 256)])
def test_shuffled_and_dynamic_see_all_levels_at_every_step(kind, size):
    pool = ladder(kind, size)
    pool.t[:] = torch.randperm(size) % LEVELS
    t = levels_of(pool, 64, 60)
    counts = t.flatten().bincount(minlength=LEVELS)
    expected = t.numel() / LEVELS
    assert ((counts - expected) ** 2 / expected).sum() < 80
    assert all(len(row.unique()) > LEVELS / 2 for row in t)


@pytest.mark.parametrize(("batch_size", "size"), [(24, 72), (4, 13), (10, 20), (5, 5)])
def test_groups_of_shuffled_are_fixed_and_take_turns(tmp_path, batch_size, size):
    config = options(tmp_path, tmp_path, "shuffled", train_batch_size=batch_size, pool_size=size)
    teacher = mixture_denoiser(MIXTURE, COSINE, Parameterization("epsilon"))
    pool, turns = ARMS["shuffled"].make(teacher, teacher, config, CPU), size // batch_size
    assert len(pool.t) == turns * batch_size
    groups = [frozenset(step(pool, batch_size)[0].rows.tolist()) for _ in range(2 * turns)]
    assert groups[:turns] == groups[turns:]
    assert frozenset().union(*groups) == set(range(turns * batch_size))


def test_subsets_of_dynamic_are_not_fixed():
    dynamic = ladder(Pool, 72)
    assert len({frozenset(step(dynamic, 24)[0].rows.tolist()) for _ in range(12)}) == 12


# --- images --------------------------------------------------------------------------------------


def test_a_share_is_seeded_balanced_and_part_of_a_larger_one():
    labels = torch.arange(300) % 3
    parts = [balanced_share(labels, 300, share, 1) for share in (0.05, 0.1, 0.2, 1.0)]
    assert [len(part) for part in parts] == [15, 30, 60, 300]
    for part, larger in zip(parts, parts[1:], strict=False):
        assert set(part.tolist()) < set(larger.tolist())
        assert labels[part].bincount().tolist() == [len(part) // 3] * 3
    other = balanced_share(labels, 300, 0.05, 2)
    assert parts[0].tolist() != other.tolist()
    assert len(balanced_share(None, 40, 0.001, 0)) == 1


def test_images_are_the_teachers_samples_of_its_classes(folder):
    teacher = replace(denoiser(), value_range=(0.0, 1.0))
    data = images_of(teacher, ImageOptions(str(folder)), 0)
    grey = torch.tensor([100 * c + i for c in range(3) for i in range(5)]) / 255
    torch.testing.assert_close(data.images[:, 0, 0, 0], grey)
    assert data.conditions["class_labels"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    two = replace(teacher, conditioning=ClassLabels(3, null_class=3, classes=(0, 2)))
    assert images_of(two, ImageOptions(str(folder), 0.4), 0).conditions[
        "class_labels"
    ].tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "--source images: give --images"),
        ({"guidance_scale": "2"}, "--guidance-scale: with --source images the teacher evaluates"),
        ({"images_share": 0.2}, "--images: 3 images are fewer than the 6 of a batch"),
        ({"feature_weight": 1.0}, "the teacher does not see whole batches"),
        ({"source": "mixed", "train_batch_size": 1}, "--train-batch-size of 2 or more"),
        ({"source": "dynamic"}, "--images: --source dynamic reads no images"),
        ({"keep_finished": 9}, "--keep-finished: --source images has no chains"),
        ({"synthetic_samples": 9}, "--synthetic-samples: --source images draws no set first"),
        (
            {"source": "synthetic", "images": None, "synthetic_samples": 5},
            "--synthetic-samples 5 is smaller than a batch of 6",
        ),
    ],
)
def test_what_images_cannot_have_is_refused_before_the_run(folder, tmp_path, changes, message):
    given = {"source": "images", "condition_dropout": 0.0, **changes}
    config = options(folder, tmp_path / "run", **given)
    with pytest.raises(UsageError, match=message):
        dkdm.distill(denoiser(), "dit-tiny", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning": ClassLabels(4)}, "the images have 3 classes, the teacher 4"),
        ({"decode": lambda x: x}, "decoded by a function"),
    ],
)
def test_images_that_do_not_fit_the_teacher_are_refused(folder, changes, message):
    with pytest.raises(UsageError, match=message):
        images_of(replace(denoiser(), **changes), ImageOptions(str(folder)), 0)


def test_a_mixed_batch_holds_both_in_their_shares(folder, tmp_path):
    teacher, counts = counting(denoiser())
    source = made(options(folder, tmp_path, "mixed", mixed_share=1 / 3), teacher)
    before = sum(counts)
    batch, target = step(source)
    assert [len(part.t) for part in batch.rows] == [4, 2]
    assert sum(counts) >= before + 4
    torch.testing.assert_close(
        teacher.process.add_noise(target.x_0[4:], target.eps[4:], batch.t[4:]), batch.x[4:]
    )
    assert [images_in_batch(8, share) for share in (0.01, 0.5, 0.99)] == [1, 4, 7]


def test_images_are_evaluated_under_the_guidance_of_the_run(folder, tmp_path):
    teacher, counts = counting(denoiser())
    config = options(folder, tmp_path, "images", "teacher", guidance_scale="2:8")
    source = made(config, teacher)
    batch, _ = step(source)
    assert sum(counts) == source.evaluations == 12
    assert ((batch.cond["guidance"] >= 2) & (batch.cond["guidance"] <= 8)).all()
    assert source.guidance == Guidance(2, 8)
