"""U-ViT, linear attention and depthwise convolutions: on audio, images and videos alike."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

import pipelines
import programs
from dkdm import UsageError, load_teacher
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.models import with_texts
from dkdm.networks import network_class
from dkdm.networks.linear import linear_attention
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import (
    Interface,
    other,
    student_of,
    transformers,
    unets,
    untried_student_of,
)
from dkdm.students.interface import patch_sides
from toy_runs import FAMILIES, SHAPES, assert_same, distil, network_of, toy

TEXT, POOLED, WORDS, CLASSES = 12, 6, 7, 5
FULL = {
    "num_class_embeds": CLASSES,
    "cross_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
}
NETWORKS = [*((name, "image") for name in FAMILIES), ("ResidualMLP", "vector")]
CASES = [
    *((name, kind) for name in FAMILIES for kind in SHAPES if kind != "vector"),
    ("ResidualMLP", "sound"),
    ("ResidualMLP", "vector"),
]
every_network = pytest.mark.parametrize(("name", "kind"), NETWORKS)
every_case = pytest.mark.parametrize(("name", "kind"), CASES)


def inputs_of(shape, count=3):
    mask = torch.ones(count, WORDS, dtype=torch.int64)
    mask[0, 3:] = 0
    return {
        "x": torch.randn(count, *shape),
        "timesteps": torch.rand(count) * 1000,
        "class_labels": torch.arange(count),
        "encoder_hidden_states": torch.randn(count, WORDS, TEXT),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(count, POOLED),
    }


@every_case
@torch.no_grad()
def test_output_depends_on_everything_it_is_fed(name, kind):
    shape = SHAPES[kind]
    network, inputs = network_of(name, shape, 2 * shape[0], **FULL), inputs_of(shape)
    output = network(**inputs)
    assert output.shape == (3, 2 * shape[0], *shape[1:])
    assert output.isfinite().all()
    for what, value in inputs.items():
        changed = value + 1 + torch.rand(value.shape)
        if what == "encoder_attention_mask":
            changed = torch.ones_like(value)
        elif what == "class_labels":
            changed = value + 1
        assert (network(**inputs | {what: changed}) - output)[0].abs().max() > 1e-5, what


@every_network
@torch.no_grad()
def test_padding_of_the_text_is_not_looked_at(name, kind):
    network, inputs = network_of(name, SHAPES[kind], **FULL), inputs_of(SHAPES[kind])
    text = inputs["encoder_hidden_states"].clone()
    text[0, 3:] += 100
    torch.testing.assert_close(
        network(**inputs | {"encoder_hidden_states": text}), network(**inputs)
    )


@every_case
def test_gradient_reaches_every_parameter_of_a_fresh_network_at_the_second_step(name, kind):
    seeded, inputs = network_of(name, SHAPES[kind], **FULL), inputs_of(SHAPES[kind])
    network = type(seeded).from_config(seeded.config)
    assert network(**inputs).abs().max() < 5
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(network(**inputs), inputs["x"]).backward()
        optimizer.step()
    without = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@every_network
def test_gradient_checkpointing_gives_the_same_gradients(name, kind):
    network, inputs = network_of(name, SHAPES[kind], **FULL).train(), inputs_of(SHAPES[kind])
    gradients = []
    for _ in range(2):
        network.zero_grad()
        network(**inputs).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
        network.enable_gradient_checkpointing()
    assert network.is_gradient_checkpointing
    torch.testing.assert_close(*gradients)


@every_case
@torch.no_grad()
def test_saved_network_comes_back(name, kind, tmp_path):
    network, inputs = network_of(name, SHAPES[kind], **FULL), inputs_of(SHAPES[kind])
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs), network(**inputs))


@every_network
@torch.no_grad()
def test_exported_network_takes_any_batch(name, kind):
    network, inputs = network_of(name, SHAPES[kind], **FULL), inputs_of(SHAPES[kind])
    shapes = {key: {0: torch.export.Dim("batch")} for key in inputs}
    exported = torch.export.export(network, (), inputs, dynamic_shapes=shapes).module()
    more = inputs_of(SHAPES[kind], 4)
    torch.testing.assert_close(exported(**more), network(**more))


@pytest.mark.slow
@every_network
@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
def test_onnx_computes_the_same(name, kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, inputs = network_of(name, SHAPES[kind], **FULL), inputs_of(SHAPES[kind])
    shapes, file = {key: {0: torch.export.Dim("batch")} for key in inputs}, tmp_path / "n.onnx"
    torch.onnx.export(network, kwargs=inputs, f=file, dynamo=True, dynamic_shapes=shapes)
    more = inputs_of(SHAPES[kind], 4)
    session = runtime.InferenceSession(file)
    [found] = session.run(None, {key: value.numpy() for key, value in more.items()})
    torch.testing.assert_close(torch.from_numpy(found), network(**more), atol=1e-4, rtol=1e-4)


@every_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_is_near(name, kind, dtype):
    network, inputs = network_of(name, SHAPES[kind], **FULL), inputs_of(SHAPES[kind])
    expected = network(**inputs)
    with torch.autocast("cpu", dtype):
        cast = network(**inputs)
    halved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    own = torch.nn.Module.to(network, dtype)(**halved)
    for found in (cast, own):
        torch.testing.assert_close(found.float(), expected, atol=0.1 * expected.std(), rtol=0.1)


def test_linear_attention_is_the_quadratic_formula_of_its_kernel():
    q, k, v = (torch.randn(2, 3, 50, 8, dtype=torch.float64).float() for _ in range(3))
    phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()).double() for x in (q, k))
    weights = phi_q @ phi_k.transpose(2, 3)
    expected = weights / weights.sum(dim=-1, keepdim=True) @ v.double()
    torch.testing.assert_close(linear_attention(q, k, v).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_attention_of_many_large_tokens_stays_in_the_range_of_half_precision(dtype):
    """A plain sum over these tokens is 8 * 8 * 20000, far beyond 65504."""
    x = torch.full((1, 1, 20_000, 4), 8.0)
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        attended = linear_attention(*[x.to(dtype)] * 3)
    torch.testing.assert_close(attended, x.to(attended.dtype), atol=0, rtol=1e-2)


@torch.no_grad()
def test_long_skips_of_the_uvit_are_used():
    network, inputs = network_of("UVit", SHAPES["image"], **FULL), inputs_of(SHAPES["image"])
    before = network(**inputs)
    network.later[0].skip.weight[:, 32:] = 0
    assert (network(**inputs) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["LinearTransformer", "MobileUNet"])
@torch.no_grad()
def test_other_sizes_than_the_trained_one_work(name):
    network = network_of(name, SHAPES["image"])
    assert network(torch.randn(1, 4, 12, 20), torch.ones(1)).shape == (1, 4, 12, 20)


@pytest.mark.parametrize(
    ("name", "shape", "given", "message"),
    [
        ("UVit", (4, 8, 8), {}, r"\(16, 8\), not \(8, 8\)"),
        ("LinearTransformer", (4, 15, 8), {}, r"sample_size \(15, 8\) cannot be cut"),
        ("MobileUNet", (4, 15, 8), {}, "every side must be divisible by 2"),
        *[
            (name, (4, 16, 8), given, message)
            for name in FAMILIES
            for given, message in (
                ({"class_labels": torch.tensor([0])}, "remove class_labels"),
                ({"pooled_projections": torch.ones(1, 3)}, "remove pooled_projections"),
                ({"encoder_hidden_states": torch.ones(1, 2, 3)}, "remove encoder_hidden_states"),
            )
        ],
    ],
)
def test_what_does_not_fit_is_refused(name, shape, given, message):
    network = network_of(name, SHAPES["image"])
    with pytest.raises(ValueError, match=message):
        network(torch.randn(1, *shape), torch.ones(1), **given)


@every_network
def test_missing_condition_is_refused(name, kind):
    network = network_of(name, SHAPES[kind], num_class_embeds=3)
    with pytest.raises(ValueError, match=r"num_class_embeds is 3: give class_labels"):
        network(torch.randn(1, *SHAPES[kind]), torch.ones(1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 4}, "depth is 4: give an odd number"),
        ({"patch_size": (2, 3)}, r"sample_size \(32, 32\) cannot be cut into patches of \(2, 3\)"),
        ({"patch_size": (2,)}, "one to three sides"),
    ],
)
def test_impossible_uvit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        network_class("UVit")(**sizes)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((1, 16, 16), (2, 2)),
        ((3, 32, 32), (4, 4)),
        ((4, 64, 48), (4, 4)),
        ((3, 256, 256), (8, 8)),
        ((1, 28, 28), (2, 2)),
        ((1, 6, 6), (1, 1)),
        ((2, 256), (4,)),
        ((2, 65536), (64,)),
        ((2, 50), (1,)),
        ((4, 4, 16, 16), (1, 2, 2)),
        ((16, 21, 60, 104), (1, 4, 4)),
        ((3, 16, 64, 64), (2, 8, 8)),
    ],
)
def test_patch_is_chosen_by_the_size(shape, patch):
    assert patch_sides(Interface(shape, shape[0])) == patch


def test_samples_of_no_known_rank_are_refused():
    with pytest.raises(
        UsageError, match=r"for audio .*; the samples have shape \(2,\): use mlp-tiny"
    ):
        patch_sides(Interface((2,), 2))


INTERFACES = {
    "classes": ((1, 16, 16), ClassLabels(3, null_class=3), "fixed_small"),
    "latents": ((4, 32, 32), None, "fixed_small"),
    "variance": ((3, 32, 32), None, "learned_range"),
    "oblong": ((4, 64, 48), None, "fixed_small"),
    "sound": ((2, 256), None, "fixed_small"),
    "vector": ((8,), ClassLabels(3), "learned_range"),
    "video": ((4, 4, 16, 16), None, "fixed_small"),
}
FITTED = [preset.name for family in (unets, transformers, other) for preset in family.PRESETS]
OF_TEXT = [name for name in FITTED if name.startswith(("text-", "mmdit"))]
OF_IMAGES = [
    name for name in FITTED if name.startswith(("unet-", "adm-", "dit")) and name != "unet-1d-tiny"
]
MISFITS = {
    "oblong": ("needs square samples", [name for name in FITTED if name.startswith("dit")]),
    "sound": ("for images", OF_IMAGES),
    "vector": ("use mlp-tiny", [name for name in FITTED if not name.startswith("mlp-")]),
    "video": ("for images", OF_IMAGES),
}


QUICK = (
    *("uvit-tiny", "linear-tiny", "mobile-tiny", "mlp", "unet-1d"),
    *("text-unet-tiny", "mmdit-tiny"),
)
WIDER = ("uvit-s", "linear-s", "mobile-s")  # their widths: once for each rank


@pytest.mark.parametrize("kind", INTERFACES)
def test_presets_fit_or_say_why(kind):
    names = QUICK + (WIDER if kind in ("sound", "oblong", "video") else ())
    fits_or_says_why(kind, [name for name in FITTED if name.startswith(names)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", INTERFACES)
def test_every_preset_fits_or_says_why(kind):
    fits_or_says_why(kind, FITTED)


def fits_or_says_why(kind, names):
    """Presets are built on the meta device, and evaluated there."""
    shape, conditioning, variance = INTERFACES[kind]
    teacher = toy(shape, conditioning, variance)
    reason, misfits = MISFITS.get(kind, ("", []))
    for name in names:
        why = reason if name in misfits else ""
        why = "text|for images|square" if name in OF_TEXT else why
        why = "for audio" if name == "unet-1d-tiny" and kind != "sound" else why
        why = "for vectors" if name.startswith("mlp-") and len(shape) > 2 else why
        if why:
            with pytest.raises(UsageError, match=why), torch.device("meta"):
                untried_student_of(name, teacher)
            continue
        with torch.device("meta"):
            student = untried_student_of(name, teacher)
        student.network.to("meta")
        student.check()


def small_presets():
    """(preset, sample shape, classes) of those that train in seconds."""
    images = ["unet-mini", "unet-tiny", "unet-latent", "dit-tiny", "dit-xs", "mobile-s"]
    for name in images:
        case = name, (1, 16, 16), ClassLabels(3, null_class=3)
        yield pytest.param(*case, id=name, marks=pytest.mark.slow)
    for name in ("uvit-tiny", "linear-tiny", "mobile-tiny"):
        yield pytest.param(name, (1, 16, 8), ClassLabels(3), id=f"{name}-image")
        yield pytest.param(name, (2, 64), None, id=f"{name}-sound")
        yield pytest.param(name, (4, 4, 8, 8), None, id=f"{name}-video")
    yield pytest.param("unet-1d-tiny", (2, 64), None, id="unet-1d-tiny")
    yield pytest.param("mlp-tiny", (2, 64), None, id="mlp-tiny-sound")
    yield pytest.param("mlp-tiny", (8,), ClassLabels(3, null_class=3), id="mlp-tiny-vector")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(("name", "shape", "classes"), list(small_presets()))
def test_small_presets_train_and_come_back(name, shape, classes, runs):
    folder = runs / f"{name}-{len(shape) - 1}"
    student = distil(toy(shape, classes), name, folder)
    again = load_teacher(str(folder))
    assert again.sample_shape == shape
    assert type(again.network) is type(student.network)
    assert_same(student, again)


@pytest.fixture(scope="module")
def text_teachers(tmp_path_factory):
    """SD3 has a pooled embedding, PixArt a mask and a learned variance."""
    root, found = tmp_path_factory.mktemp("text"), {}
    prompts = root / "prompts.txt"
    prompts.write_text("a red cat\na blue dog")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DKDM_CACHE", str(root / "cache"))
        for name in ("sd3", "pixart"):
            getattr(pipelines, name)().save_pretrained(root / name)
            found[name] = with_texts(load_teacher(str(root / name)), str(prompts))
        yield found, prompts


TEXT_PRESETS = ["uvit-tiny", "linear-tiny", "mobile-tiny"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, "sd3") for name in TEXT_PRESETS],
        *[pytest.param(name, "pixart", marks=pytest.mark.slow) for name in TEXT_PRESETS],
        pytest.param("mmdit-tiny", "sd3", marks=pytest.mark.slow),
        pytest.param("text-unet-tiny", "pixart", marks=pytest.mark.slow),
    ],
)
def test_small_presets_of_text_train_and_come_back(name, kind, text_teachers, runs):
    teachers, prompts = text_teachers
    folder = runs / f"{name}-{kind}"
    student = distil(replace(teachers[kind]), name, folder)
    again = with_texts(load_teacher(str(folder)), str(prompts))
    assert again.parameterization == teachers[kind].parameterization
    assert_same(student, again)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *[("sd3", name) for name in (*OF_TEXT, *TEXT_PRESETS, *WIDER)],
        *[("pixart", name) for name in (*OF_TEXT, *TEXT_PRESETS)],
        *[pytest.param("pixart", name, marks=pytest.mark.slow) for name in WIDER],
    ],
)
def test_presets_fit_text_with_and_without_a_pooled_embedding(name, kind, text_teachers):
    teacher = text_teachers[0][kind]
    if name.startswith("mmdit") and kind == "pixart":
        with pytest.raises(UsageError, match="needs a pooled text embedding"):
            untried_student_of(name, teacher)
        return
    with torch.device("meta"):
        student = untried_student_of(name, teacher)
    student.network.to("meta")
    student.check()


SAMPLED = """
import sys
import torch
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    if "encoder" in " ".join(pipeline.components):
        drawn = pipeline(["a red cat"] * 2, guidance_scale=2.0, **options).images
    else:
        drawn = pipeline(batch_size=2, **options).images
    assert drawn.isfinite().all()
    print(folder, *drawn.shape)
"""


def test_folders_sample_without_dkdm(text_teachers, tmp_path):
    teachers, folders = text_teachers[0], {}
    for name, kind in zip(TEXT_PRESETS, ("sd3", "pixart", "pixart"), strict=True):
        for i, shape in enumerate(shape for shape in SHAPES.values() if shape[1:]):
            write_pipeline(tmp_path / f"{name}-{i}", student_of(name, toy(shape)))
            folders[str(tmp_path / f"{name}-{i}")] = shape
        write_pipeline(tmp_path / f"{name}-text", student_of(name, teachers[kind]))
        folders[str(tmp_path / f"{name}-text")] = (3, 16, 16)
    for kind in ("sound", "vector"):
        write_pipeline(tmp_path / f"mlp-{kind}", student_of("mlp-tiny", toy(SHAPES[kind])))
        folders[str(tmp_path / f"mlp-{kind}")] = SHAPES[kind]
    done = programs.run(SAMPLED, *folders)
    assert not done.returncode, done.stderr
    drawn = [line.split() for line in done.stdout.splitlines()]
    assert {folder: tuple(map(int, shape)) for folder, _, *shape in drawn} == folders
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(next(iter(folders)))
