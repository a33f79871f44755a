"""Few-step runs: two parts, what they ship, what they refuse, and that they resume bit by bit."""

import json
import math
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from torch import nn

import dkdm
import own_networks
import pipelines
import small_runs
from dkdm.cli import main
from dkdm.config import read_config
from dkdm.core.few_steps.grid import grid_levels, grid_of
from dkdm.core.few_steps.heads import ParallelHeads
from dkdm.core.saving.progress import MetricsFile, read_metrics
from dkdm.errors import UsageError
from dkdm.evaluation.few_steps import read_steps_table, trailing
from dkdm.evaluation.results import read_evaluation, read_samples
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.models import load_teacher, with_texts
from dkdm.report import write_report
from dkdm.report.entries import entry_of_run
from dkdm.report.page import command_line
from dkdm.report.run import read_run, spent
from dkdm.runs.distill import describe
from dkdm.runs.pair import Wish, draw_both, pair_of
from dkdm.runs.programs import OBJECTIVES
from dkdm.shipping.graph.network import graph_network, random_inputs
from dkdm.students import given_student, student_of
from dkdm.students.heads import one_step, with_heads
from factories import denoiser, tiny_unet

FEW = {
    "objective": "few-step",
    "student_steps": "1:4",
    "few_step_heads": 4,
    "few_step_pool": 16,
    "few_step_batch_size": small_runs.SMALL.training.train_batch_size,
    "max_train_steps": 8,
    "few_step_share": 0.5,
    "evaluation_samples": 0,
    "checkpointing_steps": 2,
}
STEPS = (1, 2, 4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, *_ = small_runs.run(tmp_path_factory.mktemp("few"), **FEW | {"evaluation_samples": 4})
    return folder


def manifest(folder, step):
    """Hashes of a checkpoint's files, but for the one that names the run's folders."""
    found = json.loads((folder / f"checkpoint-{step}" / "manifest.json").read_text())
    return {name: entry for name, entry in found.items() if name != "run.json"}


def drawn(model, steps, noise):
    return model.sample(lambda _: noise, model.conditioning.of([0, 1]), steps)


def test_a_run_ships_few_steps_one_step_and_many(finished):
    few, single, plain = (load_teacher(finished / part) for part in ("", "one-step", "plain"))
    assert isinstance(few, ParallelHeads) and few.intervals.steps == STEPS
    assert not isinstance(plain, ParallelHeads)
    assert single.num_parameters == plain.num_parameters < few.num_parameters
    noise = torch.randn(2, 1, 8, 8)
    once = drawn(few, 1, noise)
    torch.testing.assert_close(drawn(single, 1, noise), once, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn(few, 2, noise), once, atol=1e-3)
    assert drawn(plain, 25, noise).isfinite().all()
    card = (finished / "README.md").read_text()
    assert "`one-step/` holds the same model in one step" in card
    assert "`plain/` holds the student for many steps" in card


@pytest.mark.parametrize("process", ["flow", "edm"])
def test_a_student_of_another_process(tmp_path, process):
    more = {"student_process": process, "evaluation_samples": 2}
    folder, *_ = small_runs.run(tmp_path, denoiser(), "dit-tiny", **FEW | more)
    assert {row.model for row in read_steps_table(folder).rows} > {"student"}
    model = load_teacher(folder)
    tau = grid_for(denoiser()).tau
    torch.testing.assert_close(model.intervals.tau, tau, rtol=0, atol=0.02)
    assert_diffusers_draws_the_same(folder, STEPS)


def test_diffusers_draws_what_dkdm_draws(finished):
    assert_diffusers_draws_the_same(finished, STEPS)
    pipeline = assert_diffusers_draws_the_same(finished / "one-step", (1,))
    with pytest.raises(ValueError, match="use one of"):
        pipeline(class_labels=[0], num_inference_steps=2)
    with pytest.raises(ValueError, match="guidance_scale must be 1"):
        pipeline(class_labels=[0], guidance_scale=2.0)


def assert_diffusers_draws_the_same(folder, numbers):
    with warnings.catch_warnings(action="ignore"):
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    model = load_teacher(folder)
    for steps in numbers:
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(steps))
        images = pipeline(
            class_labels=[0, 1],
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(steps),
            output_type="latent",
        ).images
        torch.testing.assert_close(images, drawn(model, steps, noise), rtol=1e-4, atol=1e-4)
    return pipeline


