"""Files of others are read as data: wrong types, ranges and shapes are one line each."""

import json
import os

import pytest

from dkdm import UsageError
from dkdm.reading.fields import Fields, depth, is_name, read_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "give a JSON object"),
        ("[1]", "give a JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' * 70 + "1" + "}" * 70, "deeper than 64"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_json(path, "a config")


def test_what_is_no_small_text_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="x.json is missing"):
        read_json(tmp_path / "x.json", "a config")
    with pytest.raises(UsageError, match="not a file"):
        read_json(tmp_path, "a config")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a file"):
        read_json(tmp_path / "pipe", "a config")
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UsageError, match="cannot be read"):
        read_json(tmp_path / "binary", "a config")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(33 * 2**20)
    with pytest.raises(UsageError, match="too many"):
        read_json(tmp_path / "large", "a config")


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (lambda f: f.number("x", low=0, high=1), 2),
        (lambda f: f.number("x"), True),
        (lambda f: f.number("x"), float("nan")),
        (lambda f: f.number("x"), 10**400),
        (lambda f: f.number("x", 1.0), None),
        (lambda f: f.whole("x"), 1.0),
        (lambda f: f.whole("x", high=10), 11),
        (lambda f: f.flag("x"), 1),
        (lambda f: f.text("x"), ["a"]),
        (lambda f: f.text("x", among=("a", "b")), "c"),
        (lambda f: f.numbers("x"), []),
        (lambda f: f.numbers("x"), "12"),
        (lambda f: f.numbers("x"), [1, "2"]),
        (lambda f: f.inner("x"), []),
    ],
)
def test_wrong_entries_name_file_entry_and_value(read, value):
    with pytest.raises(UsageError, match=r"^a/config.json: x is .*: give ") as caught:
        read(Fields({"x": value}, "a/config.json"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_right_entries_are_read_and_absent_ones_take_the_default():
    fields = Fields(json.loads('{"n": 2, "l": [1, 2.5], "o": {"a": true}, "z": null}'), "c")
    assert fields.number("n") == 2.0 and fields.whole("n") == 2
    assert fields.numbers("l") == (1.0, 2.5)
    assert fields.inner("o").flag("a") is True
    assert fields.number("z", None) is None and fields.text("absent", "d") == "d"
    with pytest.raises(UsageError, match="absent is missing: give a number from 0 to 1"):
        fields.number("absent", low=0, high=1)


def test_depth_and_names():
    assert [depth(v) for v in (1, [], {"a": [1]}, [[[]], 1])] == [0, 1, 2, 3]
    assert is_name("text_encoder_2")
    wrong = ("", "_private", "a.b", "..", "a/b", "class", "b=open('x')", "é", 3, "a" * 61)
    assert not any(is_name(name) for name in wrong)
