"""The page on adding to dkdm: every block runs, and does what its section says."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

import dkdm
import pipelines
from dkdm.core.denoisers.calls import CALLS
from dkdm.core.denoisers.denoiser import Batch
from dkdm.evaluation.metrics import METRICS
from dkdm.models.architectures import ARCHITECTURES
from dkdm.models.formats.originals import FORMATS
from dkdm.models.pipelines import PIPELINES
from dkdm.runs.arms import ARMS
from dkdm.students import PRESETS
from stock_pipelines import PROMPTS, Recording, assert_close

PAGE = Path(__file__).parents[1] / "docs" / "adding.md"
REGISTRIES = (FORMATS, PIPELINES, ARCHITECTURES, ARMS, CALLS, PRESETS, METRICS)


def auraflow():
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        pipelines.tokenizer(),
        pipelines.t5(32, UMT5EncoderModel, UMT5Config),
        pipelines.kl(scaling_factor=0.4),
        pipelines.seeded(transformer),
        FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The names that the page's blocks define, run one after the other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    auraflow().save_pretrained("auraflow")
    before, names = [dict(registry) for registry in REGISTRIES], {}
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), names)
        yield names
    finally:
        for registry, entries in zip(REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(entries)


def test_what_the_page_adds_works(page, tmp_path):
    teacher, student = page["teacher"], page["student"]
    saved = torch.load("tiny.pt", weights_only=True)
    assert all(torch.equal(value, saved[k]) for k, value in teacher.network.state_dict().items())
    assert student.network.config.block_out_channels == (32, 32)
    plain, more = page["losses"].values()
    batch, target = page["batch"], page["target"]
    added = page["brightness"](student, student.predict(batch), batch, target)
    torch.testing.assert_close(more, plain + added)
    perfect = page["Objective"](teacher, teacher, further=(page["brightness"],))
    assert perfect(teacher, batch, target).abs().max() < 1e-8
    features = page["reference"].network(page["images"]).features
    real = page["reference"].statistics.covariance.diagonal().sqrt().mean()
    assert page["measured"]["spread"] == pytest.approx(float(features.std(dim=0).mean() / real))
    assert torch.equal(page["source"].x, page["states"])
    assert (page["source"].evaluations, page["source"].step) == (8 * 2 + 4, 1)
    quick = {"train_batch_size": 4, "pool_size": 8, "fill_steps": 1, "validation_steps": 0}
    config = dkdm.DistillConfig(
        output_dir=tmp_path / "run", max_train_steps=1, evaluation_samples=0, check=False, **quick
    )
    again = dkdm.load_teacher(str(dkdm.distill("tiny.pt", "mobile-narrow", config)))
    assert type(again.network) is type(student.network)


def test_the_added_pipeline_is_read_as_diffusers_runs_it(page):
    pipeline = AuraFlowPipeline.from_pretrained("auraflow")
    call = {"prompt": PROMPTS[:1], "guidance_scale": 1.0, "height": 16, "width": 16}
    recording = Recording().record(pipeline, call)
    output, time, x, _ = recording.steps[1]
    model = page["flow"]
    t = int((model.network_time - float(time)).abs().argmin())
    levels = torch.tensor([t])
    prediction = model.predict(Batch(x, levels, model.conditioning.of(PROMPTS[:1]), levels))
    assert_close(prediction.output, output, 1e-3)
