"""Samples as a browser shows them: images, videos that move, audio that plays; no other files."""

from __future__ import annotations

import base64
import io
import wave

from markupsafe import Markup
from torch import Tensor

from dkdm.report.grids import grid, png_data_uri, sample_grid
from dkdm.report.plots import is_plotted

COLUMNS = 4
FRAMES_A_SECOND = 8
SHOW = Markup('<img src="{}" alt="{}" style="width:100%;image-rendering:{}">')
DARK = Markup("<style>.dark .plot { filter: invert(.89) hue-rotate(180deg) }</style>")
PLOT = Markup('<div class="plot">{}</div>')  # on dark paper where gradio's page is dark
PLAY = Markup('<audio controls src="{}" style="width:100%"></audio>')
SHARP = 128  # pixels; smaller images are enlarged without blurring
CHANNELS = (1, 2)  # of audio


def media(samples: Tensor, alt: str, rate: int | None = None) -> Markup:
    """HTML that shows samples [N, ...] in about [-1, 1]; what it says of them is escaped.

    rate: of audio [N, C, L], values a second; None plots it. Audio plays and is plotted, a video
    [N, C, F, H, W] moves. Samples of more dimensions are only named.
    """
    if rate is not None and samples.ndim == 3 and samples.shape[1] in CHANNELS:
        players = [PLAY.format(wav_data_uri(sample, rate)) for sample in samples]
        return Markup("").join(players) + _image(samples, alt)
    if samples.ndim == 5:
        return SHOW.format(video_data_uri(samples), alt, _rendering(samples))
    return _image(samples, alt)


def _image(samples: Tensor, alt: str) -> Markup:
    image = sample_grid(samples, COLUMNS)
    if image is None:
        return Markup("<p>{} of shape {} cannot be shown.</p>").format(alt, list(samples.shape[1:]))
    shown = SHOW.format(png_data_uri(image), alt, _rendering(samples))
    return DARK + PLOT.format(shown) if is_plotted(samples) else shown


def _rendering(samples: Tensor) -> str:
    return "pixelated" if samples.ndim > 3 and max(samples.shape[-2:]) < SHARP else "auto"


def wav_data_uri(sample: Tensor, rate: int) -> str:
    """Audio [C, L] in [-1, 1] as 16-bit PCM; values beyond are clamped."""
    pcm = (sample.float().nan_to_num().clamp(-1, 1) * 32767).round().short().T.contiguous()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(sample))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.numpy().astype("<i2").tobytes())
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def video_data_uri(samples: Tensor) -> str:
    """Videos [N, C, F, H, W] beside one another as one image that moves."""
    frames = [grid(frame, COLUMNS).convert("RGB") for frame in samples.unbind(2)]
    buffer = io.BytesIO()
    duration = round(1000 / FRAMES_A_SECOND)
    moving = {"save_all": True, "append_images": frames[1:], "duration": duration, "loop": 0}
    frames[0].save(buffer, format="WEBP", lossless=True, **moving)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
