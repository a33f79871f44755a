"""Every pipeline format of diffusers: its denoiser computes what the real pipeline computes.

The real pipeline is run for a few steps, and everything that goes into and comes out of its
scheduler, its text encoders and its autoencoder is recorded. All these states then make one batch
in which each sample has its own t.
"""

import inspect
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    StableDiffusionPipeline,
)
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file

import dkdm
import pipelines
import programs
from dkdm import DkdmError, UsageError, load_teacher
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.diffusion.process import Process
from dkdm.core.diffusion.schedules import rectified_flow
from dkdm.core.diffusion.steps import reverse_step
from dkdm.models import LoadOptions, with_texts
from dkdm.models.prompts import Prompts
from dkdm.models.schedulers import from_scheduler_config
from dkdm.models.stand_ins import MULTISTEP
from dkdm.models.student_process import with_process
from dkdm.shipping.pipeline_folder import usage_snippet, write_pipeline
from dkdm.students import as_denoiser
from pipelines import edit
from small_runs import student_parameterization
from stock_pipelines import (
    CAPTIONS,
    PROMPTS,
    SMALL,
    STEPS,
    UNCONDITIONAL,
    Case,
    Opened,
    Recording,
    as_ddim,
    as_flow,
    assert_close,
    text,
)

LUMINA = {  # the levels that the other pipelines visit by themselves
    "sigmas": np.linspace(1, 6 / 1005, STEPS).tolist(),
    "cfg_normalization": False,
}
CASES = {
    "ddpm": Case(pipelines.ddpm, call=UNCONDITIONAL, eta=1.0),
    "ddim": Case(pipelines.ddim, call=UNCONDITIONAL),
    "ldm-vq": Case(pipelines.ldm_vq, call=UNCONDITIONAL),
    "ldm-kl": Case(pipelines.ldm_kl, call=UNCONDITIONAL),
    "dit": Case(pipelines.dit, call={"class_labels": [1, 4], "guidance_scale": 1.0}),
    "dit-guided": Case(
        partial(pipelines.dit, 1000),  # the pipeline guides with class 1000, whatever the network
        call={"class_labels": [1, 4], "guidance_scale": 3.0},
        guidance=3.0,
    ),
    "stable-diffusion": text(pipelines.stable_diffusion, swap=as_ddim),
    "stable-diffusion-v": text(pipelines.stable_diffusion_v),
    "sdxl": text(pipelines.sdxl, None, swap=as_ddim),
    "pixart": text(pipelines.pixart, swap=as_ddim, spacing="leading", call=CAPTIONS),
    "pixart-sigma": text(pipelines.pixart_sigma, swap=as_ddim, spacing="leading", call=CAPTIONS),
    "sd3": text(pipelines.sd3, spacing="linspace"),
    "sd3-t5": text(partial(pipelines.sd3, True), spacing="linspace"),
    "flux": text(pipelines.flux, None, size=(8, 8)),
    "sana": text(
        pipelines.sana,
        "",
        size=(16, 16),
        swap=as_flow,
        spacing="linspace",
        call={**CAPTIONS, "height": 32, "width": 32},
    ),
    "lumina": text(pipelines.lumina, "", spacing="linspace", call=LUMINA),
    "wan": text(pipelines.wan, size=(2, 2, 2), spacing="linspace", call={"num_frames": 5}),
    "dance": Case(pipelines.dance, call=UNCONDITIONAL, skip=1),
}
TEXT_CASES = [name for name, case in CASES.items() if "prompt" in case.call]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Pipelines by name; each is made, saved, run and loaded once."""
    root, known = tmp_path_factory.mktemp("pipelines"), {}
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def open_one(name):
        if name in known:
            return known[name]
        case, folder = CASES[name], root / name
        torch.manual_seed(0)
        case.build().save_pretrained(folder)
        pipelines.strip(folder)  # as older versions of diffusers wrote it
        absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
        pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
        if case.swap:
            pipeline.scheduler = case.swap(pipeline.scheduler.config)
        recording = Recording().record(pipeline, case.call)
        denoiser = load_teacher(str(folder), options=LoadOptions(sample_size=case.size))
        if "prompt" in case.call:
            negative = case.call.get("negative_prompt", [""])[0]
            denoiser = with_texts(denoiser, str(prompts), negative)
        known[name] = Opened(case, folder, pipeline, recording, denoiser)
        return known[name]

    return open_one


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DKDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("name", CASES)
def test_the_network_is_evaluated_as_in_the_pipeline(name, opened):
    found = opened(name)
    batch, _, times, outputs, _ = found.together()
    prediction = found.denoiser.predict(batch, found.case.guidance)
    torch.testing.assert_close(
        found.denoiser.network_time[batch.t].float(), times, rtol=1e-5, atol=0
    )
    assert_close(prediction.output, outputs)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_step_of_the_pipeline(name, opened):
    found = opened(name)
    batch, s, _, _, following = found.together()
    prediction = found.denoiser.predict(batch, found.case.guidance)
    random = torch.Generator().manual_seed(1)
    z = torch.cat([torch.randn(2, *batch.x.shape[1:], generator=random) for _ in range(STEPS + 1)])
    process, parameterization = found.denoiser.process, found.denoiser.parameterization
    ours = reverse_step(
        process, parameterization, batch.x, prediction, batch.t, s, z[2:], found.case.eta
    )
    first = 2 * found.case.skip
    assert_close(ours[first:], following[first:])


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("ddpm", "ddim", "dance")])
def test_latents_are_decoded_as_by_the_pipeline(name, opened):
    found = opened(name)
    latents = found.latents(found.recording.steps[-1][3])
    assert_close(found.denoiser.to_pixels(latents), found.recording.pixels)


ORDERS = {  # of what `encode_prompt` returns; a minus for what guidance leads away from
    "sana": ("encoder_hidden_states", "encoder_attention_mask", "-", "-"),
    "flux": ("encoder_hidden_states", "pooled_projections"),
    "wan": ("encoder_hidden_states", "-"),
    "stable-diffusion": ("encoder_hidden_states", "-"),
    "sdxl": ("encoder_hidden_states", "-", "pooled_projections", "-"),
}
ORDERS |= {name: ORDERS["sana"] for name in ("pixart", "pixart-sigma", "lumina")}
ORDERS |= {name: ORDERS["sdxl"] for name in ("sd3", "sd3-t5")}
ORDERS |= {"stable-diffusion-v": ORDERS["stable-diffusion"]}


@pytest.mark.parametrize("name", TEXT_CASES)
def test_prompts_are_embedded_as_by_the_pipeline(name, opened):
    found, names = opened(name), ORDERS[name]
    conditioning, theirs = found.denoiser.conditioning, found.recording.embeddings
    ours = conditioning.embed(found.cond)
    named = [key for key in names if key != "-"]
    assert sorted(ours) == sorted(named)
    for key in named:
        torch.testing.assert_close(ours[key], theirs[names.index(key)])
    negative = [value for key, value in zip(names, theirs, strict=False) if key == "-"]
    null = conditioning.embed(conditioning.null(2))
    for key, value in zip(named, negative, strict=False):
        torch.testing.assert_close(null[key], value)


@pytest.mark.parametrize("name", TEXT_CASES)
def test_a_prompt_is_encoded_once(name, opened, monkeypatch):
    """Loaded again from the same folder, with the same prompts: the text encoders stay on disk."""
    found = opened(name)
    loads = property(lambda self: pytest.fail("loaded"))
    monkeypatch.setattr("dkdm.models.text.LazyEncoders.pipeline", loads)
    again = load_teacher(str(found.folder), options=LoadOptions(sample_size=found.case.size))
    negative = found.case.call.get("negative_prompt", [""])[0]
    again = with_texts(again, str(found.folder.parent / "prompts.txt"), negative)
    expected = found.denoiser.conditioning.embed(found.cond)
    embedded = again.conditioning.embed(found.cond)
    assert all(torch.equal(embedded[key], value) for key, value in expected.items())


def saved(pipeline, folder, **options):
    pipeline.save_pretrained(folder)
    return load_teacher(str(folder), options=LoadOptions(**options))


def some_batch(model, count=4):
    cond = model.conditioning.draw(count, torch.Generator().manual_seed(2))
    t = torch.linspace(model.process.num_levels - 1, 0, count).long()
    return Batch(torch.randn(count, *model.sample_shape), t, cond, t)


def test_class_conditional_unet(tmp_path):
    """diffusers has no pipeline that would feed the labels: they are fed by hand."""
    pipeline = pipelines.class_conditional()
    denoiser = saved(pipeline, tmp_path)
    assert denoiser.conditioning == dkdm.ClassLabels(5)
    batch = some_batch(denoiser)
    labels = batch.cond["class_labels"]
    with torch.no_grad():
        expected = pipeline.unet(batch.x, batch.t, labels).sample
    assert_close(denoiser.predict(batch).output, expected)


@pytest.mark.parametrize("level", [999, 666, 333, 0])
def test_edm(tmp_path, level):
    """The scheduler's own grid of four steps is levels 999, 666, 333 and 0 of a thousand."""
    pipeline = pipelines.edm()
    denoiser, scheduler = saved(pipeline, tmp_path), EDMEulerScheduler(sigma_data=0.4)
    scheduler.set_timesteps(4)
    t, s = torch.tensor([level]), torch.tensor([max(level - 333, -1)])
    x = torch.randn(1, 3, 8, 8) * scheduler.sigmas[(999 - level) // 333]
    time = scheduler.timesteps[(999 - level) // 333]
    with torch.no_grad():
        output = pipeline.unet(scheduler.scale_model_input(x, time), time).sample
    theirs = scheduler.step(output, time, x).prev_sample
    prediction = denoiser.predict(Batch(x, t, {}, t))
    assert_close(prediction.output, output)
    process, parameterization = denoiser.process, denoiser.parameterization
    assert_close(reverse_step(process, parameterization, x, prediction, t, s, x, 0.0), theirs)


def test_learned_range_of_a_dit(tmp_path, monkeypatch):
    """DiTPipeline drops the variance that the network learned: the reference is the scheduler."""
    pipeline = pipelines.dit(scheduler=DDPMScheduler, variance_type="learned_range")
    pipeline.save_pretrained(tmp_path)
    names = tuple(f"kind {i}" for i in range(5))
    edit(tmp_path / "model_index.json", id2label={str(i): name for i, name in enumerate(names)})
    denoiser = load_teacher(str(tmp_path))
    assert denoiser.parameterization.variance == "learned_range"
    assert denoiser.conditioning.names == names
    batch, z = some_batch(denoiser), torch.randn(4, 4, 8, 8)
    s = (batch.t - 1).clamp(min=-1)
    theirs = []
    for x, t, label, noise in zip(batch.x, batch.t, batch.cond["class_labels"], z, strict=True):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, n=noise, **__: n[None]
        )
        with torch.no_grad():
            raw = pipeline.transformer(x[None], t[None], label[None]).sample
        theirs.append(pipeline.scheduler.step(raw, t, x[None]).prev_sample)
    prediction = denoiser.predict(batch)
    ours = reverse_step(
        denoiser.process, denoiser.parameterization, batch.x, prediction, batch.t, s, z
    )
    assert_close(ours, torch.cat(theirs), 1e-4)  # the scheduler's variances are off by 5e-5


def test_pixart_of_1024_pixels_is_told_its_size(tmp_path, opened):
    denoiser = saved(pipelines.pixart_1024(), tmp_path)
    assert denoiser.sample_shape == (4, 128, 128)
    assert denoiser.constants["resolution"].tolist() == [256, 256]
    assert denoiser.constants["aspect_ratio"].tolist() == [1]
    assert opened("pixart").denoiser.constants == {}


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # numpy's, of diffusers
@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize(
    "config",
    [{}, {**pipelines.BETAS, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}],
    ids=["defaults", "stable"],
)
def test_solvers_are_rebuilt_as_ddim_on_their_betas(name, config):
    # Two of them need scipy and torchsde; others have the same arguments and tables.
    missing = {"LMSDiscreteScheduler": "Euler", "DPMSolverSDEScheduler": "KDPM2"}
    cls = getattr(diffusers, f"{missing[name]}DiscreteScheduler" if name in missing else name)
    arguments = inspect.signature(cls.__init__).parameters
    known = {key: value for key, value in config.items() if key in arguments}
    peer = cls(**known)
    process = from_scheduler_config({**peer.config, "_class_name": name})
    torch.testing.assert_close(process.alpha**2, peer.alphas_cumprod.double(), rtol=1e-3, atol=1e-5)
    spacing = peer.config.get("timestep_spacing", "linspace")
    assert process.spacing == ("trailing" if spacing == "linspace" else spacing)
    assert process.clipping.range is None
    clean = name != "PNDMScheduler"
    assert process.final[1] == (0 if clean else process.sigma[0])
    # What is not written has the defaults of the class, as in diffusers.
    written = from_scheduler_config({**known, "_class_name": name})
    assert torch.equal(written.alpha, process.alpha)


STUDENTS = {  # what makes the student smaller than its teacher
    "ldm-kl": {"block_out_channels": [4, 8]},
    "stable-diffusion": {"block_out_channels": [4, 8]},
    "sd3": {"num_layers": 1},
    "dit": {"num_layers": 1},
    "flux": {"num_single_layers": 0},
    "wan": {"ffn_dim": 8},
    "dance": {"norm_num_groups": 4},
}
SHIPS_CODE = ("dit",)


@pytest.fixture(scope="module")
def distilled(opened, tmp_path_factory):
    """Ten steps from a teacher to a smaller network of its class: the output folder."""

    def run(name, student=None, **changes):
        found, root = opened(name), tmp_path_factory.mktemp("runs")
        if student is None:
            config = next(found.folder.glob("[ut][nr]*/config.json"))  # unet or transformer
            student = root / "student.json"
            smaller = STUDENTS.get(name, {})
            student.write_text(json.dumps(json.loads(config.read_text()) | smaller))
        if "prompt" in found.case.call:
            changes["prompts"] = str(found.folder.parent / "prompts.txt")
        if found.denoiser.embeds_guidance:
            changes["guidance_scale"] = "3"
        config = replace(SMALL, output_dir=root / "run", teacher_size=found.case.size, **changes)
        return dkdm.distill(str(found.folder), str(student), config)

    return run


def reloaded(folder, found, like_teacher=False):
    """The student's denoiser, which has all of its teacher but the network.

    like_teacher: whether it predicts what its teacher does; else what a distillation chooses.
    """
    again = load_teacher(str(folder))
    if "prompt" in found.case.call:
        again = with_texts(again, str(found.folder.parent / "prompts.txt"))
    assert again.sample_shape == found.denoiser.sample_shape
    teacher = found.denoiser
    expected = teacher.parameterization if like_teacher else student_parameterization(teacher)
    assert again.parameterization == expected
    torch.testing.assert_close(again.process.alpha, found.denoiser.process.alpha, atol=1e-2, rtol=0)
    return again


@pytest.mark.parametrize("name", [name for name in STUDENTS if name not in SHIPS_CODE])
def test_students_sample_in_the_stock_pipeline_as_their_card_says(name, opened, distilled):
    found = opened(name)
    shown = {"evaluation_samples": 2} if name in ("wan", "dance") else {}
    folder = distilled(name, **shown)
    assert not (folder / "pipeline.py").exists()
    assert (folder / "samples" / "grid.png").is_file() == bool(shown)
    again = reloaded(folder, found)
    assert torch.equal(again.process.alpha, found.denoiser.process.alpha)
    card = (folder / "README.md").read_text()
    code = usage_snippet(folder.name, again, 3.0 if again.embeds_guidance else 1.0)
    assert code in card
    code = code.replace(f'"{folder.name}"', repr(str(folder))).replace("=50", "=2")
    made = {}
    exec(code, made)
    assert type(made["pipeline"]) is type(found.pipeline)
    drawn = made.get("images", made.get("audios", made.get("frames")))
    assert len(drawn) in (1, 4)


@pytest.mark.parametrize("name", [name for name in CASES if name not in STUDENTS])
def test_every_other_teacher_trains_a_student_too(name, opened, distilled):
    """Its own network with fresh weights, three steps, and back as the same denoiser."""
    folder = distilled(name)
    again = reloaded(folder, opened(name))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 3
    assert math.isfinite(steps[-1]["loss"])
    assert type(again.network) is type(opened(name).denoiser.network)
    if again.bundle.autoencoder is not None:
        assert again.bundle.autoencoder.component.folder.parent == folder


SAMPLED = """
import sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    options["generator"] = torch.Generator().manual_seed(5)
    if pipeline.config.num_classes:
        pixels = pipeline(class_labels=[0, 2], **options).images
    else:
        pixels = pipeline(["a red cat", "a blue dog"], guidance_scale=2.0, **options).images
    save_file({"pixels": pixels.contiguous()}, folder + "/drawn.safetensors")
"""


OTHERS = [(name, "unet") for name in ("sdxl", "sana", "flux", "pixart")]
OTHERS += [("sd3", "flux"), ("sd3", "guided flux"), ("sana", "lumina")]


def network_for(teacher, kind):
    """A network of another class than its pipeline's, for its embeddings and channels."""
    width = teacher.conditioning.shape_of("encoder_hidden_states")[-1]
    if kind == "unet":
        channels = 8 if teacher.parameterization.learns_variance else 4
        return pipelines.text_unet(cross_attention_dim=width, out_channels=channels)
    if kind == "lumina":
        return varied(pipelines.lumina().transformer, cap_feat_dim=width)
    pooled = teacher.conditioning.shape_of("pooled_projections")[-1]
    sizes = {"joint_attention_dim": width, "pooled_projection_dim": pooled}
    return varied(pipelines.flux().transformer, **sizes, guidance_embeds=kind != "flux")


def varied(network, **config):
    return pipelines.seeded(type(network).from_config({**network.config, **config}))


def test_other_students_sample_without_dkdm(tmp_path, opened, distilled):
    """Text and latent teachers with students that no pipeline of diffusers feeds."""
    folders = {"dit": distilled("dit"), "sd3": distilled("sd3", "text-unet-tiny")}
    for name, kind in OTHERS:
        teacher = opened(name).denoiser
        teacher = with_texts(teacher, str(opened(name).folder.parent / "prompts.txt"))
        folders[f"{name} {kind}"] = tmp_path / f"{name}-{kind}"
        student = as_denoiser(kind, network_for(teacher, kind), teacher)
        write_pipeline(folders[f"{name} {kind}"], student)
    done = programs.run(SAMPLED, *folders.values())
    assert not done.returncode, done.stderr
    for name, folder in folders.items():
        again = reloaded(folder, opened(name.partition(" ")[0]), like_teacher=" " in name)
        if again.parameterization.prediction == "flow_prediction":
            # The same flow on levels of which a grid of two steps is a part.
            flow = rectified_flow(1000, again.process.scheduler["shift"])
            again = replace(again, process=flow)
        texts = isinstance(again.conditioning, Prompts)
        cond = again.conditioning.of(PROMPTS) if texts else again.conditioning.of([0, 2])
        random = torch.Generator().manual_seed(5)
        start = torch.randn(2, *again.sample_shape, generator=random)
        ours = again.sample(lambda _, x=start: x, cond, 2, 0.0, 2.0 if texts else 1.0)
        theirs = load_file(folder / "drawn.safetensors")["pixels"]
        assert_close((again.to_pixels(ours) / 2 + 0.5).clamp(0, 1), theirs, 1e-4)


def test_students_that_are_fed_sizes_sample_on_another_process(tmp_path, opened, monkeypatch):
    """SDXL and PixArt of 1024 pixels: the sizes are written out in the shipped pipeline."""
    monkeypatch.setattr("dkdm.models.components.TILED_FROM", 1000)  # tiles differ at their seams
    prompts = str(opened("sdxl").folder.parent / "prompts.txt")
    teachers = {
        "sdxl": opened("sdxl").denoiser,
        "pixart": saved(pipelines.pixart_1024(), tmp_path / "pixart-teacher"),
    }
    for name, teacher in teachers.items():
        like = with_process(with_texts(teacher, prompts), None, "flow")
        network = varied(teacher.network, out_channels=4)
        write_pipeline(tmp_path / name, as_denoiser(name, network, like))
    done = programs.run(SAMPLED, *(tmp_path / name for name in teachers))
    assert not done.returncode, done.stderr
    for name, teacher in teachers.items():
        again = with_texts(load_teacher(str(tmp_path / name)), prompts)
        assert again.constants.keys() == teacher.constants.keys() != set()
        high = again.process.sigma[-1]
        sigma = torch.stack([high / 2, high])
        again = replace(again, process=Process(1 - sigma, sigma, 1000 * sigma))
        start = torch.randn(2, *again.sample_shape, generator=torch.Generator().manual_seed(5))
        drawn = again.sample(lambda _, x=start: x, again.conditioning.of(PROMPTS), 2, 0.0, 2.0)
        theirs = load_file(tmp_path / name / "drawn.safetensors")["pixels"]
        assert_close((again.to_pixels(drawn) / 2 + 0.5).clamp(0, 1), theirs, 1e-4)


def refused(folder, kind=UsageError, **options):
    with pytest.raises(kind) as error:
        load_teacher(str(folder), options=LoadOptions(**options))
    return str(error.value)


@pytest.fixture
def broken(tmp_path, opened):
    """A copy of a saved pipeline, to be damaged."""
    return lambda name: Path(shutil.copytree(opened(name).folder, tmp_path / name))


@pytest.mark.parametrize("name", ["ldm-kl", "wan"])
def test_partial_weights(name, broken):
    folder = broken(name)
    path = next(folder.glob("[ut][nr]*/diffusion_pytorch_model.safetensors"))
    weights = load_file(path)
    gone = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != gone}, path)
    message = refused(folder, DkdmError, sample_size=CASES[name].size)
    assert f"1 missing keys ({gone})" in message


