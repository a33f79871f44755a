"""Students: presets of the published sizes, the listing, and whatever a user hands over instead."""

import dataclasses
import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import pipelines
from dkdm.checks.memory_plan import PlannedRun, plan
from dkdm.checks.student_table import StudentRow, list_students, print_students
from dkdm.config import MeasureOptions
from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional
from dkdm.core.denoisers.denoiser import Batch
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.cost import count_macs
from dkdm.models import LoadOptions, sketch_teacher, with_texts
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import PRESETS, Interface, build_network, student_of, untried_student_of
from factories import denoiser, tiny_unet

# Parameters of the reference network of arXiv 2105.05233 with the paper's settings: 3x32x32,
# learned variance, widths 1, 2, 2, 2, attention at 16 and 8.
PAPER_SIZES = {
    "unet-14m": 14_301_446,
    "unet-24m": 24_866_214,
    "unet-32m": 32_136_582,
    "unet-44m": 44_177_286,
    "unet-57m": 57_094_662,
}
SMALL = ("unet-tiny", "dit-xs")


@pytest.fixture(scope="module")
def teacher():
    return denoiser()


@pytest.fixture(scope="module")
def rows(teacher):
    """The listing of some presets: all of them take ten seconds."""
    few = {name: PRESETS[name] for name in PRESETS if name in (*SMALL, "unet-14m", "dit-s")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dkdm.checks.student_table.PRESETS", few)
        return {row.name: row for row in list_students(teacher)}


def on_meta(name, shape, out_channels, conditioning=None):
    with torch.device("meta"):
        return build_network(name, Interface(shape, out_channels, conditioning or Unconditional()))


def num_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_unet_has_the_papers_number_of_parameters(name):
    assert num_parameters(on_meta(name, (3, 32, 32), 6)) == PAPER_SIZES[name]
    assert name == f"unet-{PAPER_SIZES[name] // 10**6}m"


def test_adm_unet_runs_and_its_resolution_changes_are_residual_blocks():
    network = build_network("unet-14m", Interface((3, 32, 32), 6, ClassLabels(3, null_class=3)))
    output = network(torch.zeros(1, 3, 32, 32), torch.tensor([5]), torch.tensor([3])).sample
    assert output.shape == (1, 6, 32, 32)
    assert network.config.down_block_types[0] == "ResnetDownsampleBlock2D"


@pytest.mark.parametrize("name", SMALL)
def test_listed_numbers_are_those_of_the_built_network(rows, teacher, name):
    student = student_of(name, teacher)
    row = rows[name]
    assert row.parameters == student.num_parameters
    assert row.macs == count_macs(student)
    assert row.parameter_ratio == student.num_parameters / teacher.num_parameters
    assert row.mac_ratio == row.macs / count_macs(teacher)
    assert row.misfit is None


def test_listing_says_why_a_preset_does_not_fit(rows, teacher, monkeypatch):
    assert set(rows) == {*SMALL, "unet-14m", "dit-s"}
    assert all(row.parameters for row in rows.values())
    odd = replace(teacher, sample_shape=(1, 6, 6))
    monkeypatch.setattr("dkdm.checks.student_table.PRESETS", {"unet-tiny": PRESETS["unet-tiny"]})
    [row] = list_students(odd)
    assert row.parameters is None
    assert "divisible by 4; the samples are 6x6" in row.misfit


def test_printed_listing(rows, teacher):
    teacher = replace(teacher, name="runs/[a]")
    misfit = StudentRow("no-fit", "never shown", misfit="too square")
    weightless = StudentRow("free", "no teacher to compare", 2_500_000, None, 10, None)
    stream = io.StringIO()
    found = [*rows.values(), misfit, weightless]
    print_students(found, teacher, Console(file=stream, width=140))
    text = stream.getvalue()
    assert "Students for runs/[a]: samples of 1 x 8 x 8" in text
    assert "too square" in text
    assert "never shown" not in text
    assert "2.50 M" in text
    assert all(name in text for name in rows)
    json.dumps([dataclasses.asdict(row) for row in found], allow_nan=False)


def only(monkeypatch, *names):
    monkeypatch.setattr(
        "dkdm.checks.student_table.PRESETS", {name: PRESETS[name] for name in names}
    )


def test_listing_measures_small_networks_beside_the_teacher(teacher, monkeypatch):
    only(monkeypatch, "dit-tiny", "dit-s")
    measuring = MeasureOptions(measure_batch_size=2, measure_below=1, steps=10)
    seen = []

    def speeds(models, batch_size, seconds):
        seen.append([model.num_parameters for model in models])
        assert (batch_size, seconds) == (2, 0.0)
        return [300.0, 100.0]

    monkeypatch.setattr("dkdm.checks.student_table.evaluations_in_turns", speeds)
    small, large = list_students(teacher, measuring, seconds=0.0)
    assert seen == [[small.parameters, teacher.num_parameters]]
    assert (small.samples_per_second, small.speed_ratio) == (30.0, 3.0)
    assert "10 sampler steps, batches of 2, " in small.measured
    assert large.parameters > 1e6
    assert large.samples_per_second is large.speed_ratio is large.measured is None


def test_sketched_teacher_is_measured_with_random_weights(tmp_path, monkeypatch):
    write_pipeline(tmp_path, denoiser(3))
    only(monkeypatch, "dit-tiny", "dit-xs")
    sketched = sketch_teacher(str(tmp_path), LoadOptions())
    assert sketched.device.type == "meta"
    row, _ = list_students(sketched, MeasureOptions(measure_batch_size=1), seconds=0.0)
    assert row.samples_per_second > 0
    assert row.speed_ratio > 0
    with torch.device("meta"):
        larger = untried_student_of("dit-xs", sketched)
    assert larger.num_parameters > row.parameters
    only(monkeypatch, "dit-tiny")
    below = MeasureOptions(measure_batch_size=1, measure_below=row.parameters / 1e6)
    [alone] = list_students(larger, below, seconds=0.0)
    assert alone.samples_per_second > 0
    assert alone.speed_ratio is None


@pytest.mark.parametrize("name", ["measure_batch_size", "steps"])
def test_impossible_measurement_is_refused(name):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}.* 1 or more"):
        MeasureOptions(**{name: 0})


