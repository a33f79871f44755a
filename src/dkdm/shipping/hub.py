"""A finished run on the Hugging Face hub.

The token comes from `hf auth login` or HF_TOKEN; dkdm never holds it and writes it to no file.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from dkdm.config import DistillConfig, HubOptions, read_config
from dkdm.errors import DkdmError, UsageError, raised_as
from dkdm.evaluation.parts import earlier_part
from dkdm.reading.files import write_text
from dkdm.reading.places import check_folder
from dkdm.shipping.licence import CARD, origins_of
from dkdm.version import __version__

# Hidden files are half written, or not dkdm's.
OF_TRAINING = ["checkpoint-*", "best/*", "finished/*", "synthetic/*", "fill/*", "logs/*", ".*"]
STAYS_HERE = [*OF_TRAINING, *(f"plain/{each}" for each in OF_TRAINING)]  # of both parts of a run
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def reserve(hub: HubOptions, output_dir: Path) -> HubOptions:
    """Before a run: check that its repository can be written to; create a missing one.

    Returns the options with the repository's full name; unchanged without --push-to-hub.
    Raises UsageError without a login that may write, DkdmError if the hub cannot be reached.
    """
    if not hub.push_to_hub or not PartialState().is_main_process:
        return hub
    wanted = hub.hub_model_id or output_dir.absolute().name
    return replace(hub, hub_model_id=_repository(wanted, hub.hub_private))


def publish(hub: HubOptions, output_dir: Path) -> None:
    """After a run: upload its folder if --push-to-hub is given.

    Raises DkdmError with the command that repeats the upload; the run itself is complete.
    """
    if not hub.push_to_hub or not PartialState().is_main_process:
        return
    try:
        push(output_dir, hub.hub_model_id, hub.hub_private)
    except DkdmError as error:
        again = ["dkdm", "push", str(output_dir), "--hub-model-id", str(hub.hub_model_id)]
        raise DkdmError(
            f"the run is complete in {output_dir}, but uploading it failed: {error}. Repeat "
            f"the upload with: {shlex.join(again)}"
        ) from error


def push(run: Path, hub_model_id: str | None = None, private: bool = False) -> str:
    """Upload a finished run; returns its address.

    hub_model_id: USER/NAME; None takes the run's, or the folder's name under the token's user.
    private: whether a new repository is private. Raises UsageError for a folder that is no
    finished run, and as `reserve` does.
    """
    if not all((run / name).is_file() for name in ("config.json", CARD)):
        raise UsageError(
            f"{run} is not a finished run: give the output folder of `dkdm distill` or `dkdm "
            f"train`, with config.json and {CARD}, which is written at the end"
        )
    config = read_config(check_folder(run) / "config.json")
    wanted = hub_model_id or config.hub.hub_model_id or run.absolute().name
    repo_id = _repository(wanted, private or config.hub.hub_private)
    if isinstance(config, DistillConfig):
        teacher = " and ".join(origin.name for origin in origins_of(config))
        made = f"{Path(config.student_choice.student).name} distilled from {teacher}"
    else:
        made = f"Trained on {Path(config.data.images).name}"
    parts = [part.config for part in [earlier_part(run, config)] if part] + [config]
    steps = sum(part.training.max_train_steps for part in parts)
    _upload(run, repo_id, f"{made}: {steps} steps, dkdm {__version__}")
    return _url(repo_id)


def _upload(run: Path, repo_id: str, message: str) -> None:
    _name_in_card(run / CARD, repo_id)
    with raised_as(partial(_explained, repo_id)):
        HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=run,
            ignore_patterns=list(STAYS_HERE),
            commit_message=message,
        )


def url_of(run: Path) -> str:
    """The address of a run that was uploaded."""
    return _url(str(read_config(run / "config.json").hub.hub_model_id))


def _url(repo_id: str) -> str:
    return f"{HfApi().endpoint}/{repo_id}"


def _repository(wanted: str, private: bool) -> str:
    """The full name of the repository, which exists from now on."""
    api = HfApi()
    with raised_as(partial(_explained, wanted)):
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UsageError(f"the token of {user['name']} may only read the hub: {LOG_IN}")
        repo_id = wanted if "/" in wanted else f"{user['name']}/{wanted}"
        api.create_repo(repo_id, private=private or None, exist_ok=True)
    return repo_id


def _name_in_card(card: Path, repo_id: str) -> None:
    """Let the card's lines load the model from this repository."""
    text = card.read_text(encoding="utf-8")
    quoted = json.dumps(repo_id)
    named = re.sub(r'(\.from_pretrained\()"[^"]*"', lambda match: match[1] + quoted, text)
    write_text(card, named)


def _explained(repo_id: str, error: Exception) -> DkdmError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return UsageError(f"--hub-model-id {repo_id}: not a valid name on the hub: {error}")
    if isinstance(error, LocalTokenNotFoundError):
        return UsageError(f"not logged in to the hub: {LOG_IN}")
    if status == 401:
        return UsageError(f"the hub does not know this token: {LOG_IN}")
    if status == 403:
        return UsageError(
            f"{repo_id}: this account or token may not write there: give another --hub-model-id, "
            f"or {LOG_IN}"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return DkdmError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it")
    causes = [error, error.__cause__] if error.__cause__ else [error]
    what = ": ".join(" ".join(str(e).split()).rstrip(".") or type(e).__name__ for e in causes)
    return DkdmError(f"uploading {repo_id} to {HfApi().endpoint} failed: {what}")
