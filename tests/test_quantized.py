"""A folder in int8: small, and read by stock diffusers in a process without dkdm."""

import sys

import pytest
import torch

import programs
from dkdm import Denoiser, DkdmError, Parameterization, UsageError, load_teacher, rectified_flow
from dkdm.models import LoadOptions
from dkdm.shipping.int8 import write_int8_folder
from factories import denoiser

LOADS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(
    sys.argv[1], trust_remote_code=True, torch_dtype=torch.bfloat16
)
linear = [m for m in pipeline.unet.modules() if isinstance(m, torch.nn.Linear)]
assert {type(m.weight).__name__ for m in linear} == {"Int8Tensor"}, linear[0].weight
pipeline.set_progress_bar_config(disable=True)
images = pipeline(class_labels=[0, 1], num_inference_steps=2, output_type="pt").images
assert images.isfinite().all() and len(images) == 2
"""


def test_missing_torchao_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.prototype.safetensors", None)
    with pytest.raises(DkdmError, match=r"pip install 'dkdm\[quant\]'"):
        write_int8_folder(denoiser(), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path):
    with pytest.raises(UsageError, match="exists"):
        write_int8_folder(denoiser(), tmp_path)


def test_a_network_that_is_no_model_of_diffusers(tmp_path):
    network, own = torch.nn.Identity(), Parameterization("flow_prediction")
    model = Denoiser(network, rectified_flow(10), own, (1, 4, 4))
    with pytest.raises(UsageError, match="Identity is not a diffusers ModelMixin"):
        write_int8_folder(model, tmp_path / "small")


@pytest.mark.filterwarnings("ignore")  # torchao's own, about its CUDA kernels
def test_stock_diffusers_reads_the_folder(tmp_path):
    pytest.importorskip("torchao", reason="torchao is an extra")
    whole, folder = load_teacher("builtin:fashion"), tmp_path / "small"
    write_int8_folder(whole, folder)
    done = programs.run(LOADS, folder)
    assert done.returncode == 0, done.stderr
    (weights,) = (folder / "unet").glob("*.safetensors")
    assert weights.stat().st_size < 2 * whole.num_parameters
    again = load_teacher(str(folder), options=LoadOptions(dtype="bfloat16"))
    cond = whole.conditioning.in_turns(4)
    noise = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    a, b = (model.sample(lambda _: noise, cond, 4) for model in (whole, again))
    assert 0 < (a - b).square().mean() < 0.01 * a.square().mean()
