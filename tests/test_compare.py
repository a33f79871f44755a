"""dkdm compare: no row mixes what was measured differently; what cannot be compared is refused."""

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from browser import CHROMIUM, browser
from dkdm.cli import main
from dkdm.config import CompareCommand, ComparedOptions, TrainConfig, to_json
from dkdm.core.saving.checkpoint import write_tensors
from dkdm.errors import UsageError
from dkdm.evaluation.energy import TeacherDistance
from dkdm.evaluation.evaluated import Against, Evaluation, Measured, SampledModel
from dkdm.evaluation.figures import Figure
from dkdm.evaluation.results import SAMPLES, read_samples
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.models import load_teacher
from dkdm.report import write_report
from dkdm.report.entries import Entry, entry_of_evaluation, entry_of_run, named_shortly
from dkdm.report.overlaid import overlaid
from dkdm.report.rows_of_samples import rows_of_samples
from dkdm.report.side_by_side import ABSENT, side_by_side
from dkdm.report.tables import markdown, print_comparison
from dkdm.runs.compare import compare_runs, conditions, entry_of_model, opened
from finished_run import CONFIG, alone, comparison, write_metrics, write_validation

FRECHET = "Frechet distance"
EVALUATED = Evaluation(
    model=SampledModel("mine", "as they are given", 1.0),
    num_samples=1000,
    sampler="ddim",
    num_steps=25,
    seed=7,
    batch_size=256,
    guidance_interval=None,
    sample_shape=(1, 16, 16),
    reference=Against("fashion-test", 10_000, "", "64 features", None),
    metrics={"fd": Measured(2.5, 0.0123, 60_000)},
    teacher=None,
    teacher_distance=None,
    gap=None,
    warnings=(),
    device="CPU, 1 thread",
    versions={},
)


