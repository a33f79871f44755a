"""The page of dkdm ui: wired by a stand-in for gradio; by gradio itself, and seen by a browser."""

import http.client
import shutil
import socket
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

import pytest

from dkdm.cli import main
from dkdm.core.conditioning import ClassLabels
from dkdm.errors import UsageError
from dkdm.runs.pair import pair_of
from dkdm.runs.ui import HOST, POLICY, gradio_module, launch, page
from factories import denoiser

CHROMIUM = shutil.which("chromium")
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

    def __init__(self, text, duration):
        del duration
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
    connection.request("GET", "/", headers={"Host": host})
    return connection.getresponse()


@pytest.mark.slow
@NEEDS_GRADIO
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_browser_sees_both_models_and_asks_no_other_address(tmp_path):
    gradio, port = gradio_module(), free_port()
    blocks = page(gradio, pair(), steps=2)
    launch(gradio, blocks, port, blocking=False)
    try:
        assert answer(port, "evil.example").status == 400
        assert answer(port, f"{HOST}:{port}").getheader("content-security-policy") == POLICY
        with socket.socket() as outside, pytest.raises(OSError):
            outside.settimeout(2)
            outside.connect((socket.gethostbyname(socket.gethostname()), port))
            if outside.getpeername()[0] == HOST:
                raise OSError
        options = ["--headless=new", "--no-sandbox", f"--user-data-dir={tmp_path}", "--dump-dom"]
        options += ["--timeout=20000", "--virtual-time-budget=20000"]
        seen = subprocess.run(
            [CHROMIUM, *options, f"http://{HOST}:{port}"], capture_output=True, text=True
        )
    finally:
        blocks.close()
    assert seen.stdout.count("for 8 in 2 steps") == 2
    assert seen.stdout.count("data:image/png;base64,") == 2
    assert all(label in seen.stdout for label in ("seed", "steps", "guidance", "class", "sampler"))


def test_a_pair_of_other_shapes_is_refused():
    with pytest.raises(UsageError, match="compare models of one shape"):
        pair_of(denoiser(), replace(denoiser(), sample_shape=(1, 16, 16)), None)
