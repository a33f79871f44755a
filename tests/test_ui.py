"""The page of dkdm ui: wired by a stand-in for gradio; by gradio itself, and seen by a browser."""

import http.client
import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pipelines
from browser import CHROMIUM, browser
from dkdm.cli import main
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.errors import UsageError
from dkdm.models import load_teacher
from dkdm.runs.pair import pair_of
from dkdm.runs.ui import HOST, POLICY, page
from factories import denoiser

NEEDS_GRADIO = pytest.mark.skipif(
    find_spec("gradio") is None, reason="gradio is not installed: pip install 'dkdm[ui]'"
)


class Component:
    """Remembers what it was made of, and what it was wired to."""

    def __init__(self, *given, **options):
        self.given, self.options, self.wired = given, options, []

    def click(self, **wiring):
        self.wired.append(wiring)

    load = click

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class Shown(Exception):
    """A message in the browser."""

    def __init__(self, text, duration, print_exception):
        del duration
        assert not print_exception
        super().__init__(text)


class Gradio:
    """A stand-in for the module."""

    Blocks = Number = Slider = Dropdown = Textbox = HTML = Component
    Error = Shown

    def __init__(self):
        self.button = Component()

    def Button(self, *_, **__):
        return self.button

    def Row(self):
        return nullcontext()

    Column = Row


def pair(classes=3, **changes):
    teacher, student = denoiser(classes, seed=0), denoiser(classes, seed=1)
    return pair_of(teacher, replace(student, **changes), None)


def offered(pair):
    """Labels of the inputs, the function behind the button and its inputs."""
    gradio = Gradio()
    page(gradio, pair, steps=2)
    (wiring,) = gradio.button.wired
    return [each.options["label"] for each in wiring["inputs"]], wiring["fn"], wiring


def test_the_button_draws_with_what_the_models_understand():
    labels, draw, wiring = offered(pair())
    assert labels == ["seed", "steps", "guidance", "class", "sampler", "samples"]
    shown = draw(0, 2, 1.0, -1, "ddim", 2)
    assert len(shown) == len(wiring["outputs"]) == 2
    assert all("for 2 in 2 steps" in html and "data:image/png" in html for html in shown)
    assert draw(1, 2, 1.0, -1, "ddim", 2)[0].partition("<img")[2] != shown[0].partition("<img")[2]
    with pytest.raises(Shown, match="--seed -1"):
        draw(-1, 2, 1.0, -1, "ddim", 2)


def test_what_the_models_do_not_understand_is_not_offered():
    assert offered(pair(None))[0] == ["seed", "steps", "sampler", "samples"]
    unguided = ClassLabels(3)
    assert "guidance" not in offered(pair(conditioning=unguided))[0]


def test_a_port_that_is_taken_is_refused_before_a_model_is_opened(monkeypatch, capsys):
    monkeypatch.setattr("dkdm.runs.ui.gradio_module", Gradio)
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "no/such/model", "--port", str(port)]) == 2
    assert f"--port {port} cannot be used" in capsys.readouterr().err


def test_a_model_without_a_teacher_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("dkdm.runs.ui.gradio_module", Gradio)
    monkeypatch.setattr("dkdm.runs.ui._check_port", lambda _: None)
    assert main(["ui", "builtin:fashion"]) == 2
    assert "give --teacher MODEL" in capsys.readouterr().err


def free_port():
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]


def answer(port, host):
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    try:
        connection.request("GET", "/", headers={"Host": host})
        found = connection.getresponse()
        found.read()
        return found
    finally:
        connection.close()


class Curved(torch.nn.Module):
    """One convolution over samples of 1 or 3 dimensions: audio, video."""

    config = SimpleNamespace(sample_rate=8000)

    def __init__(self, dimensions):
        super().__init__()
        make = {1: torch.nn.Conv1d, 3: torch.nn.Conv3d}[dimensions]
        self.layer = make(1, 1, 3, padding=1)

    def forward(self, x, t):
        del t
        return self.layer(x)


def pair_of_others(*shape):
    """A pair for samples of another shape."""
    network = Curved(len(shape) - 1)
    model = replace(denoiser(None), network=network, sample_shape=shape, call=None)
    return pair_of(model, model, None)


def pair_of_prompts():
    """A tiny Stable Diffusion in the working folder, as teacher and student."""
    pipelines.stable_diffusion().save_pretrained("text")
    model = load_teacher("text")
    return pair_of(model, model, None)


