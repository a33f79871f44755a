"""Samples that a run keeps, and the data sets that `dkdm harvest` writes."""

import ast
import io
import json
import shlex
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import dkdm
from dkdm.cli import main
from dkdm.config import HarvestOptions, read_config, to_json
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import rectified_flow
from dkdm.core.saving import checkpoint
from dkdm.core.sources.fill import empty_pool
from dkdm.core.sources.finished import SHARD, Finished, SampleShards
from dkdm.data.images import load_image_folder
from dkdm.data.sample_files import PngFolder, TensorShards, WebDataset, picture, pixels
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.evaluated import Evaluation
from dkdm.reading.lock import locked
from dkdm.runs.harvest import harvest, kept
from factories import counting, denoiser

CPU = torch.device("cpu")


def step(pool, count):
    batch = pool.draw(count)
    target = pool.target(batch)
    pool.advance(batch, target)


# --- what a pool keeps ---------------------------------------------------------------------------


def test_samples_whose_chains_end_follow_the_teachers_law(tmp_path):
    mixture = GaussianMixture.of([[-1.2, -0.4], [0.8, 1.0]], std=[0.3, 0.5], classes=[0, 1])
    teacher = mixture_denoiser(mixture, rectified_flow(20), Parameterization("flow_prediction"))
    pool = empty_pool(teacher, 512, CPU, torch.float32, eta=0.0)
    pool.finished = Finished(SampleShards(tmp_path), 1024)
    for _ in range(20):
        step(pool, 512)
    assert pool.finished.count == 512
    samples, cond = pool.finished.shards.read(0)
    assert pool.finished.shards.numbers() == [0, 1]
    for label in (0, 1):
        mean, _ = mixture.of_class(label).moments()
        own = samples[cond["class_labels"] == label].double()
        torch.testing.assert_close(own.mean(0), mean, rtol=0, atol=0.15)


def finished(folder, limit=SHARD):
    return Finished(SampleShards(folder), limit)


def add(found, first, count):
    x = torch.arange(first, first + count, dtype=torch.float32)
    found.add(x[:, None], {"class_labels": x.long() % 3})


def test_the_last_are_kept_and_a_resumed_run_writes_the_same(tmp_path):
    whole, killed = finished(tmp_path / "whole"), finished(tmp_path / "killed")
    for found in (whole, killed):
        add(found, 0, 300)
    state = {key: value.clone() for key, value in killed.state_dict().items()}
    add(whole, 300, 600)
    add(killed, 300, 250)  # and is killed: two shards, one more than the checkpoint knows
    assert killed.shards.numbers() == [1]
    again = finished(tmp_path / "killed")
    again.load_state_dict(state)
    assert again.shards.numbers() == []
    add(again, 300, 600)
    assert whole.shards.numbers() == again.shards.numbers() == [2]
    for one, other in zip(whole.shards.read(2), again.shards.read(2), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
            assert one[:, 0].tolist() == list(range(512, 768))
    assert whole.state_dict().keys() == {"count", "samples", "cond.class_labels"}
    assert torch.equal(whole.state_dict()["samples"], again.state_dict()["samples"])


def test_shards_of_other_options_or_damaged_are_refused(tmp_path):
    shards = SampleShards(tmp_path / "set")
    shards.claim({"seed": 1})
    with pytest.raises(UsageError, match="holds samples with seed 1, not 2"):
        shards.claim({"seed": 2})
    shards.path(0).write_bytes(b"no")
    with pytest.raises(DkdmError, match="cannot be read as safetensors"):
        shards.read(0)
    checkpoint.write_tensors(shards.path(0), {"samples": torch.zeros(2), "cond.a": torch.zeros(3)})
    with pytest.raises(DkdmError, match="holds no samples with conditions"):
        shards.read(0)


# --- data sets -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose chains end at once, and the teacher it kept 30 samples or so of."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    config = dkdm.DistillConfig(
        output_dir=folder,
        teacher="factories:teacher",
        train_batch_size=8,
        max_train_steps=4,
        pool_size=16,
        fill_steps=1,
        stride="49",
        condition_dropout=0.3,
        keep_finished=100,
        evaluation_samples=0,
        validation_steps=0,
        use_ema=False,
    )
    dkdm.distill(config=config)
    return folder


def options(folder, **changes):
    return HarvestOptions(**{"output": folder, "num_samples": 30, "steps": 2, **changes})


