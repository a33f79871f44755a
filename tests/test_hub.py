"""Finished runs are uploaded to a hub: to a stand-in on this machine, by huggingface_hub itself."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import constants

import dkdm
import programs
from dkdm.cli import main
from dkdm.config import read_config
from dkdm.errors import DkdmError, UsageError
from dkdm.models import load_teacher
from dkdm.shipping.hub import push
from dkdm.students import student_of
from factories import denoiser
from hub_stand_in import READ, USER, WRITE, Hub

# huggingface_hub's upload of large files without hf_xet; httpx2 would have it named otherwise
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RUN = dkdm.DistillConfig(
    student="dit-xs",
    max_train_steps=2,
    train_batch_size=4,
    pool_size=8,
    fill_steps=1,
    checkpointing_steps=1,
    logging_steps=1,
    validation_steps=1,
    validation_sampling_steps=1,
    evaluation_samples=0,
    license="apache-2.0",
    report_to="tensorboard",
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, to which one is logged in."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.utils._http.close_session()
    yield server
    huggingface_hub.utils._http.close_session()
    server.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of a class-conditional transformer, not uploaded yet."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    teacher = denoiser(3)
    return dkdm.distill(teacher, student_of("dit-xs", teacher), replace(RUN, output_dir=folder))


def distill(folder, **changes):
    config = replace(RUN, output_dir=folder, push_to_hub=True, **changes)
    return dkdm.distill(denoiser(None), replace(denoiser(None, seed=1), name="tiny"), config)


def refused(kind, run, **options):
    with pytest.raises(kind) as caught:
        push(run, **options)
    assert type(caught.value) is kind
    return str(caught.value)


def test_a_run_is_uploaded_and_again_when_it_went_on(hub, tmp_path):
    folder = distill(tmp_path / "mine")
    assert read_config(folder / "config.json").hub_model_id == f"{USER}/mine"
    files = hub.files(f"{USER}/mine")
    expected = {"README.md", "config.json", "metrics.jsonl", "report.html", "model_index.json"}
    assert expected <= files.keys()
    assert "unet/diffusion_pytorch_model.safetensors" in files
    assert "samples/step-000002.png" in files
    assert not [name for name in files if re.match(r"checkpoint-|logs/|\.|.*partial", name)]
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    for name, data in files.items():
        assert (folder / name).read_bytes() == data
    message, _ = hub.commits[0]
    assert message.startswith("tiny distilled from model: 2 steps, dkdm ")
    distill(folder, max_train_steps=3, resume_from_checkpoint="latest")
    message, changed = hub.commits[1]
    assert "3 steps" in message
    assert "unet/diffusion_pytorch_model.safetensors" in changed
    assert "unet/config.json" not in changed


@pytest.mark.usefixtures("hub")
def test_the_token_is_in_no_file(tmp_path):
    folder = distill(tmp_path / "mine")
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert any("tfevents" in path.name for path in written)
    assert not [path for path in written if WRITE.encode() in path.read_bytes()]


FROM_THE_STAND_IN = """
import sys
from huggingface_hub import constants, hf_api
url, constants.HF_HUB_CACHE = sys.argv[1:]
template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
constants.HUGGINGFACE_CO_URL_TEMPLATE = template
constants.ENDPOINT = hf_api.api.endpoint = url
constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
"""


def test_what_the_card_says_runs_on_what_was_uploaded(hub, finished, tmp_path):
    """In a process of its own, in which there is no dkdm and nothing was downloaded yet."""
    assert push(finished, "pushed") == f"{hub.url}/{USER}/pushed"
    card = hub.files(f"{USER}/pushed")["README.md"].decode()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert f'.from_pretrained("{USER}/pushed", trust_remote_code=True)' in code
    code = FROM_THE_STAND_IN + code.replace("steps=50", "steps=2")
    code += "\nprint(len(images), images[0].size)"
    open_to_all = {"TRANSFORMERS_OFFLINE": "0", "HF_TOKEN": "", "NO_PROXY": "127.0.0.1"}
    done = programs.run(code, hub.url, tmp_path / "cache", environment=open_to_all)
    assert done.stdout.strip() == "3 (8, 8)", done.stderr
    assert [*(tmp_path / "cache").glob(f"models--{USER}--pushed/snapshots/*/model_index.json")]


def test_command_uploads_and_prints_the_address(hub, finished, capsys):
    assert main(["push", str(finished), "--hub-model-id", f"{USER}/other", "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/{USER}/other"
    assert hub.private == {f"{USER}/other": True}
    assert main(["push", str(finished)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/{USER}/small"
    assert not hub.private[f"{USER}/small"]


def test_small_files_go_the_way_of_hf_xet(hub, finished, monkeypatch):
    """Where hf_xet is installed, files are committed in batches; large ones need a real hub."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large = ()
    push(finished, "batches")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert hub.files(f"{USER}/batches")[weights] == (finished / weights).read_bytes()
    assert not hub.objects


