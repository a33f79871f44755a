"""Weights of NVlabs/edm and NVlabs/edm2; numbers are their own code's."""

import pytest
import torch
from diffusers import AutoencoderKL

import dkdm
from dkdm import DkdmError, UsageError, load_teacher
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.steps import reverse_step
from dkdm.models import LoadOptions
from dkdm.networks.edm import SongUNet
from dkdm.students import student_of
from formula_weights import few, numbers, state_of
from original_files.edm import KINDS, checkpoint
from small_runs import run

QUICK = {"max_train_steps": 2, "evaluation_samples": 0, "gradient_checkpointing": True}
LABELS = torch.tensor([0, 3, 1])
# The original's F at t = 0, 500, 999, and the states after one Euler step, over 1 + sigma.
OUTPUTS = {
    "ddpmpp": [-0.4636348, 0.3564743, -0.5246332, 0.8824313, 1.337219, 0.3288337, 0.2857294],
    "ncsnpp": [0.4052279, 1.0163558, 0.1078833, -0.272323, 0.7440175, -0.1236373, 0.3662759],
    "adm": [-0.1798707, 0.4609907, 0.7892973, -0.4701749, 0.3616564, -0.0978004, 0.2712906],
    "edm2": [-0.0278183, 0.010057, -0.1914576, 0.0518334, 0.0027095, 0.0372843, 0.0085253],
    "edm2-pixels": [0.0042221, -0.0450398, -0.0439957, -0.2132702, -0.204443, 0.0940263, 0.0092651],
}
STEPS = {
    "ddpmpp": [-0.0055432, 0.002965, -0.0725555, 0.8515082, 0.0372469, -1.0795544, 0.4942547],
    "ncsnpp": [-0.0038089, 0.0042821, -0.0717709, 0.8500758, 0.0372269, -1.0795697, 0.49417],
    "adm": [-0.0049768, 0.0031736, -0.0709257, 0.8498304, 0.0372141, -1.0795688, 0.4942604],
    "edm2": [-0.0046733, -0.0016682, -0.1759152, 0.0269652, -0.018252, -0.9701895, 0.5051137],
    "edm2-pixels": [-0.0046094, 0.0021635, -0.0719593, 0.850149, 0.037195, -1.0795623, 0.4942156],
}


