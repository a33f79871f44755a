"""What the page shows beyond numbers: ways from noise, the pool, maps and bars, wiped pairs."""

import base64
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image

from browser import browser
from dkdm.config import to_json
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.core.sources.chains import Stride
from dkdm.core.sources.fill import empty_pool
from dkdm.core.sources.mixed import Mixed
from dkdm.errors import DkdmError
from dkdm.evaluation.pool_state import POOL, histogram, read_pool_state, state_of
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.evaluation.trajectories import (
    TRAJECTORIES,
    Trajectories,
    read_trajectories,
    trajectories,
    trajectory,
)
from dkdm.report import write_report
from dkdm.report.images import pairs, reduced
from dkdm.report.maps import FAINTEST, FLOOR, bar_chart, heat_map
from dkdm.runs.outputs import save_pool
from finished_run import CONFIG, comparison, write_metrics, write_stages
from page_reader import Page

HOSTILE = "\"><script>alert('x')</script>"
PROCESS = from_betas(beta_schedule("squaredcos_cap_v2", 50))
SHAPE = (1, 4, 4)
CLASSES = ClassLabels(3, null_class=3)


def model(slope: float) -> Denoiser:
    """Expects a squashed state, plus a share of its class."""

    def network(x, time, class_labels):
        del time
        return slope * torch.tanh(x) + per_sample(class_labels / 10, x)

    return Denoiser(network, PROCESS, Parameterization("sample"), SHAPE, CLASSES)


def ways_of(shape=SHAPE, samples=2, moments=4) -> Trajectories:
    values = torch.linspace(-1, 1, samples * moments).reshape(samples, moments, *[1] * len(shape))
    shown = values.expand(-1, -1, *shape).clone()
    levels = torch.tensor([49, 30, 10][: moments - 1])
    return Trajectories(shown, -shown, levels, levels.clone(), torch.arange(samples) + 1)


@pytest.fixture
def run(tmp_path):
    """A finished run with all parts."""
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    write_metrics(tmp_path, last=200)
    write_stages(tmp_path, 200)
    comparison().save(tmp_path)
    ways_of().save(tmp_path)
    pool = pool_of()
    for _ in range(12):
        batch = pool.draw(8)
        pool.advance(batch, pool.target(batch))
    save_pool(pool, tmp_path)
    return tmp_path


# --- ways from noise -----------------------------------------------------------------------------


def test_a_way_ends_in_the_sample_that_is_compared():
    sampling, cond = Sampling(3, 20, seed=5), CLASSES.in_turns(3)
    levels, states = trajectory(model(0.5), cond, sampling)
    assert states.shape == (3, 8, *SHAPE)
    assert torch.equal(states[:, -1], draw(model(0.5), cond, sampling))
    steps = PROCESS.timesteps(20)
    assert levels[0] == steps[0] and levels[-1] == steps[-1]
    assert levels.tolist() == sorted(set(levels.tolist()), reverse=True)
    assert set(levels.tolist()) <= set(steps)


def test_a_way_shows_what_the_network_expected():
    sampling, cond = Sampling(2, 1, seed=0), CLASSES.in_turns(2)
    levels, states = trajectory(model(0.5), cond, sampling)
    assert (len(levels), states.shape[1]) == (1, 2)
    # one step from pure noise: the result is the expectation itself
    assert torch.allclose(states[:, 0], states[:, 1], atol=1e-6)
    constant = replace(model(0.0), conditioning=CLASSES)
    _, states = trajectory(constant, cond, Sampling(2, 20, seed=0))
    assert torch.allclose(states[1], torch.full_like(states[1], 0.1))


