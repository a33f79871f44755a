"""Damaged and hostile files of every kind: one line of an error, or success; never a traceback."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import factories
import finished_run as finished
import pipelines
import small_runs
from dkdm import load_teacher
from dkdm.config import DistillConfig, read_config, to_json
from dkdm.core.saving import checkpoint, folders
from dkdm.core.training.trainer import Trainer
from dkdm.errors import DkdmError
from dkdm.evaluation.results import EVALUATION, SAMPLES
from dkdm.models import LoadOptions, sketch_teacher
from dkdm.models.custom_network import read_origin
from dkdm.models.prompts import read_prompts
from dkdm.models.schedulers import named_config
from dkdm.reading.fields import read_json
from dkdm.report import write_report
from dkdm.shipping.licence import origin_of
from dkdm.students import load_student
from dkdm.students.interface import Interface
from dkdm.students.start import read_checkpoint
from fuzzing import mutated
from original_files import latent as compvis

QUICK, ALL = 300, 10_000
LONGEST = 3000  # characters of a message
GROWTH_MIB = 2500  # of this process over all inputs
WEIGHTS = checkpoint.WEIGHTS


class Kind:
    """A kind of file: where a good one lies, what opens it, and whether it is JSON.

    weight: how often it is drawn among the others.
    """

    def __init__(self, base, file, opened, weight=1):
        self.base, self.file, self.opened, self.weight = base, file, opened, weight
        self.is_json = file.endswith(".json")


def sketched(folder):
    sketch_teacher(str(folder), LoadOptions())


def loaded(folder):
    load_teacher(str(folder))


def coded(folder):
    """The autoencoder: what its config says, and itself."""
    coder = load_teacher(str(folder)).bundle.autoencoder
    coder.standard()
    coder.component.load()


def encoded(folder):
    """A text encoder, by a sketch of its pipeline."""
    sketch = sketch_teacher(str(folder), LoadOptions())
    sketch.bundle.components["text_encoder"].load()


def as_student(folder):
    from dkdm.students import build_network

    teacher = factories.denoiser()
    given = Interface(teacher.sample_shape, 1, teacher.conditioning, teacher.network, None)
    build_network(str(folder / "config.json"), given)


def as_own(folder):
    read_origin(read_json(folder / "config.json", "a config"), folder)


def carded(folder):
    origin_of(DistillConfig(teacher=str(folder)).teacher_choice)


def scheduled(folder):
    named_config(str(folder / "scheduler_config.json"))


def from_compvis(folder):
    load_teacher(str(folder / "model.ckpt"), options=LoadOptions(config=folder / "config.yaml"))


KINDS = [
    Kind("ldm", "model_index.json", sketched, 3),
    Kind("ldm", "scheduler/scheduler_config.json", sketched, 3),
    Kind("ldm", "unet/config.json", sketched, 3),
    Kind("ldm", "unet/config.json", loaded),
    Kind("ldm", "vqvae/config.json", coded, 3),
    Kind("ldm", f"unet/{WEIGHTS}", loaded),
    Kind("sharded", f"unet/{WEIGHTS}.index.json", loaded),
    Kind("dit", "model_index.json", sketched),
    Kind("dit", "transformer/config.json", sketched, 2),
    Kind("flux", "transformer/config.json", sketched),
    Kind("flux", "scheduler/scheduler_config.json", sketched, 2),
    Kind("text", "model_index.json", sketched),
    Kind("text", "text_encoder/config.json", encoded),
    Kind("student", "config.json", as_student, 3),
    Kind("student", "config.json", load_student),
    Kind("student", WEIGHTS, lambda folder: read_checkpoint(str(folder))),
    Kind("own", "config.json", as_own, 2),
    Kind("run", "config.json", write_report, 3),
    Kind("run", "config.json", lambda folder: read_config(folder / "config.json"), 2),
    Kind("run", "metrics.jsonl", write_report, 2),
    Kind("run", EVALUATION, write_report, 3),
    Kind("run", SAMPLES, write_report),
    Kind("run", "samples/step-000100.png", write_report),
    Kind("run", "checkpoint-1/manifest.json",
         lambda folder: folders.verify_folder(folder / "checkpoint-1")),
    Kind("card", "README.md", carded),
    Kind("prompts", "prompts.txt", lambda f: read_prompts(str(f / "prompts.txt"), 10, 0)),
    Kind("schedule", "scheduler_config.json", scheduled, 2),
    Kind("compvis", "config.yaml", from_compvis, 2),
    Kind("compvis", "model.ckpt", from_compvis),
]  # fmt: skip
DRAWN = [kind for kind in KINDS for _ in range(kind.weight)]


def make_bases(root):
    """A good folder of each kind."""
    pipelines.ldm_kl().save_pretrained(root / "ldm")
    shutil.copytree(root / "ldm", root / "sharded")
    shards = {"metadata": {}, "weight_map": {"conv_in.weight": "a.safetensors"}}
    (root / "sharded" / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(shards))
    pipelines.dit().save_pretrained(root / "dit")
    pipelines.flux().save_pretrained(root / "flux")
    pipelines.stable_diffusion().save_pretrained(root / "text")
    factories.tiny_unet().save_pretrained(root / "student")
    (root / "own").mkdir()
    own = {"_class_name": "OwnNetwork", "network": "Net", "factory": "m:f", "out_channels": 3}
    own |= {"sample_shape": [3, 8, 8], "num_classes": 2, "null_class": None, "embeddings": {}}
    (root / "own" / "config.json").write_text(json.dumps(own))
    make_run(root / "run")
    (root / "card").mkdir()
    matter = {"license": "mit", "license_link": "LICENSE", "base_model": ["a/b"], "tags": ["x"]}
    (root / "card" / "README.md").write_text(f"---\n{yaml.safe_dump(matter)}---\n# Card\n")
    (root / "prompts").mkdir()
    (root / "prompts" / "prompts.txt").write_text("a cat\nein Hund \u00e4\n")
    (root / "schedule").mkdir()
    shutil.copy(root / "ldm" / "scheduler" / "scheduler_config.json", root / "schedule")
    (root / "compvis").mkdir()
    torch.save({"state_dict": compvis.checkpoint("kl")}, root / "compvis" / "model.ckpt")
    config = yaml.safe_dump({"model": {"params": compvis.config("kl")}})
    (root / "compvis" / "config.yaml").write_text(config)


def make_run(folder):
    folder.mkdir()
    (folder / "config.json").write_text(to_json(finished.CONFIG))
    finished.write_metrics(folder, last=200)
    finished.write_stages(folder, 100, 200)
    finished.comparison().save(folder)
    folders.write_folder(
        folder / "checkpoint-1", lambda f: checkpoint.save_network(factories.tiny_unet(), f)
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    make_bases(root)
    return root


def attempt(bases, number):
    """Open the file with damage `number`; the message of an exception that is not dkdm's."""
    kind = DRAWN[number % len(DRAWN)]
    file = bases / kind.base / kind.file
    good = file.read_bytes()
    try:
        file.write_bytes(mutated(good, number, kind.is_json))
        kind.opened(bases / kind.base)
    except DkdmError as error:
        lines = str(error).splitlines()
        if len(str(error)) > LONGEST or (len(lines) > 1 and kind.file != "model.ckpt"):
            return f"{number} {kind.base}/{kind.file}: {len(lines)} lines: {str(error)[:300]}"
    except (Exception, Warning) as error:
        return f"{number} {kind.base}/{kind.file}: {where(error)}"
    finally:
        file.write_bytes(good)
    return None