def test_a_harvest_begins_with_what_the_run_kept(run, tmp_path):
    samples, cond = kept(run)
    right = cond["class_labels"] < 3
    assert 0 < int(right.sum()) < min(30, len(samples))
    teacher, counts = counting(denoiser())
    found = harvest(options(tmp_path / "png"), teacher, run)
    assert (found.kept, found.drawn) == (int(right.sum()), 30 - int(right.sum()))
    looks = 2  # at the null condition, before the run's dropout of conditions
    assert found.evaluations == sum(counts) - looks == found.drawn * 2
    read = load_image_folder(tmp_path / "png", (1, 8, 8))
    labels = json.loads((tmp_path / "png" / "labels.json").read_text())
    assert len(read.images) == len(labels) == 30
    assert sorted(labels.values()) == read.labels.tolist()
    files = {int(path.stem): path for path in (tmp_path / "png").glob("*/*.png")}
    for i, sample in enumerate(samples[right]):
        assert files[i].parent.name == str(int(cond["class_labels"][right][i]))
        shown = pixels(files[i].read_bytes(), files[i])
        torch.testing.assert_close(shown, sample.clamp(-1, 1), rtol=0, atol=0.004)
    assert "--source images --images" in found.usage


@pytest.mark.parametrize(("sampler", "each"), [("ddim", 3), ("heun", 5), ("dpm", 3)])
def test_evaluations_are_those_of_the_sampler(tmp_path, sampler, each):
    teacher, counts = counting(denoiser())
    found = harvest(options(tmp_path, num_samples=4, steps=3, sampler=sampler), teacher)
    assert found.evaluations == sum(counts) == 4 * each


def test_damaged_webdataset_and_kept_shards_are_named(tmp_path):
    harvest(options(tmp_path / "set", num_samples=2, format="webdataset"), denoiser())
    files = WebDataset(tmp_path / "set", 3)
    with tarfile.open(tmp_path / "set/shard-00000.tar", "w") as tar:
        entry = tarfile.TarInfo("00000000.cls")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"cat"))
    with pytest.raises(DkdmError, match="shard-00000.tar holds a class id that is no number"):
        files.read(0, range(2))
    checkpoint.write_tensors(SampleShards(tmp_path).path(0), {"samples": torch.tensor(1.0)})
    with pytest.raises(DkdmError, match="holds no samples with conditions: remove it"):
        SampleShards(tmp_path).read(0)


def test_two_harvests_do_not_write_one_set(tmp_path):
    harvest(options(tmp_path / "set"), denoiser())
    with (
        locked(tmp_path / "set", "dkdm harvest"),
        pytest.raises(UsageError, match="is being written by process .*dkdm harvest"),
    ):
        harvest(options(tmp_path / "set"), denoiser())


