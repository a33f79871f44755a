"""Loading teachers, and the one clear message for each folder that is none."""

import json

import pytest
import torch

from dkdm import DkdmError, UsageError, load_teacher
from dkdm.models import LoadOptions
from dkdm.models.locate import locate
from dkdm.shipping.pipeline_folder import write_pipeline
from factories import denoiser


@pytest.fixture
def folder(tmp_path):
    write_pipeline(tmp_path, denoiser(3))
    return tmp_path


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def refused(folder, kind=UsageError, **options):
    with pytest.raises(kind) as error:
        load_teacher(str(folder), **options)
    return str(error.value)


def test_path_that_is_no_teacher(tmp_path):
    assert "give a diffusers folder" in refused("no such model")
    assert "with model_index.json" in refused(tmp_path)


def test_unknown_builtin():
    assert "builtin:fashion" in refused("./none")
    assert "no builtin model 'nothing'" in refused("builtin:nothing")


def test_missing_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "cannot be loaded" in refused(folder, DkdmError)


def test_weights_of_another_network(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["surprise"] = weights.pop("conv_in.weight")
    save_file(weights, path)
    message = refused(folder, DkdmError)
    assert "conv_in.weight" in message
    assert "surprise" in message


def test_weights_of_another_shape(folder):
    edit(folder / "unet" / "config.json", block_out_channels=[8, 24])
    assert "the weights" in refused(folder, DkdmError)


def test_unknown_prediction_type(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="magic")
    assert "'magic': give one of epsilon" in refused(folder)


def test_unsupported_scheduler_is_named_with_the_nearest(folder):
    edit(folder / "model_index.json", scheduler=["diffusers", "ScoreSdeVeScheduler"])
    message = refused(folder)
    assert "ScoreSdeVeScheduler" in message
    assert "with process karras" in message


def test_solver_of_several_steps_becomes_ddim(folder):
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    process = load_teacher(str(folder)).process
    assert process.scheduler["_class_name"] == "DDIMScheduler"
    assert process.clipping.range is None


@pytest.mark.parametrize("where", ["pipeline", "scheduler"])
def test_consistency_model(folder, where):
    if where == "pipeline":
        edit(folder / "model_index.json", _class_name="ConsistencyModelPipeline")
    else:
        scheduler = ["diffusers", "CMStochasticIterativeScheduler"]
        edit(folder / "model_index.json", scheduler=scheduler)
    assert "reverse transition" in refused(folder)


def test_component_that_is_listed_and_not_there(folder):
    edit(folder / "model_index.json", vqvae=["diffusers", "VQModel"])
    assert "lists vqvae, but there is no such folder" in refused(folder, DkdmError)


def test_zero_snr_with_epsilon(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    edit(path, prediction_type="epsilon", rescale_betas_zero_snr=True)
    assert "epsilon prediction cannot be used" in refused(folder)


def test_learned_variance_without_channels_for_it(folder):
    edit(folder / "scheduler" / "scheduler_config.json", variance_type="learned_range")
    assert "must return (2, 2, 8, 8)" in refused(folder)


def test_pickled_weights_are_read_without_running_code(folder):
    from safetensors.torch import load_file

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    path.unlink()
    torch.save(weights, folder / "unet" / "diffusion_pytorch_model.bin")
    assert load_teacher(str(folder)).num_parameters > 0


def test_pickle_with_code_is_refused(folder):
    class Malicious:
        def __reduce__(self):
            return (print, ("code ran",))

    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": Malicious()}, folder / "unet" / "diffusion_pytorch_model.bin")
    assert "holds more than weights (builtins.print)" in refused(folder)


def test_half_precision(folder):
    assert load_teacher(str(folder), options=LoadOptions(dtype="bfloat16")).dtype == torch.bfloat16


def test_variant_and_subfolder(tmp_path):
    write_pipeline(tmp_path / "inner", denoiser(3))
    weights = tmp_path / "inner" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    model = load_teacher(str(tmp_path), subfolder="inner", options=LoadOptions(variant="fp16"))
    assert model.num_parameters > 0


def test_factory():
    assert load_teacher("factories:teacher").name == "factories:teacher"
    assert "returned list" in refused("factories:not_a_model")
    assert "no luck" in refused("factories:raising", DkdmError)
    assert "cannot import" in refused("factories:missing")


def test_hub_id_is_asked_of_the_hub_with_its_revision(folder, monkeypatch):
    """The hub itself is stood in for: what is passed on, and that its folder is used."""
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(repo_id=repo_id, **options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load_teacher("someone/some-model", revision="v1.2")
    assert model.name == "someone/some-model"
    assert asked["repo_id"] == "someone/some-model"
    assert asked["revision"] == "v1.2"
    assert any("safetensors" in p or p.endswith(".*") for p in asked["allow_patterns"])


def test_hub_that_does_not_answer_is_a_clear_failure():
    assert "hub did not give it" in refused("someone/does-not-exist", DkdmError)


def test_builtin_folder_is_found():
    path = locate("builtin:fashion")
    assert (path / "unet" / "config.json").is_file()
