"""The page of dkdm ui: wired by a stand-in for gradio; by gradio itself, and seen by a browser."""

import http.client
import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from browser import CHROMIUM, browser
from dkdm.cli import main
from dkdm.core.conditioning import ClassLabels
from dkdm.errors import UsageError
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


SERVER = """
import sys
sys.path.insert(0, {tests!r})
from test_ui import pair
from dkdm.runs.ui import gradio_module, launch, page
gradio = gradio_module()
launch(gradio, page(gradio, pair(), steps=2), {port})
"""
IMAGES = "[...document.images].map(each => each.src).join()"
LATENCIES = "document.body.innerText.split('for 8 in 2 steps').length - 1"


@contextmanager
def served(port):
    """The page of two tiny models, in a process of its own."""
    program = SERVER.format(tests=str(Path(__file__).parent), port=port)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not answers(port):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def answers(port, host=HOST):
    with socket.socket() as tried:
        return tried.connect_ex((host, port)) == 0


@pytest.mark.slow
@NEEDS_GRADIO
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_with_both_models_and_asks_no_other_address(tmp_path):
    port = free_port()
    with served(port), browser(tmp_path / "profile") as seen:
        assert answer(port, "evil.example").status == 400
        assert answer(port, f"{HOST}:{port}").getheader("content-security-policy") == POLICY
        assert not answers(port, "127.0.0.2")  # 127.0.0.1 is all that it listens at
        seen.open(f"http://{HOST}:{port}/")
        seen.wait(f"{LATENCIES} == 2")
        first = seen.run(IMAGES)
        assert first.count("data:image/png;base64,") == 2
        seen.run(
            "[...document.querySelectorAll('button')].find(b => b.innerText == 'Draw').click()"
        )
        seen.wait("document.body.innerText.includes('ms each')")
        seen.wait(f"{IMAGES} == {json.dumps(first)}")  # the same wish draws the same
        network = [url for url in seen.asked if not url.startswith(("data:", "blob:"))]
        assert network and all(url.startswith(f"http://{HOST}:{port}/") for url in network)


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
