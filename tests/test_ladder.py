"""`benchmarks/cells.py` and `benchmarks/ladder.py`: the queue, what a cell costs, the tables."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from dkdm.core.training.trainer import Trainer

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import cells
import evidence
import ladder

TINY = ladder.Scale(
    steps=4, batch_size=4, set_steps=2, fill_steps=2, rhos=(0.002, 0.05), rho=0.002,
    samples=20, sampler_steps=2, checkpoints=2,
)  # fmt: skip
FOUND = {"class_accuracy": 0.5, "variance_ratio_mean": 0.75}


def squared(cell):
    if cell["n"] == 2:
        raise ValueError("no square")
    return {"square": cell["n"] ** 2}


def lines_of(arm, *distances, evaluations):
    about = FOUND | {"evaluations": evaluations}
    return [arm.cell(seed) | about | {"fd": fd} for seed, fd in enumerate(distances)]


def row_of(table, name):
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [text.strip() for text in row.strip("|").split("|")]


def test_cells_run_once_in_order_and_one_that_fails_leaves_the_others(tmp_path, capsys):
    file, seen = tmp_path / "results.jsonl", []
    queue = [{"n": n} for n in range(4)]
    file.write_text(json.dumps({"n": 1, "square": -1}) + "\n")
    assert not cells.run_cells(file, queue, squared, 1, lambda lines: seen.append(len(lines)))
    found = [(line["n"], line["square"]) for line in cells.read_lines(file)]
    assert found == [(1, -1), (0, 0), (3, 9)]
    assert seen == [1, 2, 3]
    assert "{'n': 2} failed: ValueError: no square" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path):
    queue = [{"n": n} for n in (0, 1, 3, 4)]
    for jobs in (1, 2):
        assert cells.run_cells(tmp_path / f"{jobs}", queue, squared, jobs, lambda lines: None)
    one, two = (cells.read_lines(tmp_path / f"{jobs}") for jobs in (1, 2))
    squares = [{line["n"]: line["square"] for line in lines} for lines in (one, two)]
    assert squares[0] == squares[1] == {0: 0, 1: 1, 3: 9, 4: 16}


def test_a_spread_is_of_several_values():
    assert cells.spread([3.0]) == "3.00"
    assert cells.spread([1.0, 3.0]) == "2.00 ± 1.00"


def test_cells_go_seed_by_seed_and_what_both_tables_show_runs_once():
    scale = ladder.Scale()
    arms = [*ladder.at_equal_steps(scale, "images"), *ladder.at_equal_evaluations(scale)]
    queue = list(ladder.queue(arms, [0, 1]))
    assert queue[0] == {"arm": "teacher"}
    assert [cell["seed"] for cell in queue[1:]] == sorted(cell["seed"] for cell in queue[1:])
    assert queue.count({"arm": "dynamic, rho 0.02", "steps": scale.steps, "seed": 1}) == 1


def test_equal_evaluations_are_equal_to_a_batch():
    scale = ladder.Scale()
    for arm in ladder.at_equal_evaluations(scale):
        training = arm.steps * scale.batch_size
        cost = {
            "iterative": training,
            "shuffled": training + scale.batch_size * scale.fill_steps,
            "synthetic": arm.settings.get("synthetic_samples", 0) * scale.set_steps,
            "dynamic": training
            + scale.entries(arm.settings.get("rho", 0)) * scale.fill_steps,
        }[arm.settings["source"]]  # fmt: skip
        assert 0 <= scale.budget - cost < scale.batch_size


def test_tables_of_made_up_lines():
    steps, evaluations = (
        ladder.at_equal_steps(TINY, "images"),
        ladder.at_equal_evaluations(TINY),
    )
    by_name = {arm.name: arm for arm in [*evaluations, *steps]}
    lines = [{"arm": "teacher", "fd": 1.25} | FOUND]
    lines += lines_of(by_name["dynamic, rho 0.002"], 4.0, 8.0, evaluations=32)
    lines += lines_of(by_name["data-based"], 2.0, evaluations=0)
    page = ladder.page(TINY, "images", lines)
    first, second = page.split("## At equal teacher evaluations: 32")
    dynamic = ["dynamic, rho 0.002", "4", "32", "2", "6.00 ± 2.00", "50.0%", "0.75", "9.56"]
    assert row_of(first, "dynamic, rho 0.002") == dynamic == row_of(second, "dynamic, rho 0.002")
    assert row_of(first, "data-based")[1:] == ["4", "0", "1", "2.00", "50.0%", "0.75", "7.84"]
    assert row_of(first, "iterative")[3] == "0"
    assert row_of(first, "(teacher)")[4] == "1.25"
    assert "rho 0.05 alone costs 400" in second
    assert "data-based" not in second
    assert "dynamic, rho 0.05" not in second.split("What a pool")[0]


def test_without_images_their_rows_are_left_out_with_the_remedy(tmp_path, capsys):
    assert not ladder.images_found(str(tmp_path / "none"))
    assert "give a folder of images" in capsys.readouterr().err


def test_a_cell_that_was_stopped_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    arm = ladder.at_equal_evaluations(TINY)[0]
    cell, steps, step = arm.cell(0), [], Trainer.step

    def counted(trainer, *args):
        if len(steps) == 3:
            steps.append("stopped")
            raise KeyboardInterrupt
        steps.append(trainer.step_number)
        return step(trainer, *args)

    monkeypatch.setattr(Trainer, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        ladder.run_cell(TINY, [arm], tmp_path / "stopped", cell)
    resumed = ladder.run_cell(TINY, [arm], tmp_path / "stopped", cell)
    assert len(steps) == 4 + 2
    assert resumed == ladder.run_cell(TINY, [arm], tmp_path / "whole", cell)
    assert resumed["evaluations"] == TINY.budget


def test_a_run_costs_what_the_budget_says(tmp_path):
    arms = ladder.at_equal_evaluations(TINY)
    shuffled = next(arm for arm in arms if arm.name == "shuffled")
    work = partial(ladder.run_cell, TINY, arms, tmp_path)
    spent = work(shuffled.cell(0))["evaluations"]
    assert TINY.budget <= spent + TINY.batch_size


def test_evidence_tables_rows_beside_those_of_other_variants():
    found = FOUND | {"student": "dit-tiny"}
    lines = [{"variant": "teacher", "fd": 1.0}]
    lines += [{"variant": name, "fd": fd} | found for name, fd in (("eps", 5.0), ("default", 3.0))]
    assert row_of(evidence.table(lines, ["eps"]), "dit-tiny | default")[4] == "0.50"
    assert row_of(evidence.table(lines, ["flow"]), "dit-tiny | default")[4] == ""
