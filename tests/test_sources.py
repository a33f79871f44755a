"""Training on images: what is drawn of them, what the target is, and which conditions they have."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

import pipelines
from dkdm import train
from dkdm.config import TrainConfig
from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional
from dkdm.core.diffusion.prediction import Parameterization, to_x_0_eps
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.core.shards import Shards
from dkdm.core.sources.images import Images
from dkdm.data.fashion import fashion_captions
from dkdm.data.images import load_image_folder
from dkdm.data.training_set import training_data
from dkdm.errors import DkdmError, UsageError

LEVELS = 50
COSINE = from_betas(beta_schedule("squaredcos_cap_v2", LEVELS))
LABELS = ClassLabels(3, null_class=3)


def source(count=12, labels=True, **fields):
    """Images that hold their own number, of classes 0, 1, 2, 0, ..."""
    images = torch.arange(float(count)).reshape(-1, 1, 1, 1).expand(count, 1, 2, 2)
    own = Parameterization("v_prediction")
    cond = {"class_labels": torch.arange(count) % 3} if labels else {}
    return Images(images, cond, COSINE, own, LABELS if labels else Unconditional(), **fields)


def step(images, batch_size):
    batch = images.draw(batch_size)
    target = images.target(batch)
    images.advance(batch, target)
    return batch, target


# --- batches -------------------------------------------------------------------------------------


def test_the_target_is_the_image_and_the_noise_of_the_state():
    images = source()
    for _ in range(5):
        batch, target = step(images, 4)
        assert torch.equal(target.x_0[:, 0, 0, 0], batch.rows.float())
        torch.testing.assert_close(COSINE.add_noise(target.x_0, target.eps, batch.t), batch.x)
        x_0, eps = to_x_0_eps("v_prediction", target.output, batch.x, *COSINE.at(batch.t))
        torch.testing.assert_close((x_0, eps), (target.x_0, target.eps), atol=1e-4, rtol=1e-4)
        assert torch.equal(batch.cond["class_labels"], batch.rows % 3)


def test_an_epoch_has_every_image_once_and_the_next_another_order():
    images = source()
    epochs = [[row for _ in range(3) for row in step(images, 4)[0].rows.tolist()] for _ in "ab"]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]


def test_levels_are_uniform_and_noise_is_never_repeated():
    images = source(1000, labels=False)
    drawn = [step(images, 1000) for _ in range(20)]
    counts = torch.cat([batch.t for batch, _ in drawn]).bincount(minlength=LEVELS)
    statistic = ((counts - 400) ** 2 / 400).sum()
    assert statistic < 94  # chi-square of 49 degrees of freedom, p = 1e-4
    eps = torch.stack([target.eps for _, target in drawn])
    assert eps.std() == pytest.approx(1, abs=0.01)
    assert len(eps.flatten().unique()) > 0.99 * eps.numel()


def test_conditions_are_dropped_by_chance():
    images = source(999, condition_dropout=0.25)
    labels = torch.cat([step(images, 999)[0].cond["class_labels"] for _ in range(10)])
    assert (labels == 3).double().mean() == pytest.approx(0.25, abs=0.018)
    assert torch.equal(images.conditions["class_labels"], torch.arange(999) % 3)
    assert source(12, labels=False, condition_dropout=0.25).draw(4).cond == {}


def test_training_goes_on_exactly_from_a_step():
    images, again = source(condition_dropout=0.5), source(condition_dropout=0.5)
    for _ in range(4):
        step(images, 5)
    again.load_state_dict(images.state_dict())
    for _ in range(4):
        (batch, target), (same, equal) = step(images, 5), step(again, 5)
        for name in ("x", "t", "rows"):
            assert torch.equal(getattr(batch, name), getattr(same, name))
        assert torch.equal(batch.cond["class_labels"], same.cond["class_labels"])
        assert torch.equal(target.eps, equal.eps)
    assert not torch.equal(source(seed=1).draw(5).x, source().draw(5).x)


@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_several_processes_are_the_batch_of_one(world):
    fields = {"seed": 3, "condition_dropout": 0.3}
    one = source(**fields)
    parts = [source(**fields, drawn_by=Shards(rank=rank, world=world)) for rank in range(world)]
    for _ in range(4):
        (batch, target), found = step(one, 5), [step(part, 5) for part in parts]
        for name in ("x", "t", "rows"):
            each = torch.cat([getattr(own, name) for own, _ in found])
            assert torch.equal(each, getattr(batch, name)), name
        labels = torch.cat([own.cond["class_labels"] for own, _ in found])
        assert torch.equal(labels, batch.cond["class_labels"])
        assert torch.equal(torch.cat([own.output for _, own in found]), target.output)


def test_fewer_samples_than_processes_are_refused():
    with pytest.raises(UsageError, match="3 processes cannot share 2 samples"):
        source(drawn_by=Shards(rank=0, world=3)).draw(2)


def test_a_run_goes_on_with_as_many_images():
    state, fewer = source().state_dict(), source(5)
    with pytest.raises(UsageError, match="a run on 12 images, these are 5: resume with the"):
        fewer.load_state_dict(state)
    del state["size"]  # as former versions wrote it
    fewer.load_state_dict(state)


def test_a_batch_larger_than_the_images_is_refused():
    with pytest.raises(UsageError, match="batch size 13 is larger than the 12 images"):
        source().draw(13)


# --- captions ------------------------------------------------------------------------------------


def save(folder: Path, captions: dict[str, bytes | None]) -> str:
    for name, caption in captions.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / f"{name}.png")
        if caption is not None:
            (folder / f"{name}.txt").write_bytes(caption)
    return str(folder)


def test_captions_lie_beside_the_images_in_their_order(tmp_path):
    spec = save(tmp_path, {"b/2": b"two\n", "a/1": "einß".encode("utf-8-sig"), "b/10": b"  ten"})
    captions = load_image_folder(Path(spec), (1, 4, 4)).captions()
    assert captions == ("einß", "ten", "two")


@pytest.mark.parametrize(
    ("caption", "message"),
    [(None, r"b\.txt is missing.*a text file of the same name"), (b"\xe4", r"b\.txt cannot be re")],
)
def test_captions_that_cannot_be_read_are_named(tmp_path, caption, message):
    spec = save(tmp_path, {"a": b"one", "b": caption})
    with pytest.raises(DkdmError, match=message):
        load_image_folder(Path(spec), (1, 4, 4)).captions()


def test_captions_of_fashion_name_the_garment_and_at_times_its_tone():
    images = torch.full((10, 1, 4, 4), -1.0)
    for i, tone in enumerate([-0.5, 0.0, 0.9, -0.5, 0.0] * 2):
        images[i, :, 1:3, 1:3] = tone
    images[5] = -1.0
    captions = fashion_captions(images, torch.arange(10))
    assert captions[:5] == (
        "a dark t-shirt", "a grey trouser", "a white pullover", "a dark dress", "a coat",
    )  # fmt: skip
    assert captions[5] == "a grey sandal"  # nothing to be seen of it


# --- what is trained -----------------------------------------------------------------------------


def folder_config(folder, **fields):
    spec = save(folder, {"a/1": b"", "a/2": b"", "b/1": b"", "c/1": b""})
    return TrainConfig(images=spec, **{"sample_shape": (1, 4, 4), **fields})


def read_data(run):
    return training_data(run.data, run.model)


def test_class_folders_become_labels_with_a_null_class(tmp_path):
    data, like = read_data(folder_config(tmp_path))
    assert data.images.shape == (4, 1, 4, 4)
    assert data.conditions["class_labels"].tolist() == [0, 0, 1, 2]
    assert like.conditioning == ClassLabels(3, null_class=3)
    assert (like.sample_shape, like.parameterization.prediction) == ((1, 4, 4), "v_prediction")
    assert like.process.num_levels == 1000


def test_pixels_are_clipped_to_their_range_and_latents_are_not(tmp_path):
    """A base without a scheduler: only pixels lie between -1 and 1."""
    base = tmp_path / "base"
    pipelines.ldm_kl().save_pretrained(base)
    shutil.rmtree(base / "scheduler")
    size = {"sample_shape": (3, 16, 16), "class_conditional": False}
    _, pixels = read_data(folder_config(tmp_path / "images", **size))
    _, latents = read_data(folder_config(tmp_path / "images", base=str(base), **size))
    assert (pixels.process.clipping.range, latents.process.clipping.range) == (1.0, None)
    assert torch.equal(latents.process.alpha, pixels.process.alpha)


def test_labels_may_be_left_aside(tmp_path):
    data, like = read_data(folder_config(tmp_path, class_conditional=False))
    assert data.conditions == {}
    assert isinstance(like.conditioning, Unconditional)
    own = like.parameterization
    images = Images(data.images, data.conditions, like.process, own, like.conditioning)
    assert Counter(images.draw(4).rows.tolist()) == Counter(range(4))


def test_the_scheduler_may_be_another(tmp_path):
    file = tmp_path / "scheduler_config.json"
    file.write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100}'
    )
    _, like = read_data(folder_config(tmp_path / "images", scheduler=str(file)))
    assert like.parameterization.prediction == "flow_prediction"
    assert like.process.num_levels == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            r"mine\.json': give ddpm-linear, .* \(.*json is missing",
        ),
        (
            "{",
            r"mine\.json': give ddpm-linear, .* \(.*cannot be read as JSON",
        ),
    ],
)
def test_a_scheduler_that_cannot_be_read_is_named(tmp_path, content, message):
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_data(folder_config(tmp_path / "images", scheduler=str(file)))


def test_guided_samples_of_an_unconditional_model_are_refused_before_training(tmp_path):
    options = {"class_conditional": False, "sampling_guidance_scale": 2.0}
    config = folder_config(tmp_path / "images", output_dir=tmp_path / "run", **options)
    with pytest.raises(UsageError, match="this one is unconditional"):
        train(config)
    assert not (tmp_path / "run").exists()