def saved(tmp_path, state):
    torch.save(state, tmp_path / "model.pt")
    return str(tmp_path / "model.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_the_original(tmp_path, kind):
    teacher = load_teacher(saved(tmp_path, checkpoint(kind)))
    t = torch.tensor([0, 500, 999])
    sigma = teacher.process.sigma[t]
    x = numbers("x", 3, *teacher.sample_shape)
    x = x * per_sample(sigma, x)
    cond = {"class_labels": LABELS} if "num_class_embeds" in KINDS[kind][1] else {}
    prediction = teacher.predict(Batch(x, t, cond, t))
    assert few(prediction.output) == pytest.approx(OUTPUTS[kind], abs=1e-5)
    z = torch.zeros_like(x)
    moved = reverse_step(teacher.process, teacher.parameterization, x, prediction, t, t - 1, z, 0)
    assert few(moved / per_sample(1 + sigma, x)) == pytest.approx(STEPS[kind], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_file_tells_the_config(tmp_path, kind):
    cls, config = KINDS[kind]
    network = load_teacher(saved(tmp_path, checkpoint(kind))).network
    expected = cls(sample_size=16, **config).config
    assert {name: network.config[name] for name in expected if name[0] != "_"} == {
        name: value for name, value in expected.items() if name[0] != "_"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(tmp_path, kind):
    teacher = load_teacher(saved(tmp_path, checkpoint(kind)), options=LoadOptions(dtype="bfloat16"))
    assert teacher.dtype == torch.bfloat16


def test_head_that_estimates_uncertainty_is_left_out(tmp_path):
    head = {"logvar_fourier.freqs": torch.ones(8), "logvar_linear.weight": torch.ones(1, 8)}
    teacher = load_teacher(saved(tmp_path, checkpoint("edm2") | head))
    assert teacher.conditioning == dkdm.ClassLabels(4)


def test_autoencoder_must_standardize_as_edm2_does(tmp_path):
    path = saved(tmp_path, checkpoint("edm2"))
    autoencoder = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    options = LoadOptions(flags=f"--vae {tmp_path}/vae")
    autoencoder.save_pretrained(tmp_path / "vae")
    with pytest.raises(UsageError, match='"latents_mean": \\[5.81'):
        load_teacher(path, options=options)
    autoencoder.register_to_config(
        scaling_factor=0.5, latents_mean=[5.0] * 4, latents_std=[4.0] * 4
    )
    autoencoder.save_pretrained(tmp_path / "vae")
    assert load_teacher(path, options=options).bundle.autoencoder is not None


def test_augmentation_and_the_wrapper_may_be_there_or_not(tmp_path):
    state = checkpoint("ddpmpp")
    bare = {name.removeprefix("model."): value for name, value in state.items()}
    augmented = state | {"model.map_augment.weight": torch.ones(8, 9)}
    for found in (load_teacher(saved(tmp_path, one)) for one in (bare, augmented)):
        assert found.conditioning == dkdm.ClassLabels(4)


def test_without_a_label_the_class_is_nothing():
    network = SongUNet(sample_size=16, **KINDS["ddpmpp"][1])
    network.load_state_dict(state_of(network.state_dict()))
    x, time = numbers("x", 1, 3, 16, 16), torch.zeros(1)
    assert not torch.equal(network(x, time), network(x, time, torch.tensor([0])))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "level", "encoder"])
def test_other_weights_are_refused(tmp_path, change):
    state = checkpoint("ddpmpp")
    if change == "missing":
        del state["model.enc.8x8_block0.norm1.bias"]
    elif change == "unexpected":
        state["model.enc.8x8_aux_skip.weight"] = torch.ones(8, 3, 1, 1)
    elif change == "shape":
        state["model.map_layer1.weight"] = torch.ones(33, 32)
    elif change == "level":
        del state["model.enc.8x8_block0.conv0.weight"]
    else:
        state = {name: value for name, value in state.items() if ".enc." not in name}
    with pytest.raises(DkdmError, match=r"model\.pt"):
        load_teacher(saved(tmp_path, state))


def test_other_preconditioning_is_refused(tmp_path):
    path = saved(tmp_path, checkpoint("adm") | {"u": torch.ones(1001)})
    with pytest.raises(UsageError, match="iDDPM"):
        load_teacher(path)
    path = saved(tmp_path, checkpoint("adm"))
    with pytest.raises(UsageError, match="--precond vp: use one of edm"):
        load_teacher(path, options=LoadOptions(flags="--precond=vp"))


@pytest.mark.parametrize("kind", ["ddpmpp", "edm2"])
def test_distilled_from_a_checkpoint_file(tmp_path, kind):
    teacher = load_teacher(saved(tmp_path, checkpoint(kind)))
    student = student_of("unet-mini", teacher)
    folder, metrics, _ = run(tmp_path, teacher, student, max_train_steps=3, evaluation_samples=0)
    assert len(metrics) == 3
    again = load_teacher(str(folder))
    assert again.parameterization == teacher.parameterization
    assert again.conditioning == teacher.conditioning
    assert torch.allclose(again.process.sigma, teacher.process.sigma)


@pytest.mark.parametrize(("kind", "file"), [("ncsnpp", "edm.py"), ("edm2-pixels", "edm2.py")])
def test_student_of_the_same_architecture_is_saved_with_its_code(tmp_path, kind, file):
    teacher = load_teacher(saved(tmp_path, checkpoint(kind)))
    teacher.network.save_config(tmp_path / "student")
    student = student_of(str(tmp_path / "student" / "config.json"), teacher)
    folder, _, _ = run(
        tmp_path,
        teacher,
        student,
        max_train_steps=2,
        evaluation_samples=0,
        gradient_checkpointing=True,
    )
    assert (folder / "unet" / file).is_file()
    assert isinstance(load_teacher(str(folder)).network, KINDS[kind][0])
