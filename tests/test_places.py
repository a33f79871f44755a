"""Nothing of a model's folder leaves its place: names, links, special files, copies."""

import json
import os
import shutil
import socket

import pytest
import torch
from safetensors.torch import save_file

import pipelines
from dkdm import load_teacher
from dkdm.core.saving import checkpoint, folders
from dkdm.errors import DkdmError, UsageError
from dkdm.models import LoadOptions, sketch_teacher
from dkdm.models.components import Component
from dkdm.reading.places import check_folder, copy_folder, expanded, inside
from dkdm.report import write_report
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import load_student
from dkdm.students.start import read_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A latent pipeline, saved once."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipelines.ldm_kl().save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A copy of it to be tampered with, beside a secret."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("private")
    return shutil.copytree(saved, tmp_path / "model")


def link_file(model, secret):
    (model / "vqvae" / "notes.txt").symlink_to(secret / "id_rsa")


def link_folder(model, secret):
    (model / "vqvae" / "ssh").symlink_to(secret)


def link_component(model, secret):
    shutil.move(model / "vqvae", secret / "vqvae")
    (model / "vqvae").symlink_to(secret / "vqvae")


def link_config(model, secret):
    shutil.move(model / "unet" / "config.json", secret / "config.json")
    (model / "unet" / "config.json").symlink_to(secret / "config.json")


def link_weights(model, secret):
    shutil.move(model / "unet" / checkpoint.WEIGHTS, secret / "weights")
    (model / "unet" / checkpoint.WEIGHTS).symlink_to(secret / "weights")


def link_index(model, secret):
    shutil.move(model / "model_index.json", secret / "index.json")
    (model / "model_index.json").symlink_to(secret / "index.json")


def link_scheduler(model, secret):
    shutil.move(model / "scheduler", secret / "scheduler")
    (model / "scheduler").symlink_to(secret / "scheduler")


def loop(model, _):
    (model / "vqvae" / "again").symlink_to("../vqvae")


def dangling(model, _):
    (model / "vqvae" / "gone").symlink_to("nowhere")


def pipe(model, _):
    os.mkfifo(model / "vqvae" / "pipe")


def rename_component(model, name):
    index = json.loads((model / "model_index.json").read_text())
    index[name] = index.pop("vqvae")
    (model / "model_index.json").write_text(json.dumps(index))


def above(model, _):
    rename_component(model, "../secret")


def absolute(model, secret):
    rename_component(model, str(secret))


def code_as_name(model, _):
    rename_component(model, "b=open('x')")


def shards_elsewhere(model, _):
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../secret/id_rsa"}}
    (model / "unet" / f"{checkpoint.WEIGHTS}.index.json").write_text(json.dumps(index))


TAMPERED = [
    link_file, link_folder, link_component, link_config, link_weights, link_index, link_scheduler,
    loop, dangling, pipe, above, absolute, code_as_name, shards_elsewhere,
]  # fmt: skip


@pytest.mark.parametrize("tamper", TAMPERED)
@pytest.mark.parametrize("opened", [load_teacher, lambda f: sketch_teacher(f, LoadOptions())])
def test_what_leaves_a_pipeline_folder_is_refused_by_name(model, tamper, opened):
    tamper(model, model.parent / "secret")
    with pytest.raises(
        UsageError, match=r"link|pipe|cannot name a component|names no file"
    ) as seen:
        opened(str(model))
    assert str(model) in str(seen.value) and "\n" not in str(seen.value)


@pytest.mark.parametrize("tamper", [link_config, link_weights, shards_elsewhere])
@pytest.mark.parametrize("opened", [load_student, lambda folder: read_checkpoint(str(folder))])
def test_links_of_a_student_folder_are_refused(model, tamper, opened):
    tamper(model, model.parent / "secret")
    with pytest.raises(UsageError, match=r"leads out of its folder|names no file"):
        opened(model)


def test_nothing_is_copied_into_a_run_from_elsewhere(model, tmp_path):
    denoiser = load_teacher(str(model))
    link_file(model, tmp_path / "secret")
    with pytest.raises(UsageError, match=r"notes\.txt is a link that leads out"):
        write_pipeline(tmp_path / "run", denoiser)
    assert not (tmp_path / "run" / "vqvae").exists()


def test_code_and_hidden_files_are_not_copied(model, tmp_path):
    for name in ("evil.py", ".hidden", "evil.pkl"):
        (model / "vqvae" / name).write_text("x")
    copy_folder(model / "vqvae", tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "config.json",
        checkpoint.WEIGHTS,
    }