def run_in(folder, config=CONFIG, **changes):
    """A finished run whose comparison has these changes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    write_metrics(folder, last=200)
    replace(comparison(), **changes).save(folder)
    return str(folder)


def evaluated(path, **changes):
    replace(EVALUATED, **changes).write(path)
    return str(path)


def table_of(*specs, **options):
    return compare_runs(CompareCommand(runs=specs, **options))


def rows(table, label):
    return [line for line in table.lines if line.label == label]


def test_numbers_measured_alike_stand_in_one_row(tmp_path):
    other = replace(comparison().student, parameters=500_000)
    table = table_of(run_in(tmp_path / "a"), run_in(tmp_path / "b", student=other))
    (line,) = rows(table, FRECHET)
    assert line.texts == ["3.00", "3.00"] and line.floor == "0.0123" and not line.best
    assert not line.notes and not table.remarks
    (size,) = rows(table, "parameters")
    assert size.texts == ["400 k", "500 k"] and size.best == [0] and not size.letter
    under = table.circumstances[line.letter]
    assert list(under.values()) == [
        *("1,000", "DDIM", "25", "none", "fashion-test, 10,000 images", "64 features")
    ]
    assert table.facts["teacher evaluations"] == ("12.8 k", "12.8 k")


STUDENT = comparison().student
HOW = comparison().measurement


@pytest.mark.parametrize(
    ("differs", "changes"),
    [
        ("samples", {"num_samples": 500}),
        ("sampler", {"eta": 1.0}),
        ("steps", {"num_steps": 20}),
        ("guidance", {"student": replace(STUDENT, guidance_scale=1.5)}),
        ("reference", {"measurement": replace(HOW, reference="fashion-train")}),
        ("reference", {"measurement": replace(HOW, reference_images=9_999)}),
        ("features", {"measurement": replace(HOW, features="2,048 features")}),
        ("network", {"measurement": replace(HOW, network="other")}),
        ("floor", {"measurement": replace(HOW, real_distance=0.5)}),
    ],
)
def test_what_changes_a_numbers_meaning_puts_it_into_another_row(tmp_path, differs, changes):
    table = table_of(run_in(tmp_path / "a"), run_in(tmp_path / "b", **changes))
    first, second = rows(table, FRECHET)
    assert first.texts == ["3.00", ABSENT] and second.texts == [ABSENT, "3.00"]
    assert not first.best and not second.best
    said = [text for text in table.remarks if "Frechet distance;" in text.replace(")", ";")]
    assert len(said) == 1 and said[0].startswith(f"Different {differs}: values in different rows")


def test_other_seeds_and_weights_share_a_row_that_says_so(tmp_path):
    table = table_of(run_in(tmp_path / "a"), run_in(tmp_path / "b", seed=1, weights="EMA"))
    (line,) = rows(table, FRECHET)
    assert line.notes == ("seed: 0 (a), 1 (b)", "weights: not said (a), EMA (b)")
    assert "Frechet distance [1] [2]" in markdown(table).replace("\\", "")


def test_an_evaluation_stands_beside_a_run(tmp_path):
    table = table_of(run_in(tmp_path / "a"), evaluated(tmp_path / "mine.json"))
    (line,) = rows(table, FRECHET)
    assert line.texts == ["3.00", "2.50"] and line.best == [1]
    assert line.notes[0] == "seed: 0 (a), 7 (mine)"
    assert table.facts["model"] == (ABSENT, "mine")


def test_metrics_with_a_network_of_their_own_are_apart_by_it(tmp_path):
    files = [
        evaluated(
            tmp_path / f"{name}.json", metrics={"clip": Measured(30.0)}, judges={"clip": name}
        )
        for name in ("large", "small")
    ]
    table = table_of(*files)
    assert [line.under["network"] for line in rows(table, "CLIP score")] == ["large", "small"]


def test_distances_to_different_teachers_are_apart(tmp_path):
    near = TeacherDistance(0.1, 0.02, 0.01, 0.002, 500)
    files = [
        evaluated(
            tmp_path / f"{name}.json",
            teacher=SampledModel(name, "", 1.0),
            teacher_distance=near,
            reference=None,
            metrics={},
        )
        for name in ("one", "two")
    ]
    table = table_of(*files)
    assert [line.texts for line in rows(table, "distance to the teacher's samples")] == [
        ["0.100", ABSENT],
        [ABSENT, "0.100"],
    ]


def test_only_options_that_differ_are_shown(tmp_path):
    config = replace(CONFIG, learning_rate=2e-3, use_ema=True, output_dir=tmp_path / "elsewhere")
    table = table_of(run_in(tmp_path / "a"), run_in(tmp_path / "b", config))
    assert table.options == {"learning_rate": ("0.001", "0.002"), "use_ema": ("no", "yes")}


def test_an_unfinished_run_is_compared_as_far_as_it_came(tmp_path):
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.json").write_text(to_json(CONFIG))
    table = table_of(run_in(tmp_path / "a"), str(young))
    assert rows(table, FRECHET)[0].texts == ["3.00", ABSENT]
    assert any(text.startswith("young: evaluation.json is missing") for text in table.remarks)


def test_the_json_holds_numbers_with_their_circumstances(tmp_path, capsys):
    specs = [run_in(tmp_path / name) for name in "ab"]
    assert main(["compare", *specs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = next(row for row in found["rows"] if row["metric"] == FRECHET)
    assert row["values"] == [3.0, 3.0] and row["floor"] == 0.0123 and row["better"] == "lower"
    assert row["under"]["steps"] == "25" and row["beside"][0]["seed"] == "0"
    assert found["columns"] == ["a", "b"]


def test_the_terminal_and_the_markdown_show_the_same_table(tmp_path, capsys):
    specs, output = [run_in(tmp_path / name) for name in "ab"], tmp_path / "new" / "table.md"
    assert main(["compare", *specs, "--output", str(output)]) == 0
    printed, written = capsys.readouterr().out, output.read_text()
    assert printed.splitlines()[-1] == str(output)
    for line in table_of(*specs).lines:
        assert all(text in printed for text in line.texts)
    columns = {row.count("|") for row in written.splitlines() if row.startswith("|")}
    assert columns == {6, 4} and "| Frechet distance | A | 3.00 | 3.00 | 0.0123 |" in written
    assert main(["compare", *specs, "--output", str(output)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_names_of_others_are_text(tmp_path, capsys):
    hostile = "[bold]x|y\x1b[2J`<img src=x>"
    model = replace(EVALUATED.model, weights=hostile)
    files = [evaluated(tmp_path / f"{i}.json", model=model) for i in "ab"]
    assert main(["compare", *files, "--output", str(tmp_path / "t.md")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    written = (tmp_path / "t.md").read_text()
    assert "<img" not in re.sub(r"\\.", "", written) and "\x1b" not in written
    assert len({row.count("|") - row.count("\\|") for row in written.splitlines() if row}) <= 4


def test_runs_that_do_not_fit_beside_each_other_come_in_blocks(tmp_path):
    table, out = table_of(*(run_in(tmp_path / f"run-{i}") for i in range(7))), io.StringIO()
    print_comparison(table, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    named = [re.findall(r"run-\d", line) for line in lines if "floor" in line]
    assert named == [[f"run-{i}" for i in block] for block in ((0, 1, 2, 3), (4, 5, 6))]
    counts = [line.split().count("3.00") for line in lines if line.startswith(FRECHET)]
    assert list(filter(None, counts)) == [4, 3]  # no number is cut in two


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["runs/a", "runs/b/"], ["a", "b"]),
        (["x/run", "y/run"], ["x/run", "y/run"]),
        (["a/best", "builtin:fashion", "b/m.json"], ["best", "builtin:fashion", "m"]),
        (["same", "same"], ["same (1)", "same (2)"]),
    ],
)
def test_columns_are_named_as_shortly_as_they_can_be_told_apart(names, shown):
    assert named_shortly([Entry(name, "run", {}, []) for name in names]) == shown


def test_the_best_value_is_the_one_that_reads_better():
    def best(better, *values):
        entries = [Entry(str(i), "run", {}, [Figure("x", v, better=better)]) for i, v in values]
        return side_by_side(entries).lines[0].best

    assert best("lower", (0, 2.0), (1, 1.0)) == [1] and best("higher", (0, 2.0), (1, 1.0)) == [0]
    assert best(None, (0, 2.0), (1, 1.0)) == []
    assert best("lower", (0, 1.0001), (1, 1.0)) == []  # both read 1.00
    assert best("lower", (0, 1.0001), (1, 1.0), (2, 3.0)) == [0, 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give two or more"),
        (["builtin:fashion"], "give two or more"),
        (["empty", "empty"], "neither a run nor a model"),
        (["nowhere", "nowhere"], "does not exist"),
        (["missing.json", "missing.json"], "is missing"),
        (["list.json", "list.json"], "give a JSON object"),
        (["nothing.json", "nothing.json"], "holds no metric: give dkdm evaluate a --reference"),
        (["run/evaluation.json", "run"], "the run's folder"),
        (["broken", "broken"], "cannot be read as JSON"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(given, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"kind": ')
    (tmp_path / "list.json").write_text("[]")
    evaluated(tmp_path / "nothing.json", metrics={}, reference=None)
    run_in(tmp_path / "run")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(["compare", *given, "--output", "out.md"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.splitlines()) == 1 and not printed.out
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_unfitting_output_is_refused_before_a_model_is_opened(tmp_path):
    with pytest.raises(UsageError, match="--output x.png"):
        table_of("no/such", "other", output=tmp_path.joinpath("x.png").relative_to(tmp_path))


def test_an_evaluation_is_not_taken_for_another_file(tmp_path):
    (tmp_path / "x.json").write_text('{"model": 1}')
    with pytest.raises(UsageError, match=r"x\.json"):
        entry_of_evaluation(tmp_path / "x.json")


def test_a_model_is_measured_and_draws_from_the_noise_of_the_run(tmp_path):
    names = ("Trouser", "Bag")
    run_in(tmp_path / "a", num_steps=2)
    beside = entry_of_run(tmp_path / "a")
    beside = replace(beside, samples=replace(beside.samples, names=names))
    found = entry_of_model("builtin:fashion", True, beside)
    assert found.figures[0].value == 1_806_529 and found.samples.names == names
    assert found.samples.noise == beside.samples.noise
    teacher = load_teacher("builtin:fashion")
    cond = conditions(teacher, names)
    assert cond["class_labels"].tolist() == [1, 8]
    assert torch.equal(found.samples.own, draw(teacher, cond, Sampling(2, 2, seed=0)))
    assert entry_of_model("builtin:fashion", draws=False).samples is None


def page_of(tmp_path, *specs, **options):
    output = tmp_path / "compare.html"
    table_of(*specs, output=output, overwrite=True, **options)
    return output.read_text()


def test_the_page_holds_numbers_samples_curves_and_options_in_one_file(tmp_path):
    config = replace(CONFIG, learning_rate=2e-3)
    specs = run_in(tmp_path / "a"), run_in(tmp_path / "b", config, num_steps=20)
    page = page_of(tmp_path, *specs, evaluated(tmp_path / "mine.json"))
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    for part in ("Frechet distance", "Options that differ", "learning_rate", "Loss over the"):
        assert part in page
    assert (
        "Different steps: values in different rows cannot be compared (Frechet distance; " in page
    )
    assert page.count('<figure class="strip">') == 2  # ten columns, five in each
    assert page.count('class="line c0"') == page.count('class="line c1"') == 2
    assert page.count("<table") == page.count("</table>") and 'class="line c2"' not in page


def test_only_samples_from_the_same_noise_share_columns(tmp_path):
    changed = comparison()
    teacher = {**changed.samples, "teacher": changed.samples["teacher"] / 2}
    same = [run_in(tmp_path / "a"), run_in(tmp_path / "b"), run_in(tmp_path / "c", samples=teacher)]
    blocks = rows_of_samples(opened(ComparedOptions(tuple(same))), ["a", "b", "c"])
    assert [[name for name, _ in block.rows] for block in blocks] == [
        ["teacher of a", "teacher of c", "a", "b", "c"]
    ]
    others = [*same[:2], run_in(tmp_path / "d", seed=1)]
    blocks = rows_of_samples(opened(ComparedOptions(tuple(others))), ["a", "b", "d"])
    assert [[name for name, _ in block.rows] for block in blocks] == [
        ["teacher", "a", "b"],
        ["teacher", "d"],
    ]
    assert "only columns of one box can be compared" in page_of(tmp_path, *others)


def test_models_trained_on_images_stand_beside_distilled_ones(tmp_path):
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(TrainConfig(max_train_steps=200)))
    write_metrics(folder, last=200)
    alone().save(folder)
    both = run_in(tmp_path / "distilled"), str(folder)
    table = table_of(*both)
    (line,) = rows(table, FRECHET)
    assert line.texts == ["3.00", "3.00"]
    (line,) = rows(table, FRECHET + ", its teacher")
    assert line.texts == ["2.00", ABSENT]
    assert not any("trained:" in remark for remark in table.remarks)
    assert table.options["classes"] == ("1 2", "none")
    assert "network" not in table.options and "replay" not in table.options  # at their defaults
    replayed = run_in(tmp_path / "replayed", replace(CONFIG, replay=2))
    assert table_of(replayed, str(folder)).options["replay"] == ("2", ABSENT)
    (block,) = rows_of_samples(opened(ComparedOptions(both)), ["a", "b"])
    assert [name for name, _ in block.rows] == ["teacher", "a", "b"]


@pytest.mark.parametrize(("shape", "dark"), [((8,), True), ((2, 32), True), ((1, 16, 16), False)])
def test_plots_of_vectors_and_signals_are_dark_on_a_dark_page(tmp_path, shape, dark):
    specs = []
    for name in ("a", "b"):
        specs.append(run_in(tmp_path / name))
        comparison(shape=shape).save(tmp_path / name)
    assert ('class="card strips compared plots"' in page_of(tmp_path, *specs)) == dark


def test_validation_curves_measured_differently_have_their_own_charts(tmp_path):
    def validated(name, **options):
        config = replace(CONFIG, validation_metric="gap", **options)
        folder = run_in(tmp_path / name, config)
        write_validation(tmp_path / name, "gap", {100: 0.5, 200: 0.2})
        return folder

    def charts(*names):
        entries = opened(ComparedOptions(tuple(str(tmp_path / name) for name in names)))
        found = overlaid(entries, names)
        return [chart for chart in found if chart.title == "Validation: gap"]

    validated("a"), validated("b", seed=1), validated("c", validation_samples=99)
    (together,) = charts("a", "b")
    assert [name for _, name in together.keys] == ["a", "b"]
    assert "other noise, seeds 0, 1" in together.note
    assert [[name for _, name in chart.keys] for chart in charts("a", "c")] == [["a"], ["c"]]


def test_losses_of_different_objectives_are_called_so(tmp_path):
    config = replace(CONFIG, loss_weighting="capped")
    specs = run_in(tmp_path / "a"), run_in(tmp_path / "b", config)
    assert "different losses, by loss_weighting" in page_of(tmp_path, *specs)


def test_names_in_the_page_are_escaped(tmp_path):
    weights = "<script>alert(1)</script>"
    page = page_of(tmp_path, run_in(tmp_path / "a", weights=weights), run_in(tmp_path / "b"))
    assert weights not in page and "&lt;script&gt;" in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_the_page_within_its_width(tmp_path, width):
    page_of(tmp_path, *[run_in(tmp_path / name) for name in ("a", "b")])
    with browser(tmp_path / "profile", width) as seen:
        seen.open((tmp_path / "compare.html").as_uri())
        seen.wait("document.readyState == 'complete' && document.images.length == 2")
        assert seen.run("document.documentElement.scrollWidth <= window.innerWidth")
        assert seen.run("[...document.images].every(each => each.naturalWidth > 0)")
        assert "Frechet distance" in seen.run("document.body.innerText")
        colour = "getComputedStyle(document.querySelector('.chart path.c{}')).stroke"
        assert seen.run(colour.format(0)) != seen.run(colour.format(1)) != "none"


@pytest.mark.parametrize("labels", [torch.tensor(3), torch.zeros(3, 2).long(), torch.zeros(2)])
def test_samples_whose_labels_do_not_fit_are_not_shown(tmp_path, labels):
    run = run_in(tmp_path / "a")
    samples = read_samples(tmp_path / "a")
    write_tensors(tmp_path / "a" / SAMPLES, {**samples, "labels": labels})
    entry = entry_of_run(tmp_path / "a")
    assert entry.samples is None and any("do not fit together" in text for text in entry.missing)
    page = tmp_path / "both.html"
    table_of(run, run_in(tmp_path / "b"), output=page)
    assert page.exists() and write_report(tmp_path / "a").exists()