def test_unsupported_scheduler(broken):
    folder = broken("stable-diffusion")
    edit(folder / "model_index.json", scheduler=["diffusers", "KarrasVeScheduler"])
    assert "KarrasVeScheduler" in refused(folder)
    assert "save an EDMEulerScheduler" in refused(folder)


def test_prompts_are_asked_for(opened, tmp_path):
    config = replace(SMALL, output_dir=tmp_path / "run")
    with pytest.raises(UsageError, match="conditioned on text: give --prompts"):
        dkdm.distill(str(opened("sd3").folder), "mmdit-tiny", config)
    assert not config.output_dir.exists()


def test_latents_of_another_autoencoder(broken):
    folder = broken("stable-diffusion")
    edit(folder / "vae" / "config.json", latent_channels=8)
    message = refused(folder)
    assert "latents have 8 channels, the network's samples 4" in message


def test_inpainting(tmp_path):
    pipelines.stable_diffusion(network=pipelines.text_unet(in_channels=9)).save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert "takes 9 channels and gives 4" in message
    assert "inpainting" in message


def test_consistency_pipeline(broken):
    folder = broken("ddpm")
    edit(folder / "model_index.json", _class_name="ConsistencyModelPipeline")
    assert "one jump" in refused(folder)


def test_missing_autoencoder(broken):
    folder = broken("stable-diffusion")
    shutil.rmtree(folder / "vae")
    assert "lists vae, but there is no such folder" in refused(folder, DkdmError)
    edit(folder / "model_index.json", vae=[None, None])
    assert "no autoencoder" in refused(folder, DkdmError)


