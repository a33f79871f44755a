"""Every class of file that a run writes, damaged in every way: `doctor` names it, and the run goes
on to the same end, or says in one line what keeps it from that."""

import json
import random
import shutil

import pytest
import torch

from dkdm.cli import main
from dkdm.core.saving import checkpoint
from dkdm.core.saving.folders import MANIFEST, SUMS
from dkdm.core.saving.stopping import RESUMABLE
from dkdm.core.sources.finished import SampleShards, as_tensors
from dkdm.data.sample_files import Part, TensorShards
from dkdm.errors import DkdmError
from dkdm.evaluation.few_steps import FEW_STEPS, StepsRow, StepsTable
from dkdm.evaluation.results import SAMPLES, read_samples
from dkdm.models.prompts import EmbeddingCache
from finished_run import comparison
from test_filling import stop_in_fill
from test_kills import MORE, results
from test_resume import STEPS, command

LAST = "checkpoint-12"
WEIGHTS = checkpoint.WEIGHTS


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    """One bit: the first of a text, so that it is none any more, one in the middle of others."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if path.suffix == ".safetensors" else 0] ^= 4
    path.write_bytes(data)


def emptied(path):
    path.write_bytes(b"")


def missing(path):
    path.unlink()


def without_entry(path):
    values = json.loads(path.read_text())
    del values[[*values][-1 if path.name == MANIFEST else 0]]
    path.write_text(json.dumps(values))


def of_another_type(path):
    path.write_text("[]\n")


DAMAGES = [cut, flipped, emptied, missing]
OF_JSON = [without_entry, of_another_type]
# What a run has written, and the name under which `doctor` speaks of it.
FILES = {
    "config.json": "config.json",
    **{
        f"{LAST}/{name}": LAST
        for name in (
            *("run.json", "state.json", MANIFEST, "optimizer.safetensors", "random.safetensors"),
            *("losses.safetensors", "bad_steps.safetensors", "source/shard-0.safetensors"),
            *(f"unet/{WEIGHTS}", f"unet_ema/{WEIGHTS}", "unet/config.json"),
        )
    },
    **{f"best/{name}": "best" for name in ("best.json", MANIFEST, f"unet/{WEIGHTS}")},
    **{
        name: name
        for name in (
            *("metrics.jsonl", "history.jsonl", "evaluation.json", "pool.json", "report.html"),
            *("samples/comparison.safetensors", "samples/trajectories.safetensors"),
        )
    },
    **{
        name: "model"
        for name in (
            *(f"unet/{WEIGHTS}", "unet/config.json", "model_index.json", "pipeline.py", SUMS),
            *("scheduler/scheduler_config.json", "samples/grid.png"),
        )
    },
}
# that nothing misses: what is not there was not asked for, or is told by nothing
UNMISSED = {"history.jsonl", SUMS, "report.html"}
# entries that may be absent, as in files of earlier versions
OPTIONAL = {"config.json"}


def resumed(folder):
    return command(
        folder, *MORE, "--validation-metric", "gap", "--resume-from-checkpoint", "latest"
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that has ended, and what its end says."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(resumed(folder)) == 0
    return folder, results(folder)


@pytest.fixture
def run(whole, tmp_path):
    """The same, with checkpoint-12 as its last."""
    folder = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    return folder


def named_by_doctor(folder, capsys):
    """The names of all that `doctor` finds wrong."""
    capsys.readouterr()
    code = main(["doctor", str(folder), "--json"])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    found = {each["name"]: each["status"] for each in json.loads(out)}
    assert code == ("problem" in found.values())
    return {name for name, status in found.items() if status != "ok"}


def goes_on(folder, capsys):
    """Whether the run goes on to its end; otherwise it has said in one line why not."""
    code = main(resumed(folder))
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if code:
        assert code in (1, 2) and said.rstrip().splitlines()[-1].startswith("dkdm: ")
        assert said.count("dkdm: ") == 1
    return code == 0


def all_ways(file):
    return [*DAMAGES, *(OF_JSON if file.endswith(".json") else [])]


def check(whole, run, capsys, file, damage):
    damage(run / file)
    silent = (damage is missing and file in UNMISSED) or (
        damage is without_entry and file in OPTIONAL
    )
    found = named_by_doctor(run, capsys)
    assert silent or found & {FILES[file], "model"}  # whose hashes are kept with others
    kept = sorted(path.name for path in checkpoint.checkpoints(run))
    if not goes_on(run, capsys):
        assert file == "config.json"  # without which nothing tells what the run is
        assert sorted(path.name for path in checkpoint.checkpoints(run)) == kept
        return
    (manifest, lines, measured), (expected, all_lines, also) = results(run), whole[1]
    if file.startswith("best/"):  # which is chosen anew
        manifest, expected = ({**each, "state.json": None} for each in (manifest, expected))
    assert manifest == expected and measured == also
    if file == "metrics.jsonl":
        assert lines and all(line in all_lines for line in lines) and lines[-1] == all_lines[-1]
    else:
        assert lines == all_lines


def test_a_sound_run_is_found_sound_and_goes_on(whole, run, capsys):
    assert named_by_doctor(whole[0], capsys) == set()
    assert named_by_doctor(run, capsys) == set()
    assert goes_on(run, capsys)
    assert results(run) == whole[1]


QUICK = [("metrics.jsonl", cut), ("best/best.json", flipped), ("evaluation.json", of_another_type)]
EVERY = [(file, damage) for file in FILES for damage in all_ways(file)]


@pytest.mark.parametrize(("file", "damage"), QUICK)
def test_a_damaged_file_is_named_and_the_run_ends_the_same(whole, run, capsys, file, damage):
    check(whole, run, capsys, file, damage)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "damage"), EVERY)
def test_any_damaged_file_is_named_and_the_run_ends_the_same(whole, run, capsys, file, damage):
    check(whole, run, capsys, file, damage)


@pytest.fixture(scope="module")
def filling(tmp_path_factory):
    """A run that a signal has stopped in its fill."""
    folder = tmp_path_factory.mktemp("filling") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_in_fill(patch, "SIGTERM")
        assert main(resumed(folder)) == RESUMABLE
    return folder


OF_A_FILL = [
    "run.json",
    f"*-0-of-1/{MANIFEST}",
    "*-0-of-1/state.json",
    "*-0-of-1/shard-0.safetensors",
]
CUT = [(OF_A_FILL[0], of_another_type), (OF_A_FILL[3], cut)]
EVERY_CUT = [(file, damage) for file in OF_A_FILL for damage in all_ways(file)]


def check_fill(whole, filling, folder, capsys, file, damage):
    shutil.copytree(filling, folder)
    (path,) = (folder / "fill").glob(file)
    damage(path)
    named = named_by_doctor(folder, capsys)
    assert "fill" in named or (file, damage) == ("run.json", without_entry)
    assert goes_on(folder, capsys)
    assert results(folder) == whole[1]


@pytest.mark.parametrize(("file", "damage"), CUT)
def test_a_damaged_fill_is_named_and_begun_anew(whole, filling, tmp_path, capsys, file, damage):
    check_fill(whole, filling, tmp_path / "run", capsys, file, damage)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "damage"), EVERY_CUT)
def test_any_damaged_fill_is_begun_anew(whole, filling, tmp_path, capsys, file, damage):
    check_fill(whole, filling, tmp_path / "run", capsys, file, damage)


def test_damaged_measurements_of_few_steps_are_named(run, capsys):
    StepsTable((StepsRow("student", 1, 1.0, 0.5, {}),), 4, 0, "").save(run)
    assert named_by_doctor(run, capsys) == set()
    for damage in (*DAMAGES[:-1], *OF_JSON):
        good = (run / FEW_STEPS).read_bytes()
        damage(run / FEW_STEPS)
        assert named_by_doctor(run, capsys) == {FEW_STEPS}
        (run / FEW_STEPS).write_bytes(good)


def prompts_of(folder):
    folder.mkdir()
    cache = EmbeddingCache(folder)
    cache._append(["a", "b"], [{"encoder_hidden_states": torch.randn(2, 3)}])
    return cache._file(0), lambda: EmbeddingCache.open(folder).of(["a", "b"]).rows(torch.arange(2))


def finished_of(folder):
    shards = SampleShards(folder)
    shards.write(0, (torch.randn(4, 2), {"class_labels": torch.arange(4)}))
    return shards.path(0), lambda: as_tensors(*shards.read(0))


def harvest_of(folder):
    files = TensorShards(folder, 4)
    samples = torch.randn(4, 1, 2, 2)
    files.write(0, Part(range(4), samples, samples, torch.arange(4), None))
    return files._path(0), lambda: dict(enumerate(files.read(0, range(4))))


def captured_of(folder):
    comparison().save(folder)
    return folder / SAMPLES, lambda: read_samples(folder)


@pytest.mark.parametrize("made", [prompts_of, finished_of, harvest_of, captured_of])
def test_no_flipped_bit_in_samples_or_embeddings_is_read_over(tmp_path, made):
    path, read = made(tmp_path / "folder")
    good, expected, chooser, found = path.read_bytes(), read(), random.Random(0), 0
    for _ in range(60):
        data = bytearray(good)
        data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
        path.write_bytes(data)
        try:
            again = read()
        except DkdmError as error:
            found += len(str(error).splitlines()) == 1
            continue
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[key], expected[key]) for key in expected)
    assert found > 30
