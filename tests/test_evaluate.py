"""dkdm evaluate: shards that processes share, numbers against independent ones, what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

import dkdm
from dkdm.cli import main
from dkdm.config import to_json
from dkdm.data.perceptual import PerceptualDistance
from dkdm.data.reference import FeatureExtractor, Features, FeatureStatistics, Reference
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.comparison import level_gaps
from dkdm.evaluation.energy import energy_distance
from dkdm.evaluation.evaluated import Evaluation
from dkdm.evaluation.fingerprint import fingerprint
from dkdm.evaluation.frechet import frechet_distance
from dkdm.evaluation.rows import evaluation_in_words
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.evaluation.shards import Drawing, draw_shards, missing_shards, read_shards
from dkdm.reading.made_here import remember
from dkdm.runs.evaluate import REFERENCE_SEED
from dkdm.runs.judges import names_model
from dkdm.shipping.pipeline_folder import write_pipeline
from factories import counting, denoiser


def seen(images):
    return Features(images.flatten(1)[:, ::9].clone())


EYE = FeatureExtractor(
    "eye", "every ninth pixel", seen, lambda shape: tuple(shape) == (1, 8, 8), "(1, 8, 8)", 8
)


@pytest.fixture(autouse=True)
def small_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dkdm.evaluation.shards.SHARD", 4)


def real(count=40):
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(5)).clamp(-1, 1)
    features = seen(images).features
    return Reference("noise", EYE, FeatureStatistics.of(features), features=lambda: features)


def drawing(model=None, batch_size=3, count=10, **kept):
    model = model or denoiser()
    sampling = Sampling(count, 2, 0, "ddim", batch_size)
    return Drawing(model, model.conditioning.in_turns(count), sampling, 1.0, EYE, **kept)


def drawn_by(each, root, world):
    for rank in range(world):
        draw_shards(each, root, missing_shards(each, root, rank, world))
    return read_shards(each, root)


def test_energy_distance_is_its_definition():
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 2, 3, generator=random), torch.rand(5, 2, 3, generator=random)

    def mean(a, b):
        pairs = [(p - q).norm().item() for p, q in product(a, b) if p is not q]
        return sum(pairs) / len(pairs)

    between, same = mean(x, y), [list(each) for each in (x, y)]
    expected = 2 * between - sum(mean(each, each) for each in same)
    found = energy_distance(x, y)
    assert found.distance == pytest.approx(expected, abs=1e-6)
    assert found.share == pytest.approx(expected / (2 * between), abs=1e-6)


def test_energy_distance_in_blocks_and_of_two_points(monkeypatch):
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    whole = energy_distance(x, x + 1)
    monkeypatch.setattr("dkdm.evaluation.energy.BLOCK", 2)
    assert energy_distance(x, x + 1) == pytest.approx(whole, abs=1e-9)
    apart = energy_distance(torch.zeros(3, 1), torch.full((3, 1), 2.0))
    assert apart == (4.0, 1.0)
    with pytest.raises(DkdmError, match="give at least 2"):
        energy_distance(x[:1], x)
    with pytest.raises(DkdmError, match="NaN"):
        energy_distance(x, x / 0)


def test_samples_depend_on_neither_batches_nor_processes(tmp_path):
    one = drawn_by(drawing(keep=6), tmp_path / "one", 1)
    two = drawn_by(drawing(keep=6), tmp_path / "two", 2)
    other = drawn_by(drawing(keep=6, batch_size=64), tmp_path / "other", 1)
    assert one.samples.shape == (6, 1, 8, 8) and one.features.features.shape == (10, 8)
    assert torch.equal(one.labels, torch.arange(10) % 3)
    assert torch.equal(one.features.features, two.features.features)
    assert torch.equal(one.samples, two.samples)
    torch.testing.assert_close(one.features.features, other.features.features)
    model = denoiser()
    alone = draw(model, model.conditioning.in_turns(10), Sampling(10, 2, 0))
    torch.testing.assert_close(one.samples, alone[:6])
    names = [sorted(path.name for path in (tmp_path / n).rglob("*.st*")) for n in ("one", "two")]
    assert names[0] == names[1]


def test_what_is_drawn_is_not_drawn_again(tmp_path):
    model, counts = counting(denoiser())
    each = drawing(model)
    first = drawn_by(each, tmp_path, 1)
    assert sum(counts) == 20
    shards = each.shards(tmp_path)
    shards[1].file.unlink()
    counts.clear()
    again = drawn_by(each, tmp_path, 1)
    assert sum(counts) == 2 * len(shards[1].indices)
    assert torch.equal(first.features.features, again.features.features)
    counts.clear()
    draw_shards(replace(each, keep=5), tmp_path, missing_shards(replace(each, keep=5), tmp_path))
    assert sum(counts) == 2 * 8  # the two shards that lack samples
    data = bytearray(shards[2].file.read_bytes())
    data[-9] ^= 1
    for damaged in (b"no tensors", data[:-4], data):
        shards[2].file.write_bytes(damaged)
        with pytest.raises(DkdmError, match="remove it, and it is drawn again"):
            missing_shards(each, tmp_path)


def test_an_interruption_keeps_finished_shards(tmp_path):
    def stop(done):
        if done > 6:
            raise KeyboardInterrupt

    each = drawing()
    with pytest.raises(KeyboardInterrupt):
        draw_shards(each, tmp_path, missing_shards(each, tmp_path), stop)
    assert [s.indices.start for s in missing_shards(each, tmp_path)] == [4, 8]


def test_the_fingerprint_is_of_what_samples_depend_on():
    model = denoiser()
    same, other = replace(denoiser(), name="renamed"), denoiser(seed=1)
    assert fingerprint(model) == fingerprint(same) != fingerprint(other)
    assert fingerprint(replace(model, guidance_interval=(0.2, 0.8))) != fingerprint(model)
    assert fingerprint(replace(model, network=lambda x, t, **_: x)) != fingerprint(
        replace(model, network=lambda x, t, **_: 2 * x)
    )


SMALL = {"num_samples": 10, "steps": 2}


def test_the_distance_is_that_of_the_samples(tmp_path):
    model, reference = denoiser(), real()
    found = dkdm.evaluate(model, reference, metrics="fd,kid", json=tmp_path / "a/b.json", **SMALL)
    alone = draw(model, model.conditioning.in_turns(10), Sampling(10, 2, 0))
    expected = frechet_distance(FeatureStatistics.of(seen(alone).features), reference.statistics)
    assert found["fd"] == pytest.approx(expected, rel=1e-5)
    assert set(found.metrics) == {"fd", "kid"} and found.teacher is None
    written = json.loads((tmp_path / "a/b.json").read_text())
    assert written["metrics"]["fd"]["value"] == found["fd"]
    assert written["reference"]["network"] == "eye" and written["seed"] == 0
    assert Evaluation.read(tmp_path / "a/b.json") == found


def test_a_teacher_is_a_reference_and_needs_no_image():
    teacher, student = denoiser(), denoiser(seed=1)
    found = dkdm.evaluate(student, teacher=teacher, num_samples=12, steps=2)
    cond = teacher.conditioning.in_turns(12)
    theirs = draw(teacher, cond, Sampling(12, 2, REFERENCE_SEED))
    apart = energy_distance(draw(student, cond, Sampling(12, 2, 0)), theirs)
    assert found.teacher_distance.distance == pytest.approx(apart.distance, rel=1e-5)
    assert found.teacher_distance.floor == pytest.approx(
        energy_distance(theirs[:6], theirs[6:]).distance, abs=1e-5
    )
    assert found.gap.levels == pytest.approx(level_gaps(teacher, student, theirs, cond, 0))
    assert not found.metrics and found.reference is None
    itself = dkdm.evaluate(teacher, teacher=denoiser(), num_samples=12, steps=2)
    assert itself.gap.mean == pytest.approx(0, abs=1e-9)
    assert itself.teacher_distance.share < found.teacher_distance.share


def test_vectors_are_measured_too():
    model = dkdm.Denoiser(
        lambda x, t: 0.5 * x, dkdm.from_betas(torch.linspace(1e-3, 0.2, 20)), "epsilon", (6,)
    )
    found = dkdm.evaluate(model, teacher=replace(model, name="t"), num_samples=8, steps=2)
    assert found.gap.mean == 0 and found.sample_shape == (6,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": "fid,beauty"}, "there is no 'beauty': give all, or some of fd, fid"),
        ({"metrics": "fid"}, "fid cannot be measured against noise: its features are not those"),
        ({"metrics": "precision", "num_samples": 4}, "--num-samples 4 is too few for precision"),
        ({"metrics": "gap"}, "give --teacher MODEL"),
        ({"json": "/proc/a.json"}, "--json /proc/a.json: nothing can be written"),
        ({"json": "a.txt"}, "give a name that ends in .json"),
        ({"feature_device": "moon"}, "--feature-device moon: give a device"),
        ({"steps": 99}, "99 sampling steps: use 1 to 50"),
        ({"samples": 9}, "there is no 'samples'"),
        ({"classes": (7,)}, "class id 7 out of range"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_work(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, counts = counting(denoiser())
    with pytest.raises(UsageError, match=message) as refused:
        dkdm.evaluate(model, real(), **{**SMALL, **options})
    assert "\n" not in str(refused.value) and not counts


def test_references_and_teachers_of_other_shapes_are_refused():
    wide = replace(real(), network=replace(EYE, fits=lambda shape: False))
    with pytest.raises(UsageError, match=r"noise is for samples of shape .* --teacher MODEL alone"):
        dkdm.evaluate(denoiser(), wide, **SMALL)
    with pytest.raises(UsageError, match="nothing can be measured: give --reference .* --teacher"):
        dkdm.evaluate(denoiser(), **SMALL)
    vectors = dkdm.Denoiser(
        lambda x, t: x, dkdm.from_betas(torch.linspace(1e-3, 0.2, 20)), "epsilon", (6,)
    )
    with pytest.raises(UsageError, match="compare models of one shape"):
        dkdm.evaluate(denoiser(), teacher=vectors, **SMALL)


def test_a_metric_that_the_network_does_not_give_is_refused_before_images_are_seen(
    tmp_path, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("images were opened")

    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)

    monkeypatch.setattr("dkdm.runs.outputs.load_reference", load)
    for name, said in (("fid", "use fd"), ("sfid", "no statistics of spatial features")):
        with pytest.raises(
            UsageError, match=f"^{name} cannot be measured against images: .*{said}"
        ):
            dkdm.evaluate(denoiser(), "images", metrics=name, feature_network="fashion", **SMALL)


def test_samples_that_are_not_finite_are_refused(tmp_path):
    broken = replace(denoiser(), network=lambda x, t, class_labels: x * torch.nan)
    with pytest.raises(DkdmError, match=r"3 of 3 samples of model hold NaN or infinity"):
        dkdm.evaluate(broken, real(), batch_size=3, output=tmp_path / "shards", **SMALL)
    assert not list((tmp_path / "shards").rglob("*.safetensors"))


def test_no_name_is_no_choice_of_metrics():
    with pytest.raises(UsageError, match="--metrics ' , ': give all, or names such as fd,kid"):
        dkdm.evaluate(denoiser(), real(), metrics=" , ", **SMALL)


def test_few_samples_for_fid_are_warned_of(capsys):
    inception = replace(EYE, name="inception-of-tests")
    found = dkdm.evaluate(denoiser(), replace(real(), network=inception), metrics="fid", **SMALL)
    assert "FID of 10 samples cannot be compared" in found.warnings[0]
    assert f"warning: {found.warnings[0]}" in capsys.readouterr().err
    assert "--num-samples 2048" in found.warnings[0]
    few = dkdm.evaluate(denoiser(), real(), metrics="fd", num_samples=8, steps=2).warnings
    assert len(few) == 1 and "fewer than 9 samples leave the covariance" in few[0]
    assert not dkdm.evaluate(denoiser(), real(), metrics="fd", num_samples=9, steps=2).warnings


def distance(a, b):
    return (a - b).square().flatten(1).mean(1)


@pytest.fixture
def stand_in(monkeypatch):
    def of(given, backbone, device):
        return PerceptualDistance(f"{given} {backbone} {device}", "a stand-in", distance)

    monkeypatch.setattr("dkdm.runs.judges.perceptual_distance", of)


@pytest.mark.usefixtures("stand_in")
def test_lpips_compares_with_the_teachers_images_of_the_same_noise():
    teacher, student = denoiser(), denoiser(seed=1)
    asked = {"metrics": "fd,lpips,lpips_diversity", "batch_size": 3, **SMALL}
    found = dkdm.evaluate(student, real(), teacher=teacher, **asked)
    cond = student.conditioning.in_turns(10)
    ours, theirs = (draw(each, cond, Sampling(10, 2, 0)) for each in (student, teacher))
    assert found["lpips"] == pytest.approx(distance(ours, theirs).mean().item(), rel=1e-4)
    pairs = [distance(ours[i : i + 1], ours[j : j + 1]) for i, j in pairs_of_classes()]
    assert found["lpips_diversity"] == pytest.approx(torch.cat(pairs).mean().item(), rel=1e-4)
    with pytest.raises(UsageError, match="clip needs a text model"):
        dkdm.evaluate(student, real(), metrics="clip", **SMALL)


def pairs_of_classes():
    """Within a shard of 4 samples of 3 classes in turns; only the first and the last are alike."""
    return [(first, first + 3) for first in (0, 4)]


@pytest.mark.usefixtures("stand_in")
def test_numbers_of_single_images_need_no_reference():
    teacher, student = denoiser(), denoiser(seed=1)
    found = dkdm.evaluate(student, teacher=teacher, metrics="lpips", **SMALL)
    assert found.reference is None and found.metrics.keys() == {"lpips"}
    assert found.teacher.name == teacher.name and found.judges["lpips"] == "a stand-in"
    beside = dkdm.evaluate(student, real(), teacher=teacher, metrics="fd,lpips", **SMALL)
    both, single = (
        dict(evaluation_in_words(each))
        for each in (beside, replace(found, reference=beside.reference))
    )
    assert both["judged by"] == single["judged by"] == "a stand-in"
    assert "reference" in both and "reference" not in single
    assert found["lpips"] == beside["lpips"] > 0
    alone = dkdm.evaluate(student, metrics="lpips_diversity", **SMALL)
    assert alone["lpips_diversity"] > 0 and alone.teacher is None
    with pytest.raises(UsageError, match="--metrics kid needs a reference"):
        dkdm.evaluate(student, teacher=teacher, metrics="lpips,kid", **SMALL)


@pytest.mark.usefixtures("stand_in")
def test_another_teacher_of_the_same_name_is_drawn_again():
    first, second, student = denoiser(), denoiser(seed=2), denoiser(seed=1)
    assert first.name == second.name
    found = [
        dkdm.evaluate(student, teacher=teacher, metrics="lpips", **SMALL)["lpips"]
        for teacher in (first, second, first)
    ]
    assert found[0] == found[2] != found[1]


@pytest.mark.usefixtures("stand_in")
def test_lpips_of_what_is_no_image_is_refused_before_work():
    model, counts = counting(
        dkdm.Denoiser(
            lambda x, t: x, dkdm.from_betas(torch.linspace(1e-3, 0.2, 20)), "epsilon", (6,)
        )
    )
    with pytest.raises(UsageError, match=r"lpips_diversity: grey or RGB .* shape \(6,\)"):
        dkdm.evaluate(model, metrics="lpips_diversity", **SMALL)
    assert not counts


def test_the_former_name_of_the_gap_is_read(tmp_path):
    found = dkdm.evaluate(denoiser(seed=1), teacher=denoiser(), num_samples=4, steps=2)
    values = found.as_dict()
    values["gaps"] = values.pop("gap")
    (tmp_path / "old.json").write_text(json.dumps(values))
    assert Evaluation.read(tmp_path / "old.json") == found


def test_a_run_names_its_teacher_its_guidance_and_its_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DKDM_DATA_HOME", str(tmp_path / "home"))
    run, config = tmp_path / "run", dkdm.DistillConfig(teacher="factories:teacher")
    write_pipeline(run, denoiser(seed=1))
    (run / "config.json").write_text(to_json(replace(config, guidance_scale="2:4")))
    with pytest.raises(UsageError, match="names code as its teacher, factories:teacher. If you"):
        dkdm.evaluate(run, metrics="gap", **SMALL)
    with pytest.raises(UsageError, match="nothing can be measured"):
        dkdm.evaluate(run, **SMALL)
    assert "note: the distance to the teacher is left out" in capsys.readouterr().err
    remember({"spec": "factories:teacher"}, "factories")
    found = dkdm.evaluate(run, metrics="gap", **SMALL)
    assert (found.teacher.name, found.teacher.guidance_scale) == ("factories:teacher", 3)
    assert (found.model.name, found.model.guidance_scale) == (str(run), 1)
    assert found.model.weights == "of step 1,000, EMA, decay 0.9999"


@pytest.mark.parametrize(
    ("spec", "is_model"),
    [
        ("builtin:fashion", True),
        ("my_nets:teacher", True),
        ("owner/name", True),
        ("fashion-test", False),
        ("images", False),
        ("statistics.npz", False),
        ("weights.safetensors", True),
        ("samples.safetensors", False),
    ],
)
def test_a_reference_is_a_model_or_images(spec, is_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("statistics.npz", "weights.safetensors"):
        (tmp_path / name).touch()
    save_file({"samples": torch.zeros(2, 1, 8, 8)}, "samples.safetensors")
    assert names_model(spec) is is_model


COMMAND = (
    *("evaluate", "factories:teacher", "--teacher", "factories:teacher"),
    *("--num-samples", "10", "--steps", "2"),
)


def test_the_command_prints_values_and_floors(tmp_path, capsys):
    assert main([*COMMAND, "--json", str(tmp_path / "a.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["value", "floor"]
    assert lines[1].startswith("distance to the teacher's samples")
    how = " ".join(" ".join(lines).split())
    assert "samples 10, seed 0; sampler ddim, 2 steps; guidance none; weights as they" in how
    assert "teacher factories:teacher, guidance none; distance of 10 samples of each" in how
    assert "gap on 10 samples of the teacher, at" in how and how.endswith("noise levels")
    assert json.loads((tmp_path / "a.json").read_text())["gap"]["num_samples"] == 10
    assert main([*COMMAND, "--metrics", "fun"]) == 2
    assert "there is no 'fun'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    folder = os.path.dirname(__file__)
    start = ("from dkdm.evaluation import shards; shards.SHARD = 4; import sys; "
             "from dkdm.cli import main; sys.exit(main(sys.argv[1:]))")  # fmt: skip
    script = tmp_path / "start.py"
    script.write_text(start)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    found = []
    for name, prefix, share in (("one", (), "10/10"), ("two", launch, "6/6")):
        files = ["--output", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json")]
        command = [sys.executable, *prefix, str(script), *COMMAND, *files]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("distance to the teacher's samples") == 1
        assert done.stderr.count(f"drawing from factories:teacher: {share}") == 2  # the first's
        found.append(Evaluation.read(tmp_path / f"{name}.json"))
    assert found[0] == found[1]
    assert len(list((tmp_path / "two").rglob("*.safetensors"))) == 6
