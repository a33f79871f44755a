"""Checkpoints of guided-diffusion, improved-diffusion and DDPM-IP; numbers are their own code's."""

import pytest
import torch

from dkdm import ClassLabels, DkdmError, Unconditional, UsageError, load_teacher
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.diffusion.steps import reverse_step
from dkdm.models import LoadOptions
from dkdm.networks.adm import AdmUNet
from dkdm.students import as_denoiser
from factories import tiny_unet
from formula_weights import few, filled, numbers
from original_files.guided import (
    CONFIG,
    GUIDED,
    GUIDED_FLAGS,
    IMPROVED,
    IMPROVED_FLAGS,
    PERTURBED,
    PERTURBED_FLAGS,
)
from small_runs import run

# What `p_sample` of the named repository gives, made by its own script_util from these flags.
ORIGINALS = {
    "guided-diffusion": (
        GUIDED,
        GUIDED_FLAGS,
        [-1.0, 1.0059733, -1.2354884, -1.3912611, -0.9508139, -1.122671, 0.9370075],
    ),
    "improved-diffusion": (
        IMPROVED,
        IMPROVED_FLAGS,
        [-1.0, -0.3491569, -1.0761564, -1.3340172, -1.295252, 0.1978955, 0.9669588],
    ),
    "DDPM-IP": (
        PERTURBED,
        PERTURBED_FLAGS,
        [-0.2000353, -1.08, -0.7178789, 0.6220863, -0.8898898, 0.9823202, 0.8356795],
    ),
}


def checkpoint(folder, config=GUIDED):
    path = folder / "ema_0.9999_500000.pt"
    torch.save(filled(AdmUNet(**config)).state_dict(), path)
    return str(path)


def load(path, flags, **options):
    return load_teacher(path, options=LoadOptions(flags=flags, **options))


@pytest.mark.parametrize("name", ORIGINALS)
def test_reverse_step_is_the_originals_at_every_t(tmp_path, name):
    config, flags, expected = ORIGINALS[name]
    teacher = load(checkpoint(tmp_path, config), flags)
    levels = teacher.process.num_levels
    t = torch.arange(levels) * 7 % levels
    x, z = (numbers(name, levels, *teacher.sample_shape) for name in ("x", "z"))
    cond = {"class_labels": t % 3} if "class_cond" in flags else {}
    with torch.no_grad():
        prediction = teacher.predict(Batch(x, t, cond, t))
    moved = reverse_step(teacher.process, teacher.parameterization, x, prediction, t, t - 1, z)
    assert few(moved) == pytest.approx(expected, abs=1e-5)


def test_flags_say_what_the_weights_do_not(tmp_path):
    teacher = load(checkpoint(tmp_path), GUIDED_FLAGS)
    assert teacher.sample_shape == (3, 8, 8)
    assert teacher.conditioning == ClassLabels(3)
    assert teacher.parameterization.variance == "learned_range"
    assert teacher.network_time[:3].tolist() == [0, 50, 100]
    assert teacher.process.clipping.range == 1
    assert load(checkpoint(tmp_path), GUIDED_FLAGS + " --clip_denoised False").process.clipping == (
        type(teacher.process.clipping)()
    )


def test_linear_schedule_is_scaled_to_its_length(tmp_path):
    beta = 1 - load(checkpoint(tmp_path, PERTURBED), PERTURBED_FLAGS).process.alpha[0] ** 2
    assert float(beta) == pytest.approx(1e-4 * 1000 / 40)


def test_flags_of_training_and_of_sampling_are_read_over(tmp_path):
    extra = " --use_fp16 True \\\n --timestep_respacing=100 --lr 1e-4 --input_pertub 0.15"
    teacher = load(checkpoint(tmp_path, PERTURBED), PERTURBED_FLAGS + extra, dtype="bfloat16")
    assert isinstance(teacher.conditioning, Unconditional)
    assert teacher.dtype == torch.bfloat16
    assert teacher.network_time[:3].tolist() == [0, 1, 2]


def test_distilled_student_knows_its_process(tmp_path):
    """A rescaled time is the teacher's own affair: the student is fed what its scheduler says."""
    teacher = load(checkpoint(tmp_path), GUIDED_FLAGS)
    network = AdmUNet(sample_size=8, **CONFIG, out_channels=6, num_class_embeds=3)
    student = as_denoiser("tiny", network, teacher)
    folder, metrics, _ = run(tmp_path, teacher, student, max_train_steps=3, evaluation_samples=0)
    assert len(metrics) == 3
    again = load_teacher(str(folder))
    assert again.conditioning == ClassLabels(3)
    assert again.network_time[:3].tolist() == [0, 1, 2]
    assert again.parameterization == teacher.parameterization
    torch.testing.assert_close(again.process.alpha, teacher.process.alpha)
    assert again.process.clipping == teacher.process.clipping


def test_without_flags_it_says_what_is_known_and_what_is_missing(tmp_path):
    with pytest.raises(UsageError) as error:
        load(checkpoint(tmp_path), "")
    for part in ("--num_channels 32", "--learn_sigma True", "--image_size", "--noise_schedule"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (GUIDED_FLAGS + " --large_size 256", "unknown '--large_size'"),
        (GUIDED_FLAGS + " --noise_schedule sqrt", "use one of linear, cosine"),
        (GUIDED_FLAGS + " --class_cond maybe", "use True or False"),
        (GUIDED_FLAGS + " --num_channels 64", "--num_channels 64 .* --num_channels 32"),
        (GUIDED_FLAGS + " --image_size 16", "--attention_resolutions 8, at --image_size 16"),
        (GUIDED_FLAGS + " --attention_resolutions none", "give sizes in pixels"),
        (GUIDED_FLAGS + " --num_head_channels 48", "cannot have heads of 48"),
        ("--image_size 8", "their defaults, if left out"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        load(checkpoint(tmp_path), flags)


def test_rescaling_of_time_must_be_said_where_the_repositories_differ(tmp_path):
    flags = IMPROVED_FLAGS.replace("--sigma_small True ", "")
    path = checkpoint(tmp_path, IMPROVED)
    with pytest.raises(UsageError, match="--rescale_timesteps too"):
        load(path, flags)
    assert load(path, flags + " --rescale_timesteps True").network_time[1] == 25
    assert load(path, IMPROVED_FLAGS).network_time[1] == 25
    assert load(path, flags + " --diffusion_steps 1000").network_time[1] == 1


def test_weights_that_are_not_whole_are_refused(tmp_path):
    state = filled(AdmUNet(**GUIDED)).state_dict()
    for missing, message in (
        ("middle_block.2.in_layers.0.bias", "1 missing .*Nothing was loaded"),
        ("input_blocks.1.0.emb_layers.1.weight", "not a whole checkpoint"),
    ):
        path = tmp_path / "part.pt"
        torch.save({key: value for key, value in state.items() if key != missing}, path)
        with pytest.raises(DkdmError, match=message):
            load(str(path), GUIDED_FLAGS)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.pkl").write_bytes(b"")
    with pytest.raises(UsageError, match="dkdm never opens one"):
        load(str(tmp_path / "model.pkl"), GUIDED_FLAGS)
    torch.save(tiny_unet().state_dict(), tmp_path / "other.pt")
    with pytest.raises(UsageError, match="the weights of a diffusers network without its config"):
        load(str(tmp_path / "other.pt"), GUIDED_FLAGS)
    with pytest.raises(DkdmError, match="not a whole checkpoint of openai/guided-diffusion"):
        load_teacher(str(tmp_path / "other.pt"), format="guided-diffusion")