def test_ways_read_back(tmp_path):
    assert read_trajectories(tmp_path) is None
    found = trajectories(model(0.5), model(0.4), Sampling(3, 9, seed=1), (1.0, 1.0))
    found.save(tmp_path)
    again = read_trajectories(tmp_path)
    for name in ("teacher", "student", "teacher_t", "student_t", "labels"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert again.labels.tolist() == [0, 1, 2]
    assert not torch.equal(found.teacher, found.student)


@pytest.mark.parametrize(
    "damage",
    [
        {"student": torch.zeros(2, 4, 1, 4, 5)},
        {"teacher_t": torch.zeros(3)},
        {"teacher_t": torch.zeros(4, dtype=torch.int64)},
        {"labels": torch.zeros(3, dtype=torch.int64)},
        {"teacher": torch.zeros(2, 0, 4), "student": torch.zeros(2, 0, 4)},
    ],
)
def test_ways_that_do_not_fit_are_said_and_left_out(run, damage):
    replace(ways_of(), **damage).save(run)
    with pytest.raises(DkdmError, match="do not fit together"):
        read_trajectories(run)
    page = Page(write_report(run))
    assert f"{TRAJECTORIES} holds tensors that do not fit" in page.text
    assert "From noise to" not in page.text


@pytest.mark.parametrize("shape", [(1, 4, 4), (5,), (2, 32), (3, 4, 8, 8), (3, 200, 300)])
def test_ways_of_any_kind_are_shown(run, shape):
    ways_of(shape).save(run)
    page = Page(write_report(run))
    alts = [value for name, value in page.attributes if name == "alt" and "on its way" in value]
    assert alts == [
        f"{name} on its way, teacher over student, at t = 49, 30, 10, and the result."
        for name in ("Trouser", "Pullover")
    ]
    assert "t 49 t 30 t 10 result" in page.text
    assert "levels of its own" not in page.text


def test_levels_of_a_student_of_another_process_are_said(run):
    replace(ways_of(), student_t=torch.tensor([40, 20, 5])).save(run)
    assert "at the same steps they are 40, 20, 5." in Page(write_report(run)).text


# --- the pool ------------------------------------------------------------------------------------


def pool_of(size=40):
    return empty_pool(model(0.5), size, torch.device("cpu"), torch.float32, stride=Stride(5, 12))


def test_ages_are_counted_from_the_batch_in_which_a_chain_began():
    pool, began = pool_of(), torch.zeros(40, dtype=torch.int64)
    for step in range(60):
        before = pool.t.clone()
        batch = pool.draw(8)
        pool.advance(batch, pool.target(batch))
        began[pool.t > before] = step + 1  # levels fall, but for a new chain
    state = state_of(pool)
    ages = (60 - began).tolist()
    assert (state.batches, state.entries, state.unknown) == (60, 40, 0)
    assert state.as_filled == ages.count(60) and len(set(ages)) > 3
    edges = [61 * i / 20 for i in range(21)]
    counts = [sum(low <= age < high for age in ages) for low, high in pairwise(edges)]
    assert list(state.age.counts) == counts
    assert state.t.counts == tuple(torch.histc(pool.t.float(), 20, 0, 50).long().tolist())


def test_a_pool_of_an_earlier_version_has_unknown_ages():
    pool, later = pool_of(), pool_of()
    for name, part in pool.parts().items():
        state = {key: value for key, value in part.state_dict().items() if key != "born"}
        later.parts()[name].load_state_dict(state)
    state = state_of(later)
    assert (state.unknown, sum(state.age.counts), sum(state.t.counts)) == (40, 0, 40)
    for name, part in pool.parts().items():
        later.parts()[name].load_state_dict(part.state_dict())
    assert state_of(later).unknown == 0


def test_ages_go_on_after_a_checkpoint():
    whole, first, second = pool_of(), pool_of(), pool_of()
    for pool, steps in ((whole, 50), (first, 30)):
        for _ in range(steps):
            batch = pool.draw(8)
            pool.advance(batch, pool.target(batch))
    for name, part in first.parts().items():
        second.parts()[name].load_state_dict(part.state_dict())
    for _ in range(20):
        batch = second.draw(8)
        second.advance(batch, second.target(batch))
    assert torch.equal(second.born, whole.born) and second.born.max() > 30


def test_the_pool_reads_back_and_damage_is_named(run):
    found = read_pool_state(run)
    assert found.entries == 40 and sum(found.t.counts) == 40
    assert found == read_pool_state(run)
    for damaged in ({"t": {"end": 0, "counts": []}}, {"age": {"end": 5, "counts": [-1]}}, {"t": 3}):
        values = json.loads((run / POOL).read_text()) | damaged
        (run / "elsewhere").mkdir(exist_ok=True)
        (run / "elsewhere" / POOL).write_text(json.dumps(values))
        with pytest.raises(DkdmError, match=r"pool\.json cannot be read"):
            read_pool_state(run / "elsewhere")


def test_only_sources_with_a_pool_have_one_to_show(tmp_path):
    save_pool(object(), tmp_path)
    assert read_pool_state(tmp_path) is None
    save_pool(Mixed(pool_of(), images=None), tmp_path)
    assert read_pool_state(tmp_path).entries == 40


def test_values_lie_in_equal_ranges():
    assert histogram(torch.tensor([0, 1, 9]), 10, bins=5).counts == (2, 0, 0, 0, 1)
    assert histogram(torch.tensor([0, 2]), 3, bins=20).counts == (1, 0, 1)


# --- bars and maps -------------------------------------------------------------------------------


def test_bars_are_as_high_as_their_counts():
    svg = ElementTree.fromstring(bar_chart("A title", [1, 0, 4], 30, "x", "y", even=2))
    bars = list(svg.iter("rect"))
    heights = [float(bar.get("height")) for bar in bars]
    assert heights[1] == 0 and heights[2] == pytest.approx(4 * heights[0], abs=0.2)
    assert float(bars[2].get("y")) + heights[2] == pytest.approx(FLOOR)
    assert bars[2].find("title").text == "4 between 20 and 30"
    assert bar_chart("A title", [0, 0], 30, "x", "y") is None


def test_a_map_is_darkest_where_values_are_largest():
    columns = [(10, [1.0, None]), (20, [10.0, 100.0]), (30, [0.0, float("nan")])]
    svg = heat_map("A title", columns, "x", "y", lambda x, row, value: f"<{x} {row} {value}>")
    cells = {c.find("title").text: c for c in ElementTree.fromstring(svg).iter("rect")}
    shades = {words: float(cell.get("fill-opacity")) for words, cell in cells.items()}
    middle = pytest.approx((1 + FAINTEST) / 2)
    assert shades == {"<10 0 1.0>": FAINTEST, "<20 0 10.0>": middle, "<20 1 100.0>": 1}
    lower, upper = cells["<20 0 10.0>"], cells["<20 1 100.0>"]
    assert float(lower.get("y")) > float(upper.get("y")) and lower.get("x") == upper.get("x")
    assert heat_map("A title", [(1, [0.0])], "x", "y", str) is None


# --- the page ------------------------------------------------------------------------------------


def test_the_page_shows_all_parts(run):
    page = Page(write_report(run))
    for said in (
        "From noise to image",
        "Noise levels of its entries",
        "Age of its entries",
        "Loss at each noise level over the training",
        "The same as numbers",
        "0.9 to 1",
    ):
        assert said in page.text
    assert page.tags.count("svg") == 6
    assert not re.search("incomplete", page.text)


def test_versions_and_memory_are_shown(run):
    found = comparison()
    sizes = {
        name: replace(getattr(found, name), weights_mib=weights, evaluation_mib=0.25)
        for name, weights in (("teacher", 7.0), ("student", 1.75))
    }
    replace(found, **sizes, versions={"dkdm": "9.8", HOSTILE: "1.0"}).save(run)
    text = Page(write_report(run)).text
    assert "Memory of the weights 7.00 MiB 1.75 MiB 0.250 ×" in text
    assert "256 KiB 256 KiB" in text
    assert f"Made with dkdm 9.8, {HOSTILE} 1.0." in text


def test_pairs_are_the_samples_themselves():
    first, second = torch.full((2, 3, 2, 2), -1.0), torch.ones(2, 3, 2, 2)
    found = pairs(first, second, ["a", ""])
    assert [pair.name for pair in found] == ["a", ""]
    assert [found[1].first.alt, found[1].second.alt] == ["Sample 2: teacher", "Sample 2: student"]
    for pair in found:
        pixels = []
        for image in (pair.first, pair.second):
            with Image.open(io.BytesIO(base64.b64decode(image.src.partition(",")[2]))) as read:
                pixels.append(read.convert("RGB").getpixel((1, 1)))
        assert pixels == [(0, 0, 0), (255, 255, 255)]
    assert reduced(torch.zeros(1, 3, 300, 200)).shape == (1, 3, 100, 66)


# --- in a browser --------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """
<script>
const wipe = document.querySelector(".wipe"), range = wipe.querySelector("input");
const cut = () => getComputedStyle(wipe.querySelector(".second")).clipPath;
const seen = {live: wipe.classList.contains("live"), start: cut()};
wipe.querySelector("button.teacher").click();
seen.teacher = [range.value, cut(), range.getAttribute("aria-valuetext")];
range.value = 25; range.dispatchEvent(new Event("input"));
seen.quarter = cut();
const box = wipe.querySelector(".box"), place = box.getBoundingClientRect();
const at = (type, share) => box.dispatchEvent(new PointerEvent(
  type, {pointerId: 1, clientX: place.left + share * place.width, clientY: place.top + 1}));
box.setPointerCapture = () => { box.held = true; };
box.hasPointerCapture = () => box.held;
at("pointermove", 0.9); seen.hovered = Number(range.value);
at("pointerdown", 0.5); at("pointermove", 0.75); seen.dragged = Number(range.value);
const room = document.documentElement.clientWidth;
seen.wide = document.documentElement.scrollWidth - room;
seen.beyond = [...document.querySelectorAll("main *")]
  .filter((e) => e.getBoundingClientRect().right > room + 1 && !e.closest(".scroll, svg"))
  .map((e) => e.tagName + "." + e.className);
seen.room = room;
document.title = JSON.stringify(seen);
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on the PATH")
def test_the_page_works_in_a_browser(run, tmp_path):
    names = ("T-shirt/top", "a very long prompt " * 12, "word" * 40)
    replace(comparison(), class_names=names).save(run)
    source = write_report(run).read_text()
    probed = re.sub(r"<meta http-equiv=.Content-Security-Policy.*?>", "", source)
    inner = tmp_path / "inner.html"
    inner.write_text(probed.replace("</body>", PROBE + "</body>"))
    # A window is never narrower than 500 pixels; a frame is.
    outer = tmp_path / "outer.html"
    relay = "document.title = frame.contentDocument.title"
    outer.write_text(
        f'<iframe id="frame" src="inner.html" width="360" height="800" style="border:0" '
        f'onload="{relay}"></iframe>'
    )
    seen = json.loads(title_of(outer))
    assert seen["room"] == 360
    assert (seen["wide"], seen["beyond"]) == (0, [])
    assert seen["live"] and seen["start"] == "inset(0px 0px 0px 50%)"
    assert seen["teacher"] == ["100", "inset(0px 0px 0px 100%)", "teacher 100 %, student 0 %"]
    assert seen["quarter"] == "inset(0px 0px 0px 25%)"
    assert (seen["hovered"], seen["dragged"]) == (25, pytest.approx(75, abs=0.5))
    # With its policy in place the script of the page runs, and no other.
    guarded = tmp_path / "guarded.html"
    guarded.write_text(source.replace("</body>", "<script>document.title='x'</script></body>"))
    dom = dumped(guarded)
    assert 'class="wipe live"' in dom and "<title>x</title>" not in dom


def dumped(page):
    """The document of a page after its scripts."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options = [
        "--dump-dom",
        "--allow-file-access-from-files",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    done = subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def title_of(page):
    found = re.search(r"<title>(.*?)</title>", dumped(page), re.DOTALL)
    assert found, "the page gave no title"
    return found[1].replace("&quot;", '"').replace("&gt;", ">")


TIP = "document.querySelector('.tip').textContent"
HIDDEN = "document.querySelector('.tip').hidden"
INSIDE = """(tip => tip.left >= 0 && tip.right <= innerWidth && tip.height > 0)(
    document.querySelector('.tip').getBoundingClientRect())"""
WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_phone_shows_values_by_touch_and_by_keys(run, tmp_path):
    comparison().save(run)
    with browser(tmp_path / "profile") as seen:
        seen.open("about:blank")
        seen.as_phone()
        seen.call("Page.navigate", url=write_report(run).as_uri())
        seen.wait("document.readyState == 'complete' && document.querySelector('.tip') !== null")
        assert seen.run(HIDDEN) and not seen.run(WIDER)
        marks = {"circle.faint": "first tenth: ", "svg rect:last-of-type": " at t / T"}
        for mark, said in marks.items():
            seen.tap(mark)
            seen.wait(f"!{HIDDEN} && {TIP}.includes({json.dumps(said)})", 10)
            assert seen.run(INSIDE) and not seen.run(WIDER)
        seen.tap("h1")
        seen.wait(HIDDEN, 10)
        seen.run("document.querySelectorAll('svg.chart[tabindex]')[1].focus()")
        said = []
        for _ in range(2):
            seen.press("ArrowRight", 39)
            said.append(seen.run(TIP))
        assert not seen.run(HIDDEN) and said[0] != said[1]
        seen.press("Escape", 27)
        assert seen.run(HIDDEN)
        seen.run("document.querySelector('input[type=range]').focus()")
        seen.press("ArrowRight", 39)
        assert seen.run("Number(document.querySelector('input[type=range]').value)") > 50
