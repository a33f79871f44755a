"""Folders with code in every place a loader might look: no command runs any of it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines
from dkdm.cli import main
from dkdm.config import DistillConfig, to_json
from dkdm.core.saving.checkpoint import write_tensors
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import student_of
from factories import denoiser

TRIPWIRE = "dkdm_tripwire"
SHADOWED = (  # names that dkdm, diffusers or transformers import by themselves, some only later
    "yaml", "peft", "onnx", "torchao", "transformers", "xformers", "bitsandbytes", "wandb",
    "tensorboard", "sitecustomize", "usercustomize", "conftest", "dkdm_extra", "scipy", "jinja2",
)  # fmt: skip


class Harm:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def code(folder):
    """A program that leaves a trace."""
    return f"import os\nos.makedirs({str(folder.parent / TRIPWIRE)!r}, exist_ok=True)\n"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def small(folder):
    """A harmless pipeline in which code lies that no file names."""
    pipelines.ddpm().save_pretrained(folder)
    for inner in (folder, folder / "unet", folder / "scheduler"):
        for name in ("pipeline", "model", "modeling", "unet", "__init__", "scheduler", *SHADOWED):
            (inner / f"{name}.py").write_text(code(folder))
    (folder / "setup.cfg").write_text("[tool:pytest]\naddopts = -p conftest\n")
    (folder / "README.md").write_text(
        f"---\nlicense: !!python/object/apply:os.mkdir ['{folder.parent / TRIPWIRE}']\n---\n"
    )


def own(folder, factory="m.evil:Net", where=("",), **more):
    """A custom network whose config names code, which lies in the folder and beside it."""
    write_pipeline(folder, student_of("own_networks:make", denoiser()))
    top, *rest = factory.partition(":")[0].split(".")
    for place in (folder, folder / "unet", folder.parent, *(folder / name for name in where)):
        home = place / top
        home.mkdir(parents=True, exist_ok=True)
        (home / "__init__.py").write_text(code(folder))
        for name in rest:
            (home / f"{name}.py").write_text(code(folder))
    edit(folder / "unet" / "config.json", factory=factory, **more)
    edit(folder / "model_index.json", _class_name=["evil_pipeline", "Evil"])
    (folder / "evil_pipeline.py").write_text(code(folder))


def installed(folder):
    command = ["mkdir", str(folder.parent / TRIPWIRE)]
    own(folder, "subprocess:run", arguments={"args": command})


def index(folder, **entries):
    pipelines.dit().save_pretrained(folder)
    edit(folder / "model_index.json", **entries)
    (folder / "m").mkdir()
    for name in ("__init__", "evil"):
        (folder / "m" / f"{name}.py").write_text(code(folder))


def text(folder, **entries):
    """A text pipeline whose encoder and tokenizer ask for code of their own."""
    pipelines.stable_diffusion().save_pretrained(folder)
    for part in ("text_encoder", "tokenizer", "unet", "vae"):
        for name in ("modeling_evil", "tokenization_evil", "configuration_evil"):
            (folder / part / f"{name}.py").write_text(code(folder))
    auto = {
        "AutoModel": "modeling_evil.Net",
        "AutoConfig": "configuration_evil.Config",
        "AutoTokenizer": ["tokenization_evil.Words", "tokenization_evil.Words"],
    }
    edit(folder / "text_encoder" / "config.json", auto_map=auto, architectures=["Evil"])
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map=auto, tokenizer_class="Evil")
    edit(folder / "model_index.json", **entries)


def pickled(folder):
    """Weights that are programs, in the place of each kind of weights."""
    pipelines.stable_diffusion().save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        plain = "pytorch_model" if file.name.startswith("model") else "diffusion_pytorch_model"
        (file.parent / f"{plain}.bin").write_bytes(
            pickle.dumps({"w": Harm(str(folder.parent / TRIPWIRE))})
        )
        file.unlink()


def configs(folder, name="DiffusionPipeline"):
    pipelines.ddpm().save_pretrained(folder)
    edit(folder / "unet" / "config.json", _class_name=name)
    edit(folder / "model_index.json", unet=["diffusers", name])


def templates(folder):
    """Text that a template, a page or a program might take for more."""
    odd = "{{ 7.__class__ }}{% include 'x' %}\"\"\"\nimport os\nos.mkdir('dkdm_tripwire')\n"
    classes = {str(i): f"{odd}{i}" for i in range(5)}
    pipelines.dit().save_pretrained(folder)
    edit(folder / "model_index.json", id2label=classes, _came_from={"pipeline": odd})
    edit(folder / "vae" / "config.json", latents_mean=[odd] * 4, scaling_factor=odd)


FOLDERS = {
    "code that no file names": small,
    "a factory": own,
    "a factory in a package of the folder": lambda f: own(f, "unet.m.evil:Net", ("unet/m",)),
    "a factory beside": lambda f: own(f, "evil_beside:Net"),
    "an installed callable": installed,
    "a library": lambda f: index(f, vae=["os", "system"]),
    "a library for the network": lambda f: index(f, transformer=["m.evil", "Net"]),
    "a module of the folder": lambda f: index(f, vae=["m.evil", "AutoencoderKL"]),
    "another process": lambda f: index(f, vae=["subprocess", "run"], extra=["os", "system"]),
    "a scheduler": lambda f: index(f, scheduler=["m.evil", "Scheduler"]),
    "auto maps": text,
    "auto classes": lambda f: text(
        f, text_encoder=["transformers", "AutoModel"], tokenizer=["transformers", "AutoTokenizer"]
    ),
    "pickles": pickled,
    "a pipeline as network": configs,
    "a function as network": lambda f: configs(f, "load_image"),
    "words of templates": templates,
}


def commands(model, out):
    """Every command with the folder in each of its roles; `out` is where it writes."""
    tiny = ["--max-train-steps", "1", "--train-batch-size", "2", "--evaluation-samples", "0"]
    tiny += ["--pool-size", "2", "--fill", "none", "--validation-steps", "0"]
    words = ["--prompts", f"{out}.txt"]
    student, text = ["--student", "unet-tiny"], ["--student", "text-unet-tiny"]
    one = ["--num-samples", "1", "--steps", "1"]
    return {
        "inspect": ["inspect", model, "--num-samples", "2", "--steps", "1", *words],
        "inspect without prompts": ["inspect", model, "--num-samples", "2", "--steps", "1"],
        "sample": ["sample", model, *one, "--output", f"{out}.png"],
        "sample prompts": ["sample", model, *one, "--output", f"{out}.png", *words],
        "distill": ["distill", "--teacher", model, *student, "--output-dir", out, *tiny],
        "distill prompts": [
            "distill",
            "--teacher",
            model,
            *text,
            "--output-dir",
            out,
            *tiny,
            *words,
        ],
        "distill into": ["distill", "--student", model, "--output-dir", out, *tiny],
        "distill from": ["distill", *student, "--student-init", model, "--dry-run"],
        "config": ["distill", "--config", f"{model}/config.json", "--dry-run"],
        "samples": ["inspect", "builtin:fashion", "--samples", model, *one[:2]],
        "lora": ["distill", "--teacher", model, *student, "--teacher-lora", model, "--dry-run"],
        "network alone": ["inspect", f"{model}/unet", "--scheduler", f"{model}/scheduler"],
        "train": ["train", "--base", model, "--output-dir", out, *tiny[:6]],
        "train network": ["train", "--network", model, "--output-dir", out, *tiny[:6]],
        "students": ["students", "--teacher", model, "--no-measure"],
        "check-student": ["check-student", "--student", model, "--no-compile", "--no-export"],
        "plan": ["plan", model, "unet-tiny"],
        "plan text": ["plan", model, "text-unet-tiny"],
        "plan student": ["plan", "builtin:fashion", model],
        "export": ["export", model, "--output", f"{out}.pt2", "--format", "torch-export"],
        "report": ["report", model],
        "push": ["push", model],
        "doctor": ["doctor"],
    }


FAST = ("sample", "sample prompts", "config", "report")


@pytest.fixture
def stranger(request, tmp_path, monkeypatch):
    folder = tmp_path / "stranger"
    FOLDERS[request.param](folder)
    (folder / "config.json").write_text(
        to_json(DistillConfig(teacher="m.evil:Net", student="stranger.m.evil:Net"))
    )
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("DKDM_DATA_HOME", str(tmp_path / "no-records"))
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "no-embeddings"))
    return folder


def try_all(stranger, monkeypatch, capsys, names):
    path = list(sys.path)
    for place, model in ((stranger, "."), (stranger.parent, "stranger")):
        monkeypatch.chdir(place)
        for name, args in commands(model, str(stranger.parent / "out" / "x")).items():
            if name not in names:
                continue
            (stranger.parent / "out" / "x.txt").write_text("a red cat\n")
            try:
                exit_code = main(args)
            except SystemExit as stop:  # how the parser of options ends
                exit_code = stop.code
            said = capsys.readouterr().err
            where = f"{name} in {place.name}: {said}"
            assert not list(stranger.parent.rglob(TRIPWIRE)), where
            assert exit_code in (0, 1, 2), where
            assert "Traceback" not in said, where
            shutil.rmtree(stranger.parent / "out")
            (stranger.parent / "out").mkdir()
    assert sys.path == path


@pytest.mark.parametrize("stranger", FOLDERS, indirect=True)
def test_no_code_of_a_folder_runs(stranger, monkeypatch, capsys):
    try_all(stranger, monkeypatch, capsys, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("stranger", FOLDERS, indirect=True)
def test_no_code_of_a_folder_runs_in_any_command(stranger, monkeypatch, capsys):
    try_all(stranger, monkeypatch, capsys, commands("", ""))


@pytest.mark.parametrize("stranger", ["a factory"], indirect=True)
def test_the_wire_is_tripped_by_code_that_the_user_runs(stranger, monkeypatch, capsys):
    """So that the tests above can fail: the package beside the folder is named here."""
    monkeypatch.chdir(stranger.parent)
    before = set(sys.modules)
    assert main(["plan", "stranger", "unet-tiny", "--student-factory", "m.evil:Net"]) == 2
    assert "cannot import m.evil:Net" in capsys.readouterr().err
    assert (stranger.parent / TRIPWIRE).is_dir()
    for name in set(sys.modules) - before:
        del sys.modules[name]


# --- single files --------------------------------------------------------------------------------

GLOBALS = {
    "getattr": b"cbuiltins\ngetattr\n",
    "eval": b"cbuiltins\neval\n",
    "system": b"cposix\nsystem\n",
    "typing": b"ctyping\nsys.modules\n",
    "omegaconf": b"comegaconf.sys\nmodules\n",
    "lightning": b"cpytorch_lightning.os\nsystem\n",
    "torch": b"ctorch.hub\nload\n",
    "stub": b"cargparse.Namespace\nsystem\n",
}


def program(name, harm):
    """A pickle that calls a name with a text."""
    return b"\x80\x02" + GLOBALS[name] + b"X" + len(harm).to_bytes(4, "little") + harm + b"\x85R."


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])
@pytest.mark.parametrize("name", GLOBALS)
@pytest.mark.parametrize("suffix", ["pt", "ckpt", "bin", "pkl"])
def test_no_code_of_a_file_runs(tmp_path, capsys, name, zipped, suffix):
    path, harm = tmp_path / f"weights.{suffix}", f"mkdir {tmp_path / TRIPWIRE}".encode()
    if name == "eval":
        harm = f"__import__('os').mkdir({str(tmp_path / TRIPWIRE)!r})".encode()
    if zipped:
        torch.save({"w": torch.ones(1)}, path)
        with zipfile.ZipFile(path) as whole:
            parts = {part: whole.read(part) for part in whole.namelist()}
        with zipfile.ZipFile(path, "w") as whole:
            for part, content in parts.items():
                broken = part.endswith("data.pkl")
                whole.writestr(part, program(name, harm) if broken else content)
    else:
        path.write_bytes(program(name, harm))
    assert main(["inspect", str(path)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / TRIPWIRE).exists()


def test_odd_words_beside_weights_are_words(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"__import__('os')": torch.ones(1), "../../up": torch.ones(1)})
    assert main(["inspect", str(path)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["o.npy", "o.npz", "o.pt", "o.pth", "plain.npy", "plain.pt"])
def test_samples_are_no_programs(tmp_path, capsys, name):
    path, harm = tmp_path / name, Harm(str(tmp_path / TRIPWIRE))
    objects = np.array([harm], dtype=object)
    if name.startswith("plain"):
        path.write_bytes(pickle.dumps(harm))
    elif name == "o.npy":
        np.save(path, objects, allow_pickle=True)
    elif name == "o.npz":
        np.savez(path, samples=objects)
    else:
        torch.save({"samples": harm}, path)
    assert main(["inspect", "builtin:fashion", "--samples", str(path)]) == 2
    said = capsys.readouterr().err
    assert "cannot be read" in said
    assert "weights_only=" not in said and "set to" not in said and "pickle.load" not in said
    assert not (tmp_path / TRIPWIRE).exists()


# --- whole processes -----------------------------------------------------------------------------


ENTRY = "import sys\nfrom {0} import {1}\nsys.exit({1}())\n"  # what an installer writes


@pytest.mark.slow
@pytest.mark.parametrize("command", ["module", "script"])
def test_a_process_takes_no_module_of_the_current_directory(tmp_path, command):
    """What dkdm and its libraries import by themselves comes from what is installed.

    The script is safe beside files named like any part of Python; of `python -m dkdm`, Python
    itself looks for `runpy` and others first.
    """
    folder = tmp_path / "stranger"
    small(folder)
    names = ["tyro", "diffusers", "torch", "numpy", "dkdm_extra"]
    names += [*sys.stdlib_module_names, "dkdm"] if command == "script" else []
    for name in names:
        (folder / f"{name}.py").write_text(code(folder))
    source = Path(sys.modules["dkdm"].__file__).parent.parent
    script = tmp_path / "bin" / "dkdm"
    script.parent.mkdir()
    script.write_text(ENTRY.format(*_entry_point()))
    start = ["-m", "dkdm"] if command == "module" else [str(script)]
    run = subprocess.run(
        [sys.executable, *start, "sample", ".", "--num-samples", "1", "--steps", "1"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / TRIPWIRE).exists(), run.stderr


def _entry_point():
    """(module, function) of the command in pyproject.toml."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    return project["project"]["scripts"]["dkdm"].split(":")