def test_the_page_draws_as_it_says(finished):
    page = (Path(__file__).parents[1] / "docs/few-steps.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    names = {}
    with warnings.catch_warnings(action="ignore"):
        exec(code.replace("runs/few", str(finished)), names)
    assert len(names["images"]) == 3


def test_the_plain_part_is_a_plain_run(finished, tmp_path):
    plain, *_ = small_runs.run(tmp_path, max_train_steps=4, checkpointing_steps=2)
    assert manifest(plain, 4) == manifest(finished / "plain", 4)


def test_every_number_of_steps_is_measured_and_shown(finished):
    table = read_steps_table(finished)
    found = [(row.model, row.num_steps) for row in table.rows]
    many = [*STEPS, 25]
    assert found == [
        *(("teacher", steps) for steps in many),
        *(("plain student", steps) for steps in many),
        *(("student", steps) for steps in STEPS),
    ]
    card, page = ((finished / name).read_text() for name in ("README.md", "report.html"))
    assert "| plain student | 25 |" in card and "few-steps.png" in card and "one-step/" in card
    assert "In a few steps" in page and '<th scope="row">Plain student</th>' in page
    assert "went on from the plain student." in card and "above are of both parts" in page
    assert "its own sampler (student), 4 steps" in card and "the student by its own sampler" in page
    (finished / "few_steps.json").write_text("{}")
    with pytest.raises(dkdm.DkdmError, match="few_steps.json"):
        read_steps_table(finished)
    table.save(finished)


def test_the_teacher_beside_a_few_step_student_has_the_levels_of_the_table(finished):
    found, shown = read_evaluation(finished), read_samples(finished)["teacher"]
    how = Sampling(found.num_samples, found.num_steps, found.seed)
    teacher = denoiser()
    cond = teacher.conditioning.in_turns(how.num_samples)
    drawn_by = {each: draw(each(teacher), cond, how)[: len(shown)] for each in (trailing, replace)}
    torch.testing.assert_close(shown, drawn_by[trailing], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(shown, drawn_by[replace], atol=1e-2)
    said = "DDIM with trailing levels (teacher), its own sampler (student), 4 steps"
    assert said in (finished / "report.html").read_text()


def test_what_both_parts_took_is_added_up(finished, tmp_path):
    last, first = (
        read_metrics(finished / part / "metrics.jsonl")[-1]["teacher_evaluations"]
        for part in ("", "plain")
    )
    moved = shutil.copytree(finished, tmp_path / "moved")
    both = spent(read_run(moved))
    assert both.steps == 8 and both.evaluations == last + first > last > 0
    assert both.seconds > spent(read_run(moved / "plain")).seconds > 0
    trained = f"4 steps of 8, then 4 steps of 8, {both.evaluations} teacher evaluations, "
    assert f"| training | {trained}" in (finished / "README.md").read_text()
    shutil.rmtree(moved / "plain")
    assert spent(read_run(moved))[:2] == (4, last)


def test_page_card_and_comparison_say_what_was_asked_for(finished, tmp_path):
    asked, last = (read_config(finished / name) for name in ("whole.json", "config.json"))
    for name in ("max_train_steps", "student_init", "few_step_share", "student_steps"):
        expected = (small_runs.SMALL.flat() | FEW)[name]
        assert asked.flat()[name] == expected
        default = expected == dkdm.DistillConfig().flat()[name]
        said = f" `{name}` {expected}," if default else f"- `{name}`: {expected}"
        assert said in (finished / "README.md").read_text()
    assert asked.optimizing.learning_rate == last.optimizing.learning_rate  # decided
    command = command_line(read_run(finished).asked)
    assert "--max-train-steps 8" in command and "--student-init" not in command
    assert entry_of_run(finished).options["max_train_steps"] == 8
    damaged = shutil.copytree(finished, tmp_path / "damaged")
    (damaged / "whole.json").write_text("{}")
    run = read_run(damaged)
    assert run.asked == run.config and "whole.json" in run.missing[-1]


def test_a_teacher_of_few_levels_is_drawn_in_all_of_them(tmp_path):
    teacher = denoiser(scheduler={"num_train_timesteps": 12})
    folder, *_ = small_runs.run(tmp_path, teacher, **FEW | {"evaluation_samples": 2})
    rows = read_steps_table(folder).rows
    most = {row.model: row.num_steps for row in rows}  # the last of each
    assert most == {"teacher": 12, "plain student": 12, "student": 4}


def test_the_same_model_goes_on_as_a_graph(finished):
    model = load_teacher(finished)
    inputs = random_inputs(model, 2)
    assert set(inputs) == {"noise", "class_labels"}
    found = graph_network(model, inputs)(**inputs)
    cond = {"class_labels": inputs["class_labels"]}
    expected = model.sample(lambda _: inputs["noise"], cond, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


PIPELINES = {
    "stable_diffusion_v": {},
    "sdxl": {},
    "pixart": {},
    "sd3": {},
    "flux": {"teacher_size": (8, 8)},
    "sana": {},
    "wan": {"teacher_size": (2, 2, 2)},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PIPELINES)
def test_text_models_of_diffusers_in_few_steps(tmp_path, monkeypatch, name):
    """A student of the teacher's own architecture, as diffusers draws it and as dkdm does."""
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    getattr(pipelines, name)().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red house\na blue house\n")
    teacher, prompts = str(tmp_path / "teacher"), str(tmp_path / "prompts.txt")
    config = replace(small_runs.SMALL, **FEW, **PIPELINES[name], train_batch_size=4, check=False)
    config = replace(config, teacher=teacher, student=teacher, prompts=prompts)
    folder = dkdm.distill(config=replace(config, output_dir=tmp_path / "run", max_train_steps=4))
    assert (folder / "one-step").is_dir()
    model = with_texts(load_teacher(folder), "a red house")
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for steps in STEPS:
        noise = torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(0))
        expected = model.sample(lambda _, z=noise: z, model.conditioning.in_turns(1), steps)
        images = pipeline(
            "a red house",
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


class KilledError(Exception):
    """In place of a kill."""


@pytest.mark.parametrize(("part", "step"), [("plain", 3), ("run", 3)])
def test_a_run_killed_in_either_part_resumes_bit_by_bit(
    finished, tmp_path, monkeypatch, part, step
):
    write = MetricsFile.write

    def write_and_die(self, entry):
        write(self, entry)
        if self.path.parent.name == part and entry["step"] == step:
            raise KilledError

    monkeypatch.setattr(MetricsFile, "write", write_and_die)
    with pytest.raises(KilledError):
        small_runs.run(tmp_path, **FEW)
    monkeypatch.undo()
    if part == "plain":
        (run,) = tmp_path.rglob("plain")
        write_report(run)  # a user looks; the part is not finished by that
    if part == "run":
        with pytest.raises(UsageError, match="already holds a run"):
            small_runs.run(tmp_path, **FEW)
    folder, metrics, _ = small_runs.run(tmp_path, **FEW, resume_from_checkpoint="latest")
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4]
    assert manifest(folder / "plain", 4) == manifest(finished / "plain", 4)
    resumed = manifest(folder, 4)
    assert {"source/rolled.safetensors", "optimizer.safetensors", "state.json"} <= resumed.keys()
    assert resumed == manifest(finished, 4)


def test_what_both_parts_were_asked_for_may_not_change_in_the_last(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("README.md", "report.html"):
        (run / name).unlink()
    going_on = FEW | {"evaluation_samples": 4, "resume_from_checkpoint": "latest"}
    with pytest.raises(UsageError, match="--few-step-share was 0.5 and is 0.25"):
        small_runs.run(tmp_path, **going_on | {"few_step_share": 0.25})
    assert small_runs.run(tmp_path, **going_on)[0] == run  # which has moved


def test_few_steps_are_learnt_from_a_run_that_exists(finished, tmp_path):
    start = str(finished / "plain")
    more = {"few_step_share": None, "student_init": start, "max_train_steps": 4}
    folder, _, evaluations = small_runs.run(tmp_path, **FEW | more)
    assert evaluations == 4 * 8 and not (folder / "plain").exists()
    assert (
        manifest(folder, 4)["source/rolled.safetensors"]
        == (manifest(finished, 4)["source/rolled.safetensors"])
    )


@pytest.mark.parametrize("place", ["", "one-step"])
def test_a_few_step_model_is_no_start(finished, tmp_path, place):
    with pytest.raises(UsageError, match="is a few-step model.* give the run's folder plain/"):
        small_runs.run(tmp_path, **FEW | {"student_init": str(finished / place)})
    assert not list(tmp_path.iterdir())


def test_several_teachers_teach_few_steps(tmp_path):
    teachers = [denoiser(), denoiser(seed=1)]
    folder, _, evaluations = small_runs.run(tmp_path, teachers, "dit-tiny", **FEW)
    assert evaluations == 4 * 8
    assert load_teacher(folder).conditioning.num_classes == 6


def test_the_last_part_takes_smaller_batches_for_as_many_states():
    program, whole = OBJECTIVES["few-step"], dkdm.DistillConfig(objective="few-step")
    whole = replace(whole, max_train_steps=100, train_batch_size=64, few_step_share=0.3)
    last = program.last(whole)
    assert (last.training.max_train_steps, last.training.train_batch_size) == (60, 32)
    assert program.last(last) == last  # as its config.json says it
    asked = program.last(replace(whole, few_step_batch_size=16))
    assert (asked.training.max_train_steps, asked.training.train_batch_size) == (120, 16)
    jumps = OBJECTIVES["consistency"].last(replace(whole, eta=0.0))
    assert (jumps.training.max_train_steps, jumps.training.train_batch_size) == (30, 64)


def test_the_last_part_learns_as_the_plain_part_does():
    def last(**changes):
        config = replace(dkdm.DistillConfig(objective="few-step"), **changes)
        how = OBJECTIVES["few-step"].last(config).optimizing
        return how.optimizer, how.learning_rate

    assert last() == ("muon", 0.02)
    assert last(learning_rate=2e-3) == ("adamw", 2e-3)
    assert last(student_init="teacher") == ("adamw", 1e-4)
    assert last(few_step_learning_rate=3e-3) == ("adamw", 3e-3)
    assert last(few_step_learning_rate=0.01, optimizer="muon") == ("muon", 0.01)


def test_commands_take_a_few_step_model(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    model, output = str(finished), str(tmp_path / "x.png")
    assert main(["sample", model, "--num-samples", "2", "--output", output]) == 0
    assert main(["inspect", model, "--num-samples", "2"]) == 0
    assert "denoises no levels" in " ".join(capsys.readouterr().out.split())
    measured = ["evaluate", model, "--num-samples", "4", "--teacher", "factories:teacher"]
    assert main([*measured, "--steps", "2", "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["num_steps"] == 2 and found["teacher_distance"] and found["gap"] is None
    assert main([*measured, "--steps", "3"]) == 2
    assert main([*measured, "--guidance-scale", "2"]) == 2
    assert main(["distill", "--teacher", model, "--output-dir", str(tmp_path / "no")]) == 2
    said = capsys.readouterr().err
    assert "draws in 1, 2 or 4" in said and "takes no guidance scale" in said
    assert "knows no levels between" in said and not (tmp_path / "no").exists()


def test_the_heads_of_a_few_step_model_are_no_students_architecture(finished):
    for part in ("plain", "one-step"):
        assert student_of(str(finished / part), denoiser()).out_channels == 1
    with pytest.raises(UsageError, match="has 4 outputs: give the folder plain/"):
        student_of(str(finished), denoiser())


def test_a_page_draws_in_the_steps_that_the_model_has(finished):
    model = replace(load_teacher(finished))
    model.grid = replace(model.intervals, steps=(2, 4))
    pair = pair_of(denoiser(), model, None)
    wish = Wish(num_samples=2, num_steps=4)
    _, student = draw_both(pair, wish)
    assert student.samples.shape == (2, 1, 8, 8)
    for wrong, said in (
        ({"guidance_scale": 2.0}, "guidance was mixed"),
        ({"num_steps": 3}, "2 or"),
    ):
        with pytest.raises(UsageError, match=said):
            draw_both(pair, replace(wish, **wrong))


def test_an_edited_grid_is_refused_before_the_network_is_asked(finished, tmp_path):
    folder = tmp_path / "edited"
    shutil.copytree(finished / "one-step", folder)
    index = json.loads((finished / "model_index.json").read_text())
    kept = {"_few_steps": index["_few_steps"]}
    single = json.loads((folder / "model_index.json").read_text())
    wrong = [
        (kept, "needs a network that gives 4 channels, and this one gives 1"),
        ({"_few_steps": {**single["_few_steps"], "renoises": "no"}}, "renoises"),
        ({"_few_steps": {**single["_few_steps"], "steps": [math.nan]}}, "steps"),
        ({"_few_steps": None}, "is no grid"),
    ]
    for changes, message in wrong:
        (folder / "model_index.json").write_text(json.dumps({**single, **changes}))
        with pytest.raises(UsageError, match=message):
            load_teacher(folder)


def test_one_step_ships_from_a_run_in_mixed_precision_too(tmp_path):
    more = {"mixed_precision": "bf16", "few_step_share": 1.0, "max_train_steps": 2}
    folder, *_ = small_runs.run(tmp_path, **FEW | more)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    few, single = load_teacher(folder), load_teacher(folder / "one-step")
    torch.testing.assert_close(drawn(single, 1, noise), drawn(few, 1, noise))


def test_features_are_matched_in_the_plain_part_alone(tmp_path):
    folder, *_ = small_runs.run(tmp_path, **FEW | {"feature_weight": 0.1})
    assert read_config(folder / "plain" / "config.json").loss.feature_weight == 0.1
    assert read_config(folder / "config.json").loss.feature_weight == 0


def test_guidance_is_mixed_into_the_target_once(tmp_path):
    more = {"max_train_steps": 4, "guidance_scale": "3", "few_step_targets": 2}
    folder, _, evaluations = small_runs.run(tmp_path, **FEW | more)
    assert evaluations == 2 * 8 * 2 * 2  # steps, batch, targets, guided
    model = load_teacher(folder)
    with pytest.raises(UsageError, match="takes no guidance scale"):
        model.sample(lambda _: torch.randn(1, 1, 8, 8), model.conditioning.of([0]), 1, 0.0, 3.0)


def test_a_learned_variance_is_dropped_and_said(tmp_path, capsys):
    teacher = denoiser(scheduler={"variance_type": "learned_range"}, out_channels=2)
    folder, *_ = small_runs.run(tmp_path, teacher, **FEW)
    assert "the student's is dropped" in capsys.readouterr().err
    few, plain = load_teacher(folder), load_teacher(folder / "plain")
    assert plain.parameterization.learns_variance and not few.parameterization.learns_variance
    assert few.out_channels == 4


REFUSED = [
    ({"source": "synthetic"}, "--source synthetic has no states of the teacher"),
    ({"source": "images", "images": "fashion-mnist"}, "--source images has no states"),
    ({"guidance_on": "chain", "guidance_scale": "2"}, "--guidance-on chain"),
    ({"lora_rank": 2, "student_init": "teacher"}, "--lora-rank"),
    ({"few_step_pool": 7}, "--few-step-pool 7 is smaller than a batch of 8"),
    ({"few_step_heads": 50, "student_steps": "1"}, "--few-step-heads 50: the teacher's 50 levels"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_few_steps_cannot_be_learnt_with_is_refused_before_work(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        small_runs.run(tmp_path, **FEW | changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("1:32", "32 steps need as many heads .* give --few-step-heads 64"),
        ("3", "3 does not divide the 16 .* give --few-step-heads 18"),
        ("9999", "9999 steps need .* give fewer or other steps"),
        ("3,5,7,11,13", "3 does not divide the 16 .* give fewer or other steps"),
    ],
)
def test_steps_that_the_heads_do_not_allow_are_refused(steps, message):
    config = dkdm.DistillConfig(student_steps=steps, objective="few-step")
    with pytest.raises(UsageError, match=message):
        OBJECTIVES["few-step"].check(config)
    OBJECTIVES["consistency"].check(replace(config, eta=0.0))  # jumps have no heads


def test_a_dry_run_describes_both_parts():
    config = replace(small_runs.SMALL, **FEW, teacher="factories:teacher", student="dit-tiny")
    said = describe(config)
    assert said.count("student   dit-tiny") == 2 and "the student's own rolls: 16 states" in said
    assert f"the weights of {config.run.output_dir / 'plain'}" in said
    asked = [int(n) for n in re.findall(r"(\d+) teacher evaluations to prepare, (\d+)", said)[0]]
    assert f"in all    {sum(asked) + 4 * 8} teacher evaluations" in said


def grid_for(teacher, heads=4):
    levels = grid_levels(teacher.process, heads)
    return grid_of(teacher, teacher.process, levels, (1, heads))


def outputs(model, level):
    random = torch.Generator().manual_seed(level)
    x = torch.randn(3, *model.sample_shape, generator=random)
    cond = model.conditioning.draw(3, random)
    with torch.no_grad():
        model.network.eval()
        return model.predict(dkdm.Batch(x, torch.full((3,), level), cond)).output


WIDENED = ["unet-mini", "dit-tiny", "uvit-tiny", "linear-tiny", "mobile-tiny", "own_networks:make"]


@pytest.mark.parametrize("spec", WIDENED)
def test_a_widened_student_begins_with_equal_heads_and_folds_again(spec):
    teacher = denoiser()
    student = student_of(spec, teacher)
    with torch.no_grad():  # last layers that begin at zero would show nothing
        for weight in student.network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    wide = with_heads(student, grid_for(teacher))
    for level in (49, 30, 0):
        torch.testing.assert_close(outputs(wide, level), outputs(student, level))
    with torch.no_grad():
        for weight in wide.network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    single = one_step(wide)
    assert single.num_parameters == student.num_parameters
    noise = torch.randn(2, 1, 8, 8)
    found, expected = drawn(single, 1, noise), drawn(wide, 1, noise)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_network_given_as_an_object_is_widened_in_its_last_layer():
    teacher = denoiser()
    student = given_student(own_networks.Small(1, 1, num_labels=4), teacher)
    wide = with_heads(student, grid_for(teacher))
    assert wide.num_parameters - student.num_parameters == 3 * (8 * 9 + 1)
    torch.testing.assert_close(outputs(wide, 7), outputs(student, 7))
    assert student.network.last.out_channels == 1


def test_a_run_of_an_object_is_measured_beside_its_plain_part(tmp_path):
    network = own_networks.Small(1, 1, num_labels=4)
    folder, *_ = small_runs.run(tmp_path, None, network, **FEW | {"evaluation_samples": 1})
    assert "plain student" in {row.model for row in read_steps_table(folder).rows}
    assert "yourself (output channels: 4)" in (folder / "README.md").read_text()
    for part, channels in (("", 4), ("one-step", 1), ("plain", 1)):
        made = own_networks.Small(1, channels, num_labels=4)
        assert dkdm.load_student(folder / part, network=made) is made


def test_a_network_of_default_channels_is_widened():
    """diffusers puts options that were left open back to their defaults."""
    teacher = replace(denoiser(None), sample_shape=(3, 8, 8))
    config = {**tiny_unet().config, "in_channels": 3}
    network = UNet2DModel(**{name: config[name] for name in config if name[:4] != "out_"})
    wide = with_heads(replace(teacher, network=network), grid_for(teacher))
    assert wide.network.config["out_channels"] == 3 * 4


class Ends(nn.Module):
    """A network that fixes the shape of its output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, class_labels=None):
        shift = t[:, None, None, None] / 100 + class_labels[:, None, None, None]
        return self.layer(x + shift).view(x.shape)


class Beside(own_networks.Small):
    """A network whose last layer, by time, is not that of its output."""

    def forward(self, x, t, class_labels=None):
        output = super().forward(x, t, class_labels)
        self.time(torch.ones(8))
        return output


def test_a_network_whose_output_cannot_be_widened_is_refused(tmp_path):
    teacher, normed, beside = denoiser(), own_networks.Small(1, 1, 4), Beside(1, 1, 4)
    normed.last = nn.utils.parametrizations.weight_norm(normed.last)
    for network in (Ends(), normed, beside):
        with pytest.raises(UsageError, match=r"\w+: its output cannot be widened to 4 heads"):
            small_runs.run(tmp_path, teacher, network, **FEW)
    assert not list(tmp_path.iterdir())


def test_what_holds_for_both_parts_is_said_once(tmp_path, capsys):
    """The last part is prepared three times: to be refused early, and when its turn comes."""
    small_runs.run(tmp_path, **FEW | {"max_train_steps": 2, "accelerate": "graph"})
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert any("not captured as one CUDA graph" in line for line in lines)
    assert len(lines) == len(set(lines))