@pytest.mark.parametrize(("width", "cell"), [(160, "2.50 (1.5x)"), (80, "(1.5x)")])
@pytest.mark.parametrize(("shape", "unit"), [((1, 8, 8), "images/s"), ((2, 64), "samples/s")])
def test_printed_listing_shows_measured_speed(teacher, width, cell, shape, unit):
    row = StudentRow("dit-x", "a summary that is read", 10, 0.1, 10, 0.1, 2.5, 1.5, "here")
    stream = io.StringIO()
    console, of = Console(file=stream, width=width), replace(teacher, sample_shape=shape)
    print_students([row], of, console, MeasureOptions())
    text = stream.getvalue()
    assert f"{unit}: 50 sampler steps, batches of 8" in text
    assert cell in text
    assert "summary" in text
    print_students([row], of, console)
    assert unit not in stream.getvalue().removeprefix(text)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "conditioning", [Unconditional(), ClassLabels(3), ClassLabels(3, null_class=3)], ids=str
)
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_presets_fit_every_conditioning_and_variance(teacher, name, conditioning, variance):
    wanted = replace(
        teacher,
        conditioning=conditioning,
        parameterization=replace(teacher.parameterization, variance=variance),
    )
    student = student_of(name, wanted)
    random = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 49])
    batch = Batch(torch.randn(2, 1, 8, 8, generator=random), t, conditioning.draw(2, random), t)
    prediction = student.predict(batch)
    assert prediction.eps.isfinite().all()
    assert (prediction.variance_output is not None) == (variance == "learned_range")
    assert student.process is teacher.process


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unet-99m", r"unknown student 'unet-99m': give a preset \(unet-\d+m, .*, the path of"),
        ("xx", "unknown student 'xx': give a preset .*unet-mini, .*uvit-s, .*shallow-50"),
        ("no_such_module:build", "cannot import no_such_module:build"),
        ("factories:no_such_name", "cannot import factories:no_such_name"),
        ("factories:not_a_model", "returned list: return an nn.Module"),
        ("factories:wide_student", r"returned \(2, 3, 8, 8\).* must return \(2, 1, 8, 8\)"),
        ("absent/config.json", "absent: config.json is missing: give a student's config"),
    ],
)
def test_what_is_no_student_is_refused(teacher, spec, message):
    with pytest.raises(UsageError, match=message):
        student_of(spec, teacher)


def test_error_inside_a_factory_is_passed_on_with_its_name(teacher):
    with pytest.raises(DkdmError, match="factories:raising raised RuntimeError: no luck"):
        student_of("factories:raising", teacher)


@pytest.mark.parametrize("shape", [(4, 16), (1, 8, 12)])
def test_dit_wants_square_images(teacher, shape):
    with pytest.raises(UsageError, match="images|square"):
        student_of("dit-xs", replace(teacher, sample_shape=shape))


def test_an_output_that_is_not_finite_at_an_outermost_level_is_refused(teacher):
    expected = r"own_networks:LogOfTime: .* at the first level is not finite \(it is fed t = 0\)"
    with pytest.raises(UsageError, match=expected):
        student_of("own_networks:LogOfTime", teacher)


def config_file(folder, config):
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def test_student_from_a_diffusers_config(teacher, tmp_path):
    network = tiny_unet(classes=4)
    network.save_config(tmp_path)
    student = student_of(str(tmp_path / "config.json"), teacher)
    assert student.num_parameters == num_parameters(network)
    assert student.network.config.num_class_embeds == 4


def test_config_of_an_unconditional_network_does_not_fit_a_teacher_with_classes(teacher, tmp_path):
    tiny_unet().save_config(tmp_path)
    with pytest.raises(UsageError, match=r"does not fit .* conditions class_labels \["):
        student_of(str(tmp_path / "config.json"), teacher)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json cannot be read as JSON"),
        ("[]", "config.json: "),
        ({}, "must name a diffusers model"),
        ({"_class_name": "NoSuchModel"}, "must name a diffusers model"),
        ({"_class_name": "DDPMScheduler"}, "must name a diffusers model"),
        (
            {"_class_name": "UNet2DModel", "in_channels": 1, "block_out_channels": [32]},
            "UNet2DModel cannot be made of it",
        ),
    ],
)
def test_config_that_is_no_network_is_refused(teacher, tmp_path, config, message):
    with pytest.raises(UsageError, match=message):
        student_of(config_file(tmp_path, config), teacher)


def test_a_student_without_text_does_not_fit_a_teacher_with(tmp_path, monkeypatch):
    few = {name: PRESETS[name] for name in ("unet-tiny", "text-unet-tiny")}
    monkeypatch.setattr("dkdm.checks.student_table.PRESETS", few)
    pipelines.stable_diffusion().save_pretrained(tmp_path)
    teacher = sketch_teacher(str(tmp_path), LoadOptions())
    rows = {row.name: row for row in list_students(with_texts(teacher, None))}
    assert "reads no text" in rows["unet-tiny"].misfit
    assert rows["text-unet-tiny"].parameters
    with pytest.raises(UsageError, match="unet-tiny: the student reads no text, and the teacher"):
        plan(teacher, PlannedRun(student="unet-tiny", pool_size=8))
