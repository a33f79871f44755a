"""What is told wrongly of a network is found, and the printed line denoises."""

import dataclasses
import json
import shutil
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dkdm
from dkdm.checks.inspection import check_denoising, read_samples
from dkdm.checks.inspection.readings import TIMES, Change, applied, code_of, cure_of
from dkdm.checks.inspection.remedy import corrected
from dkdm.cli import main
from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import karras, rectified_flow
from dkdm.core.diffusion.time import network_time
from dkdm.core.saving.checkpoint import write_tensors
from dkdm.errors import UsageError
from dkdm.models import load_teacher
from dkdm.models.components import Autoencoder, Component
from dkdm.models.schedulers import from_scheduler_config

STEPS = 12
AS_FLOW = (
    "dkdm.Denoiser(network, dkdm.rectified_flow(1000), "
    'dkdm.Parameterization("flow_prediction"), (3, 8, 8)'
)
FLOW = rectified_flow(1000)
LINEAR = from_scheduler_config({"_class_name": "DDPMScheduler", "clip_sample": False})
EDM = karras(1000)
LEARNED = Parameterization("epsilon", variance="learned_range")


def mixture():
    means = torch.sign(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    return GaussianMixture.of(means, 0.1)


def exact(process, kind, time=None):
    """The exact network, which is fed what `time` says."""
    if time is not None:
        process = replace(process, network_time=network_time(process, time))
    return mixture_denoiser(mixture(), process, Parameterization(kind)).network


def read(network, process, kind, time=None):
    return dkdm.Denoiser(network, process, Parameterization(kind), (3, 8, 8), time=time)


def minus(network):
    return lambda x, time: -network(x, time)


def scaled(network, factor):
    return lambda x, time: network(x, time * factor)


FRACTION = exact(FLOW, "flow_prediction", "fraction")
DATA_FRACTION = exact(FLOW, "flow_prediction", "data_fraction")
TOLD_WRONGLY = {
    "sign": read(minus(FRACTION), FLOW, "flow_prediction", "fraction"),
    "reversed time": read(DATA_FRACTION, FLOW, "flow_prediction", "fraction"),
    "sign and reversed time": read(minus(DATA_FRACTION), FLOW, "flow_prediction", "fraction"),
    "time not said": read(FRACTION, FLOW, "flow_prediction"),
    "time of 1000": read(exact(FLOW, "flow_prediction"), FLOW, "flow_prediction", "fraction"),
    "sample as flow": read(exact(FLOW, "sample"), FLOW, "flow_prediction"),
    "epsilon as v": read(exact(LINEAR, "epsilon"), LINEAR, "v_prediction"),
    "sample as epsilon": read(exact(LINEAR, "sample"), LINEAR, "epsilon"),
    "minus epsilon": read(minus(exact(LINEAR, "epsilon")), LINEAR, "epsilon"),
    "reversed index": read(
        exact(LINEAR, "epsilon", lambda p: torch.arange(p.num_levels).flip(0)), LINEAR, "epsilon"
    ),
    "log SNR not said": read(exact(LINEAR, "epsilon", "log_snr"), LINEAR, "epsilon"),
    "sigma for c_noise": read(exact(EDM, "edm", "c_noise"), EDM, "edm", "sigma"),
    "D as F": read(exact(EDM, "sample", "sigma"), EDM, "edm"),
    "exploding as preserving": read(exact(EDM, "epsilon", "sigma"), LINEAR, "epsilon"),
    "flow as preserving": read(exact(FLOW, "flow_prediction"), LINEAR, "epsilon"),
}


def typed(line, model):
    """The denoiser that the printed line makes."""
    modules = {"dkdm": dkdm, "torch": torch, "dataclasses": dataclasses}
    return eval(line, modules | {"network": model.network, "process": model.process})


@pytest.mark.parametrize("name", sorted(TOLD_WRONGLY))
def test_the_printed_line_denoises(name):
    model = TOLD_WRONGLY[name]
    found = check_denoising(model, num_steps=STEPS)
    assert found.denoises is False
    assert found.cure is not None
    assert check_denoising(typed(found.cure, model), num_steps=STEPS).denoises


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "sign and reversed time",
            f'{AS_FLOW}, time="data_fraction", call=lambda network, x, time, cond: '
            "-network(x, time, **cond))",
        ),
        ("time not said", f'{AS_FLOW}, time="fraction")'),
        (
            "epsilon as v",
            'dkdm.Denoiser(network, process, dkdm.Parameterization("epsilon"), (3, 8, 8))',
        ),
    ],
)
def test_the_line_is_short_and_exact(name, line):
    found = check_denoising(TOLD_WRONGLY[name], num_steps=STEPS)
    assert found.cure == line