def where(error):
    """What was raised, and the last line of dkdm's that it went through."""
    at, found = error.__traceback__, ""
    while at is not None:
        name = at.tb_frame.f_code.co_filename
        found = f"{Path(name).name}:{at.tb_lineno}" if "/dkdm/" in name else found
        at = at.tb_next
    return f"{type(error).__name__} at {found}: {' '.join(str(error).split())[:200]}"


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """Caches of its own, and a folder around everything that must stay as it is."""
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("private")
    return tmp_path


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check(bases, apart, numbers):
    before = peak_mib()
    wrong = [found for number in numbers if (found := attempt(bases, number))]
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(wrong)
    assert peak_mib() - before < GROWTH_MIB
    outside = {path.name for path in apart.iterdir()} - {"secret", "cache"}
    assert not outside and (apart / "secret").read_text() == "private"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(5))
def test_damaged_files_are_refused_in_a_line(bases, apart, part):
    each = QUICK // 5
    check(bases, apart, range(part * each, (part + 1) * each))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(20))
def test_ten_thousand_damaged_files_are_refused_in_a_line(bases, apart, part):
    each = ALL // 20
    check(bases, apart, range(part * each, (part + 1) * each))


def test_good_files_are_accepted(bases):
    for kind in KINDS:
        if kind.base != "sharded":
            kind.opened(bases / kind.base)


RESUMED_FROM = (
    "state.json",
    "optimizer.safetensors",
    "source/shard-0.safetensors",
    "random.safetensors",
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer that has taken a step and written its checkpoint."""
    held = []
    with pytest.MonkeyPatch.context() as patch:
        walk = Trainer.run
        patch.setattr(Trainer, "run", lambda self: (walk(self), held.append(self)))
        small_runs.run(tmp_path_factory.mktemp("resumed"), max_train_steps=1, evaluation_samples=0)
    return held[0]


def with_hashes(folder, whole, file, data):
    """A checkpoint whose file holds `data`, with the hashes of what it holds."""

    def fill(partial):
        shutil.copytree(whole, partial, dirs_exist_ok=True)
        (partial / folders.MANIFEST).unlink()
        (partial / file).write_bytes(data)

    folders.write_folder(folder, fill)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", RESUMED_FROM)
def test_a_checkpoint_that_somebody_wrote_is_resumed_or_refused_in_a_line(trainer, apart, file):
    whole = checkpoint.checkpoints(trainer.output_dir)[-1]
    trainer.resume(whole)
    good, wrong = (whole / file).read_bytes(), []
    for number in range(8):
        data = mutated(good, number, file.endswith(".json"))
        with_hashes(apart / "checkpoint-9", whole, file, data)
        try:
            trainer.resume(apart / "checkpoint-9")
        except DkdmError as error:
            wrong += [number] if len(str(error).splitlines()) > 1 else []
        except Exception as error:
            wrong.append(f"{number}: {where(error)}")
    trainer.resume(whole)
    assert not wrong
