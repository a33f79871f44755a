"""Every named student, however large: three steps, saved, reloaded to identical outputs, exported.

Takes half an hour on two cores; the largest, dit-l, wants 12 GB of memory and as much disk.
"""

import shutil

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

import pipelines
from dkdm import export_graph, load_teacher
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.models import with_texts
from dkdm.students import PRESETS
from toy_runs import assert_same, distil, toy

SHAPES = {"image": (1, 16, 16), "sound": (2, 64), "video": (4, 4, 8, 8), "vector": (6,)}
OF_ANY_RANK = ("uvit-tiny", "linear-tiny", "mobile-tiny")
OF_TEXT = ("text-", "mmdit-")
PROMPTS = "a red cat\na blue dog"


def cases():
    for name in PRESETS:
        if name.startswith(("bk-", "thin-")):
            kinds = ["unet"]
        elif name.startswith("shallow-"):
            kinds = ["transformer"]
        elif name.startswith(OF_TEXT):
            kinds = ["text"]
        else:
            kinds = ["sound"] if "-1d-" in name else ["image"]
            kinds = ["sound", "image", "video", "text"] if name in OF_ANY_RANK else kinds
            kinds = ["sound", "vector"] if name.startswith("mlp-") else kinds
        yield from (pytest.param(name, kind, id=f"{name}-{kind}") for kind in kinds)
    yield pytest.param("thin-50", "transformer", id="thin-50-transformer")


def unet():
    """Large enough that every cut takes something away."""
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=4,
    )


def transformer():
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        sample_size=16,
        num_embeds_ada_norm=3,
    )


def teacher_of(kind, folder):
    classes = ClassLabels(3, null_class=3)
    if kind == "text":
        pipelines.sd3().save_pretrained(folder)
        return with_texts(load_teacher(str(folder)), *PROMPTS.splitlines())
    if kind in ("unet", "transformer"):
        network = pipelines.seeded({"unet": unet, "transformer": transformer}[kind]())
        return toy(SHAPES["image"], classes, network=network)
    return toy(SHAPES[kind], classes if kind == "image" else None)


@pytest.fixture
def folder(tmp_path):
    """A folder that is gone when the test is: checkpoints of large networks fill disks."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), list(cases()))
def test_trains_comes_back_and_is_exported(name, kind, folder, monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", str(folder / "cache"))
    torch.manual_seed(0)
    student = distil(teacher_of(kind, folder / "teacher"), name, folder / "run")
    again = load_teacher(str(folder / "run"))
    if kind == "text":
        again = with_texts(again, *PROMPTS.splitlines())
    assert type(again.network) is type(student.network)
    assert_same(student, again)
    for file, form in (("x.pt2", "torch-export"), ("x.onnx", "onnx")):
        assert export_graph(again, folder / file, format=form)["check"]["passed"]
