"""Checkpoints of CompVis/latent-diffusion; expected numbers are its own code's."""

import json

import diffusers
import pytest
import torch

from dkdm import ClassLabels, DkdmError, Unconditional, UsageError, load_teacher
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.diffusion.steps import reverse_step
from dkdm.models import LoadOptions
from dkdm.networks.adm import AdmUNet
from dkdm.students import as_denoiser
from formula_weights import few, numbers
from original_files.latent import CLASSES, CODERS, UNETS, checkpoint, load
from small_runs import run

# What the repository's UNetModel, Encoder and Decoder give with the weights of `checkpoint`.
OUTPUTS = {
    "vq": [-0.3140684, -0.3463426, -0.0727054, -0.8923086, -0.00463, 0.531456, 0.3435922],
    "kl": [-0.2773806, -0.94593, 0.4608644, -0.3573448, -0.2752587, 0.0435554, 0.3190955],
    "class": [-0.2791336, 0.1414333, -0.4937281, -0.2514805, 0.1112012, -0.1576535, 0.3369456],
}
ENCODED = {
    "vq": [-0.2151386, -1.0606239, 0.5744963, 0.9051818, 0.0405477, 0.0774638, 0.3185046],
    "kl": [-0.2123248, -0.9824619, -0.8243141, -1.4682661, 0.224702, 0.1127316, 0.3599771],
    "class": [-0.3614929, 0.2968248, -0.4616485, 0.1536659, -0.4521591, -1.0246713, 0.2866037],
}
DECODED = {
    "vq": [-0.0350652, -0.1005305, -0.5595514, 0.3231185, 0.6481658, -0.2150287, 0.3580556],
    "kl": [-0.0509705, -0.8595037, -1.370324, -1.2041126, 0.0450321, 0.3457436, 0.339392],
    "class": [-0.0550733, -0.2943533, -0.1604237, -0.336205, 1.5586858, 0.2047326, 0.3416193],
}
# Its `p_sample` for twenty levels, each sample at another one.
MOVED = [-2.3056595, 1.1370156, -1.3852954, -1.2075258, -0.9705279, -1.0529962, 1.0143469]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Where autoencoders are written."""
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "autoencoders"


def output(teacher):
    t = torch.tensor([3, 712]) if teacher.process.num_levels > 712 else torch.tensor([3, 12])
    x = numbers("x", 2, *teacher.sample_shape)
    cond = (
        {} if isinstance(teacher.conditioning, Unconditional) else teacher.conditioning.of([0, 4])
    )
    with torch.no_grad():
        return few(teacher.predict(Batch(x, t, cond, t)).output)


@pytest.mark.parametrize("kind", UNETS)
def test_unet_gives_the_numbers_of_the_original(tmp_path, kind):
    teacher = load(tmp_path, kind, timesteps=1000)
    assert output(teacher) == pytest.approx(OUTPUTS[kind], abs=1e-5)
    assert isinstance(teacher.conditioning, ClassLabels) == (kind == "class")


@pytest.mark.parametrize("kind", CODERS)
def test_autoencoder_gives_the_numbers_of_the_original(tmp_path, kind):
    coder = load(tmp_path, kind, scale_factor=0.5).bundle.autoencoder
    side = CODERS[kind]["resolution"] // 2 ** (len(CODERS[kind]["ch_mult"]) - 1)
    with torch.no_grad():
        encoded = coder.network.encode(numbers("image", 1, 3, *[CODERS[kind]["resolution"]] * 2))
    raw = encoded.latent_dist.parameters if kind == "kl" else encoded.latents
    assert few(raw) == pytest.approx(ENCODED[kind], abs=2e-5)
    latents = numbers("latents", 2, CODERS[kind]["z_channels"], side, side)
    assert few(coder.decode(0.5 * latents)) == pytest.approx(DECODED[kind], abs=2e-5)


def test_reverse_step_is_the_originals_at_every_t(tmp_path):
    teacher = load(tmp_path, "vq")
    t = torch.arange(20) * 7 % 20
    x, z = numbers("x", 20, 3, 8, 8), numbers("z", 20, 3, 8, 8)
    with torch.no_grad():
        prediction = teacher.predict(Batch(x, t, {}, t))
    moved = reverse_step(teacher.process, teacher.parameterization, x, prediction, t, t - 1, z)
    assert few(moved) == pytest.approx(MOVED, abs=1e-5)


def test_averaged_weights_are_taken_where_asked_for(tmp_path):
    state, prefix = checkpoint("vq"), "model.diffusion_model."
    own = [key for key in state if key.startswith(prefix)]
    average = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": key for key in own}
    both = state | {name: state[key] for name, key in average.items()}
    both |= {key: torch.zeros_like(state[key]) for key in own}
    both["model_ema.decay"] = torch.tensor(0.9999)
    averaged = output(load(tmp_path, "vq", both))
    assert averaged == output(load(tmp_path, "vq", state))
    assert not any(output(load(tmp_path, "vq", both, ema=False)))
    del both["model_ema.diffusion_modelout0weight"]
    with pytest.raises(DkdmError, match=r"1 of the averaged weights are missing \(out.0.weight\)"):
        load(tmp_path, "vq", both)


def test_scale_of_the_latents_comes_from_file_or_config(tmp_path):
    def scale(state=None, **params):
        teacher = load(tmp_path, "kl", state, **params)
        return teacher.bundle.autoencoder.config["scaling_factor"]

    assert scale() == 1
    assert scale(scale_factor=0.18) == 0.18
    measured = checkpoint("kl") | {"scale_factor": torch.tensor(0.25)}
    assert scale(measured, scale_by_std=True) == 0.25


def test_autoencoder_is_written_once(tmp_path, folders):
    for kind in ("vq", "kl", "vq"):
        load(tmp_path, kind)
    written = list(folders.iterdir())
    names = {json.loads((f / "config.json").read_text())["_class_name"] for f in written}
    assert len(written) == 2
    assert names == {"VQModel", "AutoencoderKL"}


def test_distilled_class_conditional_student_ships_the_autoencoder(tmp_path):
    teacher = load(tmp_path, "class")
    network = AdmUNet(
        sample_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1,
        channel_mult=(1,), num_class_embeds=CLASSES,
    )  # fmt: skip
    student = as_denoiser("tiny", network, teacher)
    folder, metrics, _ = run(tmp_path, teacher, student, max_train_steps=3, evaluation_samples=2)
    assert len(metrics) == 3
    again = load_teacher(str(folder))
    assert again.conditioning == ClassLabels(CLASSES)
    assert again.process.clipping.range is None
    latents = numbers("latents", 2, 4, 8, 8)
    torch.testing.assert_close(again.to_pixels(latents), teacher.to_pixels(latents))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[1], num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)


def test_class_1000_of_1001_is_none(tmp_path):
    state = checkpoint("class")
    state["cond_stage_model.embedding.weight"] = torch.zeros(1001, 24)
    teacher = load(tmp_path, "class", state)
    assert teacher.conditioning == ClassLabels(1000, null_class=1000)


def test_schedules_are_named_as_the_repository_names_them(tmp_path):
    def second_beta(teacher):
        return 1 - float(teacher.process.alpha[1] / teacher.process.alpha[0]) ** 2

    one = load(tmp_path, "vq", timesteps=3)
    assert second_beta(one) == pytest.approx(((0.0015**0.5 + 0.0195**0.5) / 2) ** 2)
    two = load(tmp_path, "vq", timesteps=3, beta_schedule="sqrt_linear", parameterization="x0")
    assert second_beta(two) == pytest.approx((0.0015 + 0.0195) / 2)
    assert [m.parameterization.prediction for m in (one, two)] == ["epsilon", "sample"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"beta_schedule": "sqrt"}, "beta_schedule sqrt: use one of linear"),
        ({"channels": 1}, "takes 3 channels and gives 3, for latents of 1"),
        ({"unet_config": {"params": UNETS["vq"] | {"num_classes": 4}}}, "num_classes is not known"),
        ({"unet_config": {"params": UNETS["vq"] | {"num_head_channels": 48}}}, "heads of 48"),
        ({"unet_config": {"params": {"in_channels": 3}}}, "unet_config makes no network"),
        ({"unet_config": {}}, "give a config of CompVis/latent-diffusion"),
        ({"cond_stage_config": {"target": "a.BERTEmbedder"}}, "conditioned by BERTEmbedder"),
        (
            {"first_stage_config": {"target": "a.Other", "params": {"ddconfig": {}}}},
            "target Other: use one of VQModelInterface",
        ),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path, params, message):
    with pytest.raises(UsageError, match=message):
        load(tmp_path, "vq", **params)


@pytest.mark.parametrize(
    "missing",
    [
        "model.diffusion_model.out.2.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.embedding.weight",
    ],
)
def test_weights_that_are_not_whole_are_refused(tmp_path, missing, folders):
    state = checkpoint("class")
    del state[missing]
    with pytest.raises(DkdmError, match="missing"):
        load(tmp_path, "class", state)
    assert not folders.exists()


def test_config_must_be_given_and_readable(tmp_path):
    torch.save(checkpoint("vq"), tmp_path / "model.ckpt")
    with pytest.raises(UsageError, match="give --teacher-config with the YAML file"):
        load_teacher(str(tmp_path / "model.ckpt"))
    (tmp_path / "broken.yaml").write_text("model: [")
    for file, message in (
        ("broken.yaml", "cannot be read as YAML"),
        ("none.yaml", "none.yaml is missing"),
    ):
        with pytest.raises(UsageError, match=message):
            options = LoadOptions(config=tmp_path / file)
            load_teacher(str(tmp_path / "model.ckpt"), options=options)
