"""Every write of a run: beside its file and renamed; and a disk that is full there, and only there,
or from there on, or takes a part of it, costs nothing that the same command does not bring back."""

import errno
import json
import os
import re
import resource
import signal
import sys

import pytest

from dkdm.cli import main
from dkdm.core.saving.folders import MANIFEST
from dkdm.core.saving.saver import Saver
from test_kills import ended, forked, outcome
from test_resume import command

STEPS = 2
RUN = (
    *("--max-train-steps", str(STEPS), "--checkpointing-steps", "2", "--validation-steps", "2"),
    *("--validation-sampling-steps", "1", "--validation-metric", "gap", "--ship-best"),
    *("--evaluation-samples", "2", "--evaluation-reference", "none", "--keep-finished", "4"),
    *("--lr-warmup-steps", "1", "--gradient-accumulation-steps", "1", "--report-to", "none"),
    *("--resume-from-checkpoint", "latest"),
)
BESIDE = re.compile(r"\.[^/]+\.(partial|[0-9a-f]{8}(\.\w+)?)(/|$)")
IN_PLACE = {".lock", "metrics.jsonl"}  # the second is appended to
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def at_writes(folder, act):
    """Let this process call `act` with each path in the folder before it is opened for writing."""

    def hook(event, args):
        if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITING:
            path = os.fsdecode(args[0])
            if path.startswith(f"{folder}/"):
                act(os.path.relpath(path, folder))

    sys.addaudithook(hook)


def one_after_the_other():
    """Let this process write its checkpoints while it waits: always in the same order."""
    save = Saver.save

    def and_wait(self, *given):
        save(self, *given)
        if self._thread is not None:
            self._thread.join()

    Saver.save = and_wait


def written(folder, args):
    """What a command writes in a folder, in order."""
    seen = folder.parent / "seen"

    def work():
        one_after_the_other()
        paths = []
        at_writes(folder, paths.append)
        code = main(args)
        seen.write_text(json.dumps(paths))
        return code

    assert ended(forked(work)) == 0
    return json.loads(seen.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed: what it wrote, and what its end says."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return written(folder, command(folder, *RUN)), results(folder)


def results(folder):
    """The end of a run, but for which weights were the best, which may be lost."""
    last = folder / f"checkpoint-{STEPS}"
    hashes, state = (json.loads((last / name).read_text()) for name in (MANIFEST, "state.json"))
    del hashes["state.json"], state["best"]
    state.pop("waiting_metrics", None)  # lines that the disk has taken since
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("steps_per_second", None)
    measured = json.loads((folder / "evaluation.json").read_text())
    return hashes, state, lines, measured["teacher"]["metrics"]


def test_every_file_of_a_run_is_written_beside_and_renamed(whole):
    paths, _ = whole
    assert [path for path in paths if not BESIDE.search(path) and path not in IN_PLACE] == []
    kinds = {re.sub(r"[0-9a-f]{8}|\d+", "#", path) for path in paths}
    for name in (".config.#.json", ".README.#.md", ".report.#.html", ".evaluation.#.json"):
        assert name in kinds
    for name in (".history.#.jsonl", "samples/.step-#.#.png", ".files.partial/pipeline.py"):
        assert name in kinds


def full_once(number):
    """The write of this number finds a full disk."""

    def act(path, count):
        if count == number:
            raise OSError(errno.ENOSPC, "No space left on device", path)

    return act


def full_from(number):
    """The write of this number, and all that follow, find a full disk."""

    def act(path, count):
        if count >= number:
            raise OSError(errno.ENOSPC, "No space left on device", path)

    return act


def cut_off(number):
    """The write of this number ends after 20 bytes, in whatever language it is written."""

    def act(path, count):
        del path
        size = 20 if count == number else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return act


def forbidden_from(number):
    """From this write on nothing may be written, as on a disk that is read-only now."""

    def act(path, count):
        if count >= number:
            raise OSError(errno.EROFS, "Read-only file system", path)

    return act


def fails(folder, act):
    """The run while `act` fails its writes; its exit code and what it said."""

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        one_after_the_other()
        count = iter(range(10**6))
        at_writes(folder, lambda path: act(path, next(count)))
        return main(command(folder, *RUN))

    return outcome(work)


def check(whole, folder, act):
    code, said = fails(folder, act)
    assert "Traceback" not in said and code in (0, 1), said
    assert said.count("\ndkdm: ") + said.startswith("dkdm: ") == code, said
    code, said = outcome(lambda: main(command(folder, *RUN)))
    assert code == 0, said
    assert results(folder) == whole[1]


def last_of_each(paths):
    """The numbers of the writes: a file is opened to be made, and perhaps again to be filled."""
    return [i for i, path in enumerate(paths) if paths[i + 1 : i + 2] != [path]]


FAULTS = [full_once, full_from, cut_off, forbidden_from]


@pytest.mark.parametrize(("fault", "part"), [*zip(FAULTS, (0.0, 0.3, 0.6, 0.95), strict=True)])
def test_a_fault_of_the_disk_costs_nothing(whole, tmp_path, fault, part):
    writes = last_of_each(whole[0])
    check(whole, tmp_path / "run", fault(writes[int(part * len(writes))]))


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(len(FAULTS)))
@pytest.mark.parametrize("part", range(4))
def test_each_fault_at_each_write_costs_nothing(whole, tmp_path, turn, part):
    """Every turn fails every write once, each by another fault."""
    for place, number in list(enumerate(last_of_each(whole[0])))[part::4]:
        fault = FAULTS[(place + turn) % len(FAULTS)]
        print(f"{fault.__name__} {number}: {whole[0][number]}", flush=True)
        check(whole, tmp_path / str(number) / "run", fault(number))