def test_right_flow_needs_no_cure():
    found = check_denoising(read(FRACTION, FLOW, "flow_prediction", "fraction"), num_steps=STEPS)
    assert (found.denoises, found.cure) == (True, None)


@pytest.mark.parametrize("time", TIMES, ids=lambda time: str(TIMES.index(time)))
def test_code_of_a_time_is_what_it_says(time):
    written = eval(code_of(time), {"torch": torch})
    for process in (LINEAR, EDM):
        assert torch.equal(network_time(process, written), network_time(process, time))


class Table(nn.Module):
    """A time embedding of T rows, and one that counts its calls."""

    def __init__(self, rows=1000):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.last = nn.Embedding(rows, 4), nn.Conv2d(7, 3, 3, padding=1)

    def forward(self, x, time):
        rows = self.table(time.long())[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.last(torch.cat([x, rows], 1))


@pytest.mark.parametrize("rows", [1000, 1500])
def test_a_table_of_times_is_no_crash(rows):
    found = check_denoising(read(Table(rows), LINEAR, "epsilon"), num_steps=10, max_trials=30)
    assert found.denoises is False
    assert "other prediction types, times, signs and schedules" in found.warnings[0].remedy


class Random(nn.Module):
    def __init__(self, seed, gain):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1)
        )
        for weight in self.body.parameters():
            weight.data *= gain

    def forward(self, x, time):
        share = (time / 1000).sin()[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.body(torch.cat([x, share], 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gain", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("process", "kind"), [(LINEAR, "epsilon"), (FLOW, "flow_prediction")])
def test_no_reading_of_a_random_network_passes(seed, gain, process, kind):
    found = check_denoising(read(Random(seed, gain), process, kind), num_steps=10)
    assert (found.denoises, found.cure) == (False, None)


def curves(count, random):
    """Smooth signals [N, 1, 8]."""
    phase = torch.rand(count, 1, generator=random)
    return (6.28 * (torch.linspace(0, 1, 8) + phase)).sin()[:, None]


def truncated():
    """The exact model of curves on levels that end at a signal-to-noise ratio of 0.57."""
    betas = torch.linspace(1e-4, 0.02, 100)
    process = dkdm.from_betas(betas)
    own = GaussianMixture.of(curves(12, torch.Generator().manual_seed(0)).double(), 0.1)
    return mixture_denoiser(own, process, Parameterization("epsilon")), own


def test_a_schedule_that_does_not_end_in_noise_is_judged_by_real_samples():
    model, own = truncated()
    real = own.sample(32, torch.Generator().manual_seed(1)).float()
    found = check_denoising(model, num_steps=STEPS, images=real)
    assert found.denoises
    assert "does not end in noise: SNR 0.571" in found.warnings[0].what
    wrong = replace(model, parameterization=Parameterization("v_prediction"))
    found = check_denoising(wrong, num_steps=STEPS, images=real)
    assert found.denoises is False
    assert 'Parameterization("epsilon")' in found.cure


def test_without_real_samples_there_is_no_verdict_against_it():
    model, _ = truncated()
    wrong = replace(model, network=lambda x, time: 3 * x + 0 * time[0])
    found = check_denoising(wrong, num_steps=STEPS, max_trials=3)
    assert found.denoises is None
    assert "--samples FILE" in found.warnings[0].remedy


def test_folders_get_entries_files_get_flags_and_the_rest_python(tmp_path):
    model = read(exact(LINEAR, "sample"), LINEAR, "epsilon")
    change = cure_of(model, own_chains, 0)
    folder = replace(model, bundle=replace(model.bundle, pipeline="DDPMPipeline"), name="mine")
    expected = 'write "prediction_type": "sample" in the scheduler_config.json of mine'
    assert corrected(folder, change) == expected
    (tmp_path / "a.pt").touch()
    file = replace(model, name=str(tmp_path / "a.pt"))
    assert '--flags "--predict_xstart True"' in corrected(file, change)
    turned = replace(change, negated=True)
    assert "dkdm.load_teacher('mine')" in corrected(folder, turned)
    assert "-teacher.call(network, x, time, cond)" in corrected(folder, turned)
    assert applied(model, change).parameterization.prediction == "sample"


class Both(nn.Module):
    """The exact mean with a variance channel beside it, and the sign of the mean turned."""

    def forward(self, x, time):
        return torch.cat([-exact(LINEAR, "epsilon")(x, time), torch.full_like(x, 0.25)], 1)


def test_the_printed_line_turns_the_sign_of_the_mean_alone():
    model = replace(read(Both(), LINEAR, "epsilon"), parameterization=LEARNED)
    written = typed(corrected(model, Change(negated=True)), model)
    meant = applied(model, Change(negated=True))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([100, 500])
    pair = [each.predict(Batch(x, t, {}, t)) for each in (written, meant)]
    assert torch.equal(pair[0].output, pair[1].output)
    assert torch.equal(pair[0].variance_output, pair[1].variance_output)
    assert (pair[0].variance_output == 0.25).all()


def test_a_wrong_entry_of_a_folder_is_named_with_its_file(tmp_path):
    folder = shutil.copytree(files("dkdm") / "models" / "builtin" / "fashion", tmp_path / "mine")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))
    model = load_teacher(str(folder))
    line = corrected(model, Change(prediction="v_prediction"))
    assert line == f'write "prediction_type": "v_prediction" in {file}'
    assert "dataclasses.replace" in corrected(model, Change(time=TIMES[1]))


def test_clipping_that_cuts_the_data_is_found():
    process = replace(LINEAR, clipping=dkdm.Clipping(range=0.3))
    model = read(exact(LINEAR, "epsilon"), process, "epsilon")
    found = check_denoising(model, num_samples=2, num_steps=10)
    assert found.denoises is False
    assert "(process, clipping=dkdm.Clipping())" in found.cure


class Deaf(nn.Module):
    """Follows its label and ignores its input: it predicts its own samples perfectly."""

    def forward(self, x, time, class_labels):
        shade = (class_labels - 1.0).reshape(-1, 1, 1, 1)
        return shade.expand_as(x) + 1e-3 * x + 0 * time.reshape(-1, 1, 1, 1)


def test_a_network_that_ignores_its_input_is_not_cured():
    deaf = replace(read(Deaf(), LINEAR, "epsilon"), conditioning=dkdm.ClassLabels(3))
    assert check_denoising(deaf, num_samples=2, num_steps=10, max_trials=12).cure is None


def test_images_are_samples_of_pixels_and_refused_for_latents(tmp_path):
    for number in range(3):
        shade = Image.fromarray(np.full((8, 8, 3), 127 * number, dtype=np.uint8))
        shade.save(tmp_path / f"{number}.png")
    model = read(FRACTION, FLOW, "flow_prediction")
    found = read_samples(tmp_path, replace(model, value_range=(0.0, 1.0)))
    shades = torch.tensor([0.0, 127 / 255, 254 / 255]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(found, shades.expand(3, 3, 8, 8), rtol=0, atol=1e-6)
    coder = Autoencoder(Component(tmp_path, "diffusers", "AutoencoderKL"))
    latent = replace(model, bundle=Bundle(autoencoder=coder))
    with pytest.raises(UsageError, match="works on latents .* give an array of these as .npy"):
        read_samples(tmp_path, latent)


def own_chains(reading):
    from dkdm.checks.inspection.denoising import drawn_samples

    return drawn_samples(reading, 2, 10, 0)


def test_samples_are_read_from_every_kind_of_file(tmp_path):
    model = read(FRACTION, FLOW, "flow_prediction", "fraction")
    array = torch.randn(5, 3, 8, 8)
    np.save(tmp_path / "a.npy", array.numpy())
    np.savez(tmp_path / "a.npz", other=np.zeros(3), samples=array.numpy())
    torch.save({"samples": array}, tmp_path / "a.pt")
    write_tensors(tmp_path / "a.safetensors", {"samples": array})
    for suffix in ("npy", "npz", "pt", "safetensors"):
        assert torch.equal(read_samples(tmp_path / f"a.{suffix}", model), array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npy", None, "no such file"),
        ("a.npy", b"rubbish", "cannot be read"),
        ("a.npz", b"rubbish", "cannot be read"),
        ("a.pt", b"rubbish", "cannot be read"),
        ("a.safetensors", b"rubbish", "cannot be read"),
        ("a.txt", b"rubbish", r"give a .*\.npy, .* file, or a folder of images"),
    ],
)
def test_samples_that_cannot_be_read_are_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_samples(tmp_path / name, read(FRACTION, FLOW, "flow_prediction"))
    assert "\n" not in str(caught.value)


def test_samples_of_another_shape_and_pickles_are_refused(tmp_path):
    model = read(FRACTION, FLOW, "flow_prediction")
    np.save(tmp_path / "a.npy", np.zeros((4, 1, 8, 8)))
    with pytest.raises(UsageError, match="found \\(4, 1, 8, 8\\)"):
        read_samples(tmp_path / "a.npy", model)
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(tmp_path / "b.npy", model)


def wrong_teacher():
    return TOLD_WRONGLY["time not said"]


def test_inspect_exits_with_one_and_prints_the_line(capsys):
    assert main(["inspect", "test_readings:wrong_teacher", "--steps", "10"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert 'time="fraction")' in text