PAIRS = {
    "classes": pair,
    "prompts": pair_of_prompts,
    "audio": partial(pair_of_others, 1, 800),
    "video": partial(pair_of_others, 1, 4, 8, 8),
}
SERVER = """
import sys
sys.path.insert(0, {tests!r})
from test_ui import PAIRS
from dkdm.runs.ui import gradio_module, launch, page
gradio = gradio_module()
launch(gradio, page(gradio, PAIRS[{kind!r}](), steps=2), {port})
"""
IMAGES = "[...document.images].map(each => each.src).join()"
CLICK = "[...document.querySelectorAll('button')].find(b => b.innerText == 'Draw').click()"
WRITE = """(() => {{
    const box = document.querySelector('textarea');
    box.value = {!r};
    box.dispatchEvent(new Event('input', {{bubbles: true}}));
}})()"""
LATENCIES = "document.body.innerText.split('for 8 in 2 steps').length - 1"


@contextmanager
def served(port, kind, folder):
    """The page of two tiny models, in a process of its own."""
    program = SERVER.format(tests=str(Path(__file__).parent), kind=kind, port=port)
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)
    try:
        end = time.monotonic() + 120
        while not answers(port):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def click_until(seen, wanted):
    """Click until an expression is true: a click before the page is ready does nothing."""
    end = time.monotonic() + 60
    while not seen.run(wanted):
        assert time.monotonic() < end, f"never true: {wanted}"
        seen.run(CLICK)
        time.sleep(2)


def answers(port, host=HOST):
    with socket.socket() as tried:
        return tried.connect_ex((host, port)) == 0


@pytest.mark.slow
@NEEDS_GRADIO
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_with_both_models_and_asks_no_other_address(tmp_path):
    port = free_port()
    with served(port, "classes", tmp_path), browser(tmp_path / "profile") as seen:
        assert answer(port, "evil.example").status == 400
        assert answer(port, f"{HOST}:{port}").getheader("content-security-policy") == POLICY
        assert not answers(port, "127.0.0.2")  # 127.0.0.1 is all that it listens at
        seen.open(f"http://{HOST}:{port}/")
        seen.wait(f"{LATENCIES} == 2")
        first = seen.run(IMAGES)
        assert first.count("data:image/png;base64,") == 2
        seen.run(CLICK)
        seen.wait("document.body.innerText.includes('ms each')")
        seen.wait(f"{IMAGES} == {json.dumps(first)}")  # the same wish draws the same
        network = [url for url in seen.asked if not url.startswith(("data:", "blob:"))]
        assert network and all(url.startswith(f"http://{HOST}:{port}/") for url in network)


@pytest.mark.slow
@NEEDS_GRADIO
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_what_a_prompt_says(tmp_path):
    port = free_port()
    with served(port, "prompts", tmp_path), browser(tmp_path / "profile") as seen:
        seen.open(f"http://{HOST}:{port}/")
        seen.wait("document.querySelector('textarea') !== null")
        assert seen.run("document.querySelectorAll('img').length") == 0
        click_until(seen, "document.body.innerText.includes('write one')")
        drawn = []
        for prompt in ("a red cat", "a blue dog"):
            seen.run(WRITE.format(prompt))
            click_until(seen, f"{LATENCIES} == 2 && !{json.dumps(drawn)}.includes({IMAGES})")
            drawn.append(seen.run(IMAGES))
    assert drawn[0].count("data:image/png;base64,") == 2


@pytest.mark.slow
@NEEDS_GRADIO
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(
    "kind, shown",
    [  # 800 values at 8,000 a second; two images of eight videos each
        ("audio", "Array.from(document.querySelectorAll('audio'), a => a.duration == 0.1)[15]"),
        ("video", "document.querySelectorAll('img[src^=\"data:image/webp\"]').length == 2"),
    ],
)
def test_a_browser_plays_audio_and_video(tmp_path, kind, shown):
    port = free_port()
    with served(port, kind, tmp_path), browser(tmp_path / "profile") as seen:
        seen.open(f"http://{HOST}:{port}/")
        seen.wait(f"{LATENCIES} == 2")
        seen.wait(shown)


def test_a_pair_of_other_shapes_is_refused():
    with pytest.raises(UsageError, match="compare models of one shape"):
        pair_of(denoiser(), replace(denoiser(), sample_shape=(1, 16, 16)), None)


def test_as_many_steps_as_a_run_was_measured_with_can_be_drawn():
    gradio = Gradio()
    page(gradio, pair(), steps=250)
    (wiring,) = gradio.button.wired
    steps = next(each for each in wiring["inputs"] if each.options["label"] == "steps")
    least, most, value = steps.given
    assert least <= value <= most and value == 250


def test_what_went_wrong_is_shown_as_text():
    named = pair(name="<b>mine</b>")
    next(named.student.network.parameters()).data.fill_(torch.nan)
    draw = offered(named)[1]
    with pytest.raises(Shown, match="&lt;b&gt;mine") as caught:
        draw(0, 2, 1.0, -1, "ddim", 2)
    assert "<b>" not in str(caught.value)