def test_two_denoisers(broken):
    folder = broken("wan")
    edit(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    assert "two denoisers" in refused(folder)


def test_video_without_a_size(broken):
    folder = broken("wan")
    assert "give --teacher-size" in refused(folder)
    assert "samples with 3 sides" in refused(folder, sample_size=(8, 8))


def lora_of(network, folder):
    """A file of random low-rank updates, as diffusers saves them."""
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
    network.add_adapter(peft.LoraConfig(**settings, target_modules=["to_q", "to_v"]))
    updates = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(network))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=updates)
    return folder / "pytorch_lora_weights.safetensors"


def test_lora_is_merged_as_by_the_pipeline(opened, tmp_path):
    folder = opened("stable-diffusion").folder
    file = lora_of(pipelines.text_unet(), tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    plain = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = load_teacher(str(folder), options=LoadOptions(lora=(file,))).network.state_dict()
    assert merged.keys() == plain.keys()
    for key, value in pipeline.unet.state_dict().items():
        assert torch.equal(merged[key], value)
    assert sum(not torch.equal(merged[key], value) for key, value in plain.items()) == 16


def test_lora_that_does_not_fit(opened, tmp_path):
    file = lora_of(pipelines.text_unet(block_out_channels=(8, 32)), tmp_path)
    message = refused(opened("stable-diffusion").folder, DkdmError, lora=(file,))
    assert "does not fit this network" in message
    assert len(message.splitlines()) < 4
    assert "takes no LoRA" in refused(opened("ddpm").folder, lora=(file,))
    missing = file.with_name("none.safetensors")
    assert "no such file" in refused(opened("stable-diffusion").folder, lora=(missing,))
