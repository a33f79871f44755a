"""The page of `dkdm ui`, by gradio: shown on this machine alone, without any other address."""

from __future__ import annotations

import os
import socket
from typing import Any, get_args

from markupsafe import Markup, escape

from dkdm.config import Sampler, UiCommand
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.few_steps.model import usual_steps
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.comparison import describe
from dkdm.evaluation.numbers import count
from dkdm.models import chosen_teacher
from dkdm.models.place import device_of_run, place
from dkdm.report.media import media
from dkdm.runs.judges import judged_teacher, known_run
from dkdm.runs.pair import Drawn, Pair, Wish, draw_both, pair_of

HOST = "127.0.0.1"
STEPS = 25
IN_TURNS = "all in turns"
# Only this server, and nothing else that a component of gradio might ask for.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'"
HEADING = Markup("<h2>{}</h2><p>{}, {} parameters</p>")


def serve(command: UiCommand) -> None:
    """Open both models and show the page until it is interrupted.

    Raises DkdmError without gradio, UsageError for a port that is taken and for a model whose
    teacher is not known.
    """
    gradio = gradio_module()
    _check_port(command.page.port)
    run = known_run(command.model_choice.model)
    student = chosen_teacher(command.model_choice)
    teacher = judged_teacher(command.teacher_choice, run, asked=True)
    assert teacher is not None  # since it was asked for
    for model in (teacher, student):
        place(model, device_of_run())
    steps = run.evaluation.validation_sampling_steps if run else usual_steps(student, STEPS)
    launch(gradio, page(gradio, pair_of(teacher, student, run), steps), command.page.port)


def gradio_module() -> Any:
    """gradio, which tells nobody that it is used. Raises DkdmError without it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise DkdmError("dkdm ui needs gradio: pip install 'dkdm[ui]'") from error
    return gradio


def _check_port(port: int) -> None:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise UsageError(
                f"--port {port} cannot be used ({error.strerror}): give another"
            ) from error


def page(gradio: Any, pair: Pair, steps: int = STEPS) -> Any:
    """The page: what is drawn above, both models beside each other below."""
    with gradio.Blocks(title="dkdm", analytics_enabled=False, fill_width=True) as blocks:
        inputs = _inputs(gradio, pair, steps)
        button = gradio.Button("Draw", variant="primary")
        outputs = []
        with gradio.Row():
            for who, model in (("Teacher", pair.teacher), ("Student", pair.student)):
                with gradio.Column():
                    words = f"{who}: {model.name}", type(model.network).__name__
                    gradio.HTML(HEADING.format(*words, count(model.num_parameters)))
                    outputs.append(gradio.HTML())
        gradio.HTML(Markup("<p>Both from the same noise, on {}.</p>").format(_place(pair)))

        def draw(*values: Any) -> list[str]:
            try:
                return drawn_as_html(pair, dict(zip(inputs, values, strict=True)))
            except DkdmError as error:
                # gradio shows an error as HTML
                said = str(escape(str(error)))
                raise gradio.Error(said, duration=None, print_exception=False) from error

        wiring = {"fn": draw, "inputs": [*inputs.values()], "outputs": outputs}
        button.click(**wiring, show_progress="minimal")
        if not pair.takes_prompts:
            blocks.load(**wiring, show_progress="minimal")
    return blocks


def _inputs(gradio: Any, pair: Pair, steps: int) -> dict[str, Any]:
    """A component for each field of a wish that these models understand."""
    found = {}
    if pair.takes_prompts:
        found["prompt"] = gradio.Textbox(label="prompt")
    with gradio.Row():
        found["seed"] = gradio.Number(0, label="seed", precision=0, minimum=0)
        found["num_steps"] = gradio.Slider(1, max(200, steps), steps, step=1, label="steps")
        if pair.can_be_guided:
            baked = " (teacher; the student has it built in)" if pair.is_baked else ""
            scale = pair.guidance_scale
            found["guidance_scale"] = gradio.Number(scale, label=f"guidance{baked}")
        if pair.classes:
            choices = [(IN_TURNS, -1), *pair.classes]
            found["class_id"] = gradio.Dropdown(choices, value=-1, label="class")
        found["sampler"] = gradio.Dropdown([*get_args(Sampler)], value="ddim", label="sampler")
        found["num_samples"] = gradio.Slider(1, 32, 8, step=1, label="samples")
    return found


def drawn_as_html(pair: Pair, values: dict[str, Any]) -> list[str]:
    """Teacher's and student's samples with their latency; values: of the fields of a `Wish`.

    Raises UsageError for values that are missing or out of range, as `draw_both` does.
    """
    chosen = values.get("class_id", -1)
    wish = Wish(**{**values, "class_id": None if chosen == -1 else chosen})
    both = zip(draw_both(pair, wish), (pair.teacher, pair.student), strict=True)
    rate = sample_rate(pair)
    return [str(_shown(drawn, model, wish, rate)) for drawn, model in both]


def _shown(drawn: Drawn, model: Denoiser, wish: Wish, rate: int | None) -> Markup:
    shown = media(drawn.samples, f"{len(drawn.samples)} samples of {model.name}", rate)
    return Markup("<p><b>{}</b></p>{}").format(drawn.in_words(wish.num_steps), shown)


def sample_rate(pair: Pair) -> int | None:
    """Values a second of audio, by the config of either network; None if neither says it."""
    for model in (pair.teacher, pair.student):
        found = getattr(getattr(model.network, "config", None), "sample_rate", None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def _place(pair: Pair) -> str:
    return describe(pair.student.device)


def launch(gradio: Any, blocks: Any, port: int, blocking: bool = True) -> None:
    """Serve the page on 127.0.0.1, to browsers of this machine."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
    blocks.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        theme=gradio.themes.Default(**fonts),
        app_kwargs={"middleware": [hosts, Middleware(OnlyThisServer)]},
        prevent_thread_lock=not blocking,
    )


class OnlyThisServer:
    """Tells the browser, with every answer, to ask no other address (ASGI middleware)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        await self.app(scope, receive, with_policy)