@pytest.mark.parametrize("name", ["png", "webdataset", "safetensors"])
def test_a_harvest_that_was_cut_off_goes_on_and_is_the_same(tmp_path, monkeypatch, name):
    monkeypatch.setattr("dkdm.runs.harvest.SHARD", 8)
    teacher = denoiser()
    how = options(tmp_path / "whole", format=name, num_samples=20, batch_size=3)
    harvest(how, teacher)

    def contents(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    whole = contents(how.output)
    data = [path for path in whole if path.suffix in (".png", ".tar", ".safetensors")]
    cut_off = how.output / max(data, key=lambda path: path.stem)
    cut_off.rename(cut_off.with_name(f".{cut_off.stem}.19fa7365{cut_off.suffix}"))
    (how.output / "labels.json").unlink(missing_ok=True)
    counted, counts = counting(teacher)
    harvest(how, counted)
    assert 0 < sum(counts) < 40
    assert contents(how.output) == whole
    other = replace(how, seed=1)
    with pytest.raises(UsageError, match="holds samples with seed 0, not 1"):
        harvest(other, teacher)
    with pytest.raises(UsageError, match="holds samples with conditions"):
        harvest(replace(how, classes=(1,)), teacher)


def test_webdataset_shards_hold_images_classes_and_nothing_else(tmp_path):
    harvest(options(tmp_path, format="webdataset", num_samples=4), denoiser())
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        names = tar.getnames()
        assert names[:2] == ["00000000.png", "00000000.cls"] and len(names) == 8
        assert [tar.extractfile(name).read() for name in names[1::2]] == [b"0", b"1", b"2", b"0"]
        image = Image.open(io.BytesIO(tar.extractfile(names[0]).read()))
        assert (image.mode, image.size) == ("L", (8, 8))


def test_pictures_come_back(tmp_path):
    image = torch.linspace(-1.2, 1.2, 3 * 16).reshape(3, 4, 4)
    file = tmp_path / "a.png"
    picture(image).save(file)
    shown = pixels(file.read_bytes(), file)
    torch.testing.assert_close(shown, image.clamp(-1, 1), rtol=0, atol=0.004)
    with pytest.raises(DkdmError, match="cannot be read as PNG"):
        pixels(b"nothing", file)


@pytest.mark.parametrize(
    ("changes", "teacher", "message"),
    [
        ({}, replace(denoiser(), sample_shape=(2, 8, 8)), "are no grey or colour images"),
        ({"classes": (7,)}, denoiser(), "class id 7 out of range"),
        ({"steps": 51}, denoiser(), "51 sampling steps: use 1 to 50"),
        ({"guidance_scale": 2.0}, denoiser(None), "unconditional"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, changes, teacher, message):
    with pytest.raises(UsageError, match=message):
        harvest(options(tmp_path / "set", **changes), teacher)
    assert not (tmp_path / "set").exists()


def test_samples_that_are_not_finite_are_not_written(tmp_path):
    broken = replace(denoiser(), network=lambda x, t, class_labels: x * torch.nan)
    with pytest.raises(DkdmError, match="30 of 30 samples of model hold NaN or infinity"):
        harvest(options(tmp_path), broken)
    assert not list(tmp_path.rglob("*.png"))


def test_no_more_than_a_run_was_to_keep_is_taken(run, tmp_path):
    few = tmp_path / "run"
    shutil.copytree(run, few)
    config = read_config(few / "config.json")
    (few / "config.json").write_text(to_json(replace(config, keep_finished=3)))
    found = harvest(options(tmp_path / "set", format="safetensors", num_samples=8), None, few)
    assert (found.kept, found.drawn) == (3, 5)


@pytest.mark.parametrize("given", [["--size", "8", "8"], ["--prompts", "a cat"]])
def test_options_of_a_model_are_refused_beside_a_run(run, tmp_path, capsys, given):
    assert main(["harvest", str(run), "--output", str(tmp_path / "set"), *given]) == 2
    assert "leave these out, or harvest the teacher by its name" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--cond", "none.npz"], "this model has no custom conditions: remove --cond"),
        (["--num-samples", "1"], "--num-samples 1 is too few for fd: give 2 or more"),
        (["--reference", "nowhere"], "there is no reference nowhere"),
    ],
)
def test_what_a_model_cannot_give_is_refused_by_the_command(tmp_path, capsys, given, message):
    command = ["harvest", "builtin:fashion", "--output", str(tmp_path / "set")]
    assert main([*command, "--reference", "fashion-test", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        harvest(options(tmp_path), denoiser())


@pytest.mark.parametrize("name", ["my set", "it's"])
def test_how_to_train_on_a_set_is_quoted(name):
    shown = PngFolder(Path(name)).usage((1, 16, 16))
    assert shlex.split(shown)[4:6] == ["--images", name]
    for usage in (WebDataset(Path(name)).usage(()), TensorShards(Path(name)).usage(())):
        parsed = ast.walk(ast.parse(usage))
        texts = {node.value for node in parsed if isinstance(node, ast.Constant)}
        assert any(str(text).startswith(f"{name}/shard-") for text in texts)


def test_class_folders_sort_as_their_ids(tmp_path):
    conditioning = ClassLabels(12)
    teacher = replace(denoiser(12), conditioning=conditioning)
    harvest(options(tmp_path, num_samples=12, steps=1), teacher)
    assert load_image_folder(tmp_path, (1, 8, 8)).labels.tolist() == list(range(12))
    assert PngFolder(tmp_path, 12).has(0, range(12))


def test_the_command_measures_what_it_wrote(tmp_path, capsys):
    command = ["harvest", "builtin:fashion", "--output", str(tmp_path / "set")]
    command += ["--num-samples", "12", "--steps", "2", "--reference", "fashion-test"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "12 drawn with 24 teacher evaluations" in said and "kept" not in said
    assert "Frechet distance: floor of 60,000 samples, not 12" in said and "--images" in said
    found = Evaluation.read(tmp_path / "set" / "evaluation.json")
    assert (found.num_samples, found.num_steps, found.sampler) == (12, 2, "ddim")
    assert found.reference is not None and found.reference.name == "fashion-test"
    same = dkdm.evaluate("builtin:fashion", "fashion-test", num_samples=12, steps=2)
    assert found["fd"] == pytest.approx(same["fd"], rel=0.05)  # those as they were, these 8 bits
    assert found.metrics["fd"].floor == same.metrics["fd"].floor


def test_code_that_only_the_runs_folder_names_is_not_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DKDM_DATA_HOME", str(tmp_path / "elsewhere"))
    assert main(["harvest", str(run), "--output", str(tmp_path / "set")]) == 2
    assert (
        "names code as its teacher, factories:teacher. If you trust that code, harvest"
        in capsys.readouterr().err
    )
