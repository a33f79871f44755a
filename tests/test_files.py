"""Files are written whole or not at all, and caches once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from jinja2 import UndefinedError

from dkdm.core.saving.checkpoint import write_tensors
from dkdm.reading.files import atomic, cache_dir, cached_folder, render


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with atomic(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        assert partial.suffix == ".html"
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["page.html"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["page.html"]


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "link").symlink_to(target)
    with atomic(tmp_path / "link") as partial:
        partial.write_text("new")
    assert target.read_text() == "mine"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_the_umask(tmp_path, umask):
    """safetensors alone gives 600."""
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~umask


def test_a_cached_folder_is_filled_once(tmp_path):
    folder = tmp_path / "new" / "folder"
    cached_folder(folder, lambda to: (to / "a").write_text("first"))
    assert cached_folder(folder, lambda to: (to / "a").write_text("second")) == folder
    assert (folder / "a").read_text() == "first"
    assert names(tmp_path / "new") == ["folder"]


def test_a_cached_folder_that_another_process_finished_is_taken(tmp_path):
    folder = tmp_path / "folder"

    def slow(to):
        cached_folder(folder, lambda to: (to / "a").write_text("faster"))
        (to / "a").write_text("slower")

    assert (cached_folder(folder, slow) / "a").read_text() == "faster"
    assert names(tmp_path) == ["folder"]


def test_a_cached_folder_that_fails_is_not_there(tmp_path):
    def fail(to):
        (to / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder(tmp_path / "folder", fail)
    assert names(tmp_path) == []


def test_the_cache_is_where_the_user_says(monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", "/elsewhere")
    assert cache_dir("prompts") == Path("/elsewhere/prompts")
    monkeypatch.delenv("DKDM_CACHE")
    assert cache_dir("prompts") == Path("~/.cache/dkdm/prompts").expanduser()


def test_a_template_without_its_values_is_an_error():
    with pytest.raises(UndefinedError, match="is undefined"):
        render("dkdm.shipping", "card.md.j2")