def test_a_link_in_the_target_is_replaced_and_not_written_through(model, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").symlink_to(tmp_path / "secret" / "id_rsa")
    copy_folder(model / "vqvae", tmp_path / "copy")
    assert (tmp_path / "secret" / "id_rsa").read_text() == "private"
    assert not (tmp_path / "copy" / "config.json").is_symlink()


def test_a_folder_is_written_again_as_after_a_kill(model, tmp_path):
    """Its components lie in it already; of the model beside it they are hard links."""
    run, teacher = tmp_path / "run", load_teacher(str(model))
    for _ in range(2):
        write_pipeline(run, teacher)
        (run / "unet" / "former.py").write_text("")
        write_pipeline(run / "one-step", teacher, run)
    assert folders.damaged_by_sums(run) == folders.damaged_by_sums(run / "one-step") == []
    shared = (run / "vqvae" / "config.json", run / "one-step" / "vqvae" / "config.json")
    assert shared[0].samefile(shared[1])
    write_pipeline(run, teacher)
    assert not (run / "unet" / "former.py").exists()
    (run / "unet" / checkpoint.WEIGHTS).write_bytes(b"")
    assert folders.damaged_by_sums(run) == [f"unet/{checkpoint.WEIGHTS}"]
    (run / folders.SUMS).write_text(f"{'0' * 64}  ../../secret/id_rsa\n")
    with pytest.raises(UsageError, match="names no file in that folder"):
        folders.damaged_by_sums(run)


def into_hub_cache(model, cache):
    """The files as the hub's cache has them: links to blobs of the same repository."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in model.rglob("*") if path.is_file()):
        shutil.copyfile(file, repository / "blobs" / f"{number:040x}")
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(link.relative_to(repository).parts) - 1)
        link.symlink_to(f"{up}blobs/{number:040x}")
    return snapshot


def test_the_hub_cache_is_links_to_its_own_blobs(model, tmp_path):
    snapshot = into_hub_cache(model, tmp_path / "hub")
    denoiser = load_teacher(str(snapshot))
    write_pipeline(tmp_path / "run", denoiser)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 6 and not any(path.is_symlink() for path in files)
    load_student(snapshot / "unet")


def test_a_snapshot_may_not_lead_to_another_repository(model, tmp_path):
    snapshot = into_hub_cache(model, tmp_path / "hub")
    other = tmp_path / "hub" / "models--a--private" / "blobs"
    other.mkdir(parents=True)
    (other / "blob").write_text("private")
    (snapshot / "vqvae" / "notes.txt").symlink_to(other / "blob")
    with pytest.raises(UsageError, match="leads out of its folder"):
        load_teacher(str(snapshot))


def test_the_folder_itself_may_be_a_link_and_links_inside_may_be_followed(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    (model / "unet" / "same.json").symlink_to("config.json")
    load_teacher(str(tmp_path / "link"))
    Component(tmp_path / "link" / "vqvae", "diffusers", "AutoencoderKL").load()


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("here")
        with pytest.raises(UsageError, match="is a socket"):
            check_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../x", "a//b", "", ".", "a\\b", "c:/x", "a\nb", 3]
)
def test_names_that_files_give_stay_below(tmp_path, name):
    with pytest.raises(UsageError, match="index: .* names no file in that folder"):
        inside(tmp_path, name, "index")
    assert inside(tmp_path, "a/b.json", "index") == tmp_path / "a" / "b.json"


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path):
    (tmp_path / "secret").write_text("private")
    folder = tmp_path / "checkpoint-1"
    folders.write_folder(folder, lambda f: save_file({"a": torch.ones(1)}, f / "a.safetensors"))
    folders.verify_folder(folder)
    (folder / folders.MANIFEST).write_text(json.dumps({"../secret": "0"}))
    with pytest.raises(UsageError, match="names no file"):
        folders.verify_folder(folder)
    (folder / folders.MANIFEST).write_text("{}")
    (folder / "b").symlink_to(tmp_path / "secret")
    with pytest.raises(DkdmError, match="leads out"):
        folders.verify_folder(folder)


def test_a_report_reads_and_writes_nothing_through_links(tmp_path):
    run, secret = tmp_path / "run", tmp_path / "secret"
    run.mkdir()
    secret.write_text("private")
    (run / "config.json").write_text(json.dumps({"kind": "DistillConfig"}))
    (run / ".report.html.partial").symlink_to(secret)
    write_report(run)
    assert secret.read_text() == "private" and not (run / "report.html").is_symlink()
    (run / "metrics.jsonl").symlink_to(secret)
    with pytest.raises(UsageError, match=r"metrics\.jsonl is a link that leads out"):
        write_report(run)


def test_a_home_that_is_not_there_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/x") == tmp_path / "x"
    assert expanded("~no-such-user/x").parts == ("~no-such-user", "x")
    with pytest.raises(UsageError, match="~no-such-user"):
        load_teacher("~no-such-user/x")