def test_flags_of_the_command_line(hub, tmp_path, capsys):
    folder = tmp_path / "run"
    args = ("distill", "--teacher", "factories:teacher", "--student", "factories:student")
    small = ("--max-train-steps", "1", "--train-batch-size", "4", "--pool-size", "8")
    quick = ("--fill-steps", "1", "--evaluation-samples", "0", "--validation-steps", "0")
    push_to = ("--push-to-hub", "--hub-model-id", f"{USER}/named", "--hub-private")
    assert main([*args, *small, *quick, *push_to, "--output-dir", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/{USER}/named"
    assert hub.private == {f"{USER}/named": True}


def test_training_on_images_is_uploaded_too(hub, tmp_path):
    from PIL import Image

    for i in range(4):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 50 * i).save(path)
    config = dkdm.TrainConfig(
        output_dir=tmp_path / "run",
        images=str(tmp_path / "images"),
        sample_shape=(1, 8, 8),
        network="dit-xs",
        max_train_steps=1,
        train_batch_size=4,
        validation_steps=0,
        evaluation_samples=0,
        push_to_hub=True,
    )
    dkdm.train(config)
    assert hub.commits[0][0].startswith("Trained on images: 1 steps")
    text = hub.files(f"{USER}/run")["README.md"].decode()
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("token", "wanted", "said"),
    [
        (None, None, "not logged in"),
        ("hf_unknown", None, "does not know this token"),
        (READ, None, "may only read"),
        (WRITE, "another/mine", "may not write there"),
        (WRITE, "a/b/c", "not a valid name on the hub"),
    ],
)
def test_a_run_that_may_not_upload_does_not_start(hub, tmp_path, monkeypatch, token, wanted, said):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match=said):
        distill(tmp_path / "mine", hub_model_id=wanted)
    assert not (tmp_path / "mine" / "config.json").exists()
    assert not hub.commits


def test_a_failed_upload_does_not_lose_the_run(hub, tmp_path):
    hub.refuse = "/commit/"
    folder = tmp_path / "my run"
    with pytest.raises(DkdmError, match="the run is complete in") as caught:
        distill(folder, hub_model_id="mine")
    assert "disk of the stand-in is full" in str(caught.value)
    command = f"dkdm push '{folder}' --hub-model-id {USER}/mine"
    assert str(caught.value).endswith(command)
    assert dkdm.load_teacher(str(folder)).num_parameters > 0
    assert (folder / "report.html").is_file()
    hub.refuse = None
    assert push(folder) == f"{hub.url}/{USER}/mine"
    assert "model_index.json" in hub.files(f"{USER}/mine")


def test_what_is_no_finished_run_is_not_uploaded(hub, tmp_path, finished):
    assert "is not a finished run" in refused(UsageError, tmp_path / "nowhere")
    (tmp_path / "config.json").write_text((finished / "config.json").read_text())
    assert "is not a finished run" in refused(UsageError, tmp_path)
    assert not hub.requests


@pytest.mark.usefixtures("hub")
def test_offline_and_unreachable_hubs_are_said(finished, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(DkdmError, finished)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "to http://127.0.0.1:9 failed" in refused(DkdmError, finished)


@pytest.mark.usefixtures("hub")
def test_errors_of_the_command_are_one_line(finished, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(finished)]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("dkdm: not logged in")
    assert "\n" not in message


def test_a_run_that_is_not_to_be_uploaded_asks_no_hub(hub, finished):
    assert "hub_model_id" in json.loads((finished / "config.json").read_text())
    assert not hub.requests
    matter = yaml.safe_load((finished / "README.md").read_text().split("---\n")[1])
    assert matter["license"] == "apache-2.0"


@pytest.mark.parametrize("objective", ["few-step", "consistency"])
def test_a_few_step_folder_samples_after_its_way_through_the_hub(
    hub, tmp_path, objective, monkeypatch
):
    """By dkdm and by diffusers, from what was downloaded again, with what lies beside it."""
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "".join(files[1:]))
    few = {"objective": objective, "student_steps": "1,2", "few_step_heads": 2, "eta": 0.0}
    config = replace(RUN, output_dir=tmp_path / "run", few_step_pool=8, **few)
    teacher = denoiser(3)
    folder = dkdm.distill(teacher, student_of("dit-xs", teacher), config)
    push(folder, "few")
    names = hub.files(f"{USER}/few").keys()
    assert not [name for name in names if "checkpoint-" in name]
    copy = Path(huggingface_hub.snapshot_download(f"{USER}/few", local_dir=tmp_path / "copy"))
    beside = {"few-step": "one-step", "consistency": "many-steps"}[objective]
    for part in ("", beside, "plain"):
        weights = Path(part, "transformer", "diffusion_pytorch_model.safetensors")
        assert (copy / weights).read_bytes() == (folder / weights).read_bytes()
    noise = torch.Generator().manual_seed(0)
    model = load_teacher(copy)
    own = model.sample(
        lambda _: torch.randn(2, 1, 8, 8, generator=noise), model.conditioning.of([0, 1]), 2
    )
    with warnings.catch_warnings(action="ignore"):
        pipeline = DiffusionPipeline.from_pretrained(copy, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        class_labels=[0, 1],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-4)
