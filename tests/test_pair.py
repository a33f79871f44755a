"""What stands behind the page of dkdm ui: both models from the same noise, each timed."""

import base64
import io
import re
import sys
import wave
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dkdm.cli import main
from dkdm.config import DistillConfig, TrainConfig
from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.report.media import media, wav_data_uri
from dkdm.runs.pair import Wish, draw_both, pair_of
from dkdm.runs.ui import drawn_as_html, sample_rate
from factories import counting, denoiser

WISH = Wish(num_samples=3, num_steps=2)


def some_pair(run=None, **changes):
    teacher, student = denoiser(seed=0), denoiser(seed=1)
    return pair_of(teacher, replace(student, **changes), run)


def drawn_by(model, labels, **changes):
    cond = model.conditioning.of(labels)
    return draw(model, cond, Sampling(len(labels), 2, **{"seed": 0, **changes}))


def test_both_draw_from_the_same_noise_and_are_timed():
    pair = some_pair()
    teacher, student = draw_both(pair, WISH)
    assert torch.equal(teacher.samples, drawn_by(pair.teacher, [0, 1, 2]))
    assert torch.equal(student.samples, drawn_by(pair.student, [0, 1, 2]))
    assert teacher.seconds > 0 and student.seconds > 0
    words = re.fullmatch(r"(\S+) s for 3 in 2 steps, (\S+) ms each.*", teacher.in_words(2))
    assert float(words[1]) == pytest.approx(teacher.seconds, abs=0.01)


def test_a_wish_is_fulfilled():
    pair = some_pair()
    wish = replace(WISH, class_id=2, seed=5, sampler="heun")
    _, student = draw_both(pair, wish)
    cond = {"class_labels": torch.tensor([2, 2, 2])}
    expected = draw(pair.student, cond, Sampling(3, 2, 5, "heun"))
    assert torch.equal(student.samples, expected)


@pytest.mark.parametrize("baked", [False, True])
def test_guidance_reaches_the_student_unless_it_is_baked_in(baked):
    run = DistillConfig(guidance_scale="3") if baked else DistillConfig(sampling_guidance_scale=3.0)
    pair = some_pair(run)
    assert (pair.guidance_scale, pair.is_baked) == (3.0, baked)
    model, counts = counting(pair.student)
    guided = replace(WISH, guidance_scale=3.0)
    draw_both(replace(pair, student=model), guided)
    assert set(counts) == {3 if baked else 6}
    with_scale = draw_both(pair, guided)[1].samples
    without = draw_both(pair, WISH)[1].samples
    assert torch.equal(with_scale, without) == baked


def test_a_run_on_images_guides_as_it_measured_itself():
    assert some_pair(TrainConfig(sampling_guidance_scale=2.0)).guidance_scale == 2.0


def test_classes_are_those_that_the_student_learnt():
    learnt = ClassLabels(3, null_class=3, classes=(0, 2), names=("a", "b", "c"))
    assert some_pair(conditioning=learnt).classes == [("a", 0), ("c", 2)]


def test_models_that_do_not_belong_together_are_refused():
    with pytest.raises(UsageError, match="they ask for class_labels and nothing"):
        some_pair(conditioning=Unconditional())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_samples": 1000}, "--num-samples 1000: give a whole number from 1 to 64"),
        ({"seed": None}, "--seed"),
        ({"seed": -1}, "--seed -1"),
        ({"num_steps": 5000}, "steps"),
        ({"class_id": 7}, "class id 7"),
        ({"sampler": "magic"}, "--sampler"),
        ({"guidance_scale": float("nan")}, "--guidance-scale"),
    ],
)
def test_what_cannot_be_drawn_is_said(values, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        drawn_as_html(some_pair(), {"num_samples": 2, "num_steps": 2, **values})


def test_the_page_shows_both_and_their_latency():
    pair = some_pair()
    pair.teacher.name = "<b>teacher</b>"
    shown = drawn_as_html(pair, {"num_samples": 2, "num_steps": 2, "class_id": -1})
    assert len(shown) == 2 and all("data:image/png;base64," in html for html in shown)
    assert all("for 2 in 2 steps" in html for html in shown)
    assert "&lt;b&gt;teacher" in shown[0] and "<b>teacher" not in shown[0]
    assert sample_rate(pair) is None


def test_audio_plays_and_videos_move():
    tone = torch.linspace(-2, 2, 400).reshape(1, 1, 400)
    assert "<audio controls" in media(tone, "x", 8000) and "<audio" not in media(tone, "x")
    for shown in (media(tone, "x", 8000), media(torch.zeros(2, 5), "x")):
        assert ".dark .plot {" in shown and '<div class="plot"><img ' in shown
    assert "plot" not in media(torch.zeros(2, 1, 8, 8), "x")
    with wave.open(
        io.BytesIO(base64.b64decode(wav_data_uri(tone[0], 8000).partition(",")[2]))
    ) as f:
        pcm = torch.frombuffer(bytearray(f.readframes(400)), dtype=torch.int16)
        assert (f.getnchannels(), f.getframerate(), len(pcm)) == (1, 8000, 400)
    expected = (tone.flatten().clamp(-1, 1) * 32767).round()
    assert torch.equal(pcm.float(), expected)
    moving = media(torch.rand(2, 3, 5, 8, 8) * 2 - 1, "x")
    uri = re.search('src="data:image/webp;base64,([^"]+)"', moving)[1]
    assert Image.open(io.BytesIO(base64.b64decode(uri))).n_frames == 5
    assert "cannot be shown" in media(torch.zeros(1, 2, 2, 2, 2, 2), "x")


def test_without_gradio_the_extra_is_named_before_a_model_is_opened(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui", "no/such/model"]) == 1
    assert capsys.readouterr().err.strip() == "dkdm: dkdm ui needs gradio: pip install 'dkdm[ui]'"


def test_samples_that_are_not_finite_are_said():
    pair = some_pair()
    next(pair.student.network.parameters()).data.fill_(torch.nan)
    with pytest.raises(DkdmError, match="not finite"):
        draw_both(pair, WISH)
