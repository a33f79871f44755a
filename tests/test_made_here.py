"""Whose code makes a custom network: the user's, or what this machine wrote; never a file's."""

import json
import os
import shutil
import sys
from dataclasses import asdict, replace

import pytest

import dkdm
import own_networks
from dkdm.cli import main
from dkdm.core.saving.checkpoint import save_network
from dkdm.errors import UsageError
from dkdm.models import LoadOptions, load_teacher, sketch_teacher
from dkdm.models import custom_network as own
from dkdm.models.custom_network import make, origin_of
from dkdm.reading import made_here
from dkdm.reading.plugins import import_object, is_spec, places_of
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import student_of
from factories import denoiser

MADE_BY = "own_networks:make"


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A folder that another machine wrote: there is no record of it here."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv(made_here.HOME, str(tmp_path / "elsewhere"))
        write_pipeline(tmp_path / "stranger", student_of(MADE_BY, denoiser()))
    monkeypatch.setenv(made_here.HOME, str(tmp_path / "here"))
    return tmp_path / "stranger"


WAYS = {
    "load_student": lambda folder, factory: dkdm.load_student(folder, factory=factory),
    "its network": lambda folder, factory: dkdm.load_student(folder / "unet", factory=factory),
    "teacher": lambda folder, factory: (
        load_teacher(str(folder), options=LoadOptions(factory=factory)).network
    ),
    "sketch": lambda folder, factory: (
        sketch_teacher(str(folder), LoadOptions(factory=factory)).network
    ),
    "student": lambda folder, factory: student_of(str(folder), denoiser(), factory=factory).network,
    "config": lambda folder, factory: (
        student_of(str(folder / "unet" / "config.json"), denoiser(), factory=factory).network
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_strangers_word_makes_nothing(stranger, way):
    said = f"its network was made by {MADE_BY}. If you trust that code, name it: --student-factory"
    with pytest.raises(UsageError, match=said):
        WAYS[way](stranger, None)
    with pytest.raises(UsageError, match=said):
        WAYS[way](stranger, "a:b,c:d")
    for named in (MADE_BY, f"factories:student, {MADE_BY}", own_networks.make):
        assert type(WAYS[way](stranger, named)) is own_networks.Small


def test_a_callable_keeps_its_name_only_if_it_can_be_imported(stranger):
    origin = origin_of(dkdm.load_student(stranger, factory=own_networks.make))
    assert origin.factory == MADE_BY
    nameless = dkdm.load_student(stranger, factory=lambda *given: own_networks.make(*given))
    assert origin_of(nameless).factory is None


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("no_such_module:make", "must be importable here .*network=..."),
        ("os:getcwd", "os:getcwd, which makes its network, raised TypeError"),
        ("factories:not_a_model", "made no nn.Module"),
        ("no_module", "write it as module:name"),
        ("os:path.join", "write it as module:name"),
        (7, "give module:name or a callable"),
    ],
)
def test_a_factory_that_the_user_names_wrongly(stranger, factory, said):
    with pytest.raises(UsageError, match=said):
        dkdm.load_student(stranger, factory=factory)


def test_arguments_of_a_file_are_given_to_networks_only(stranger, tmp_path):
    config = stranger / "unet" / "config.json"
    values = json.loads(config.read_text()) | {"arguments": {"command": f"touch {tmp_path}/x"}}
    config.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="is no class of a network"):
        dkdm.load_student(stranger, factory="os:system")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "command", ["sample", "inspect", pytest.param("students", marks=pytest.mark.slow), "plan"]
)
def test_commands_take_the_factory(stranger, tmp_path, capsys, command):
    more = {
        "sample": ["--num-samples", "1", "--steps", "1", "--output", str(tmp_path / "a.png")],
        "inspect": ["--num-samples", "2", "--steps", "1", "--json"],
        "students": ["--no-measure"],
        "plan": ["unet-tiny"],
    }[command]
    model = ["--teacher", str(stranger)] if command == "students" else [str(stranger)]
    assert main([command, *model, *more]) == 2
    assert f"name it: --student-factory {MADE_BY}" in capsys.readouterr().err
    assert main([command, *model, *more, "--student-factory", MADE_BY]) in (0, 1)  # judged, opened


# --- records -------------------------------------------------------------------------------------


def test_what_this_machine_wrote_needs_no_word_wherever_it_lies(stranger, tmp_path):
    write_pipeline(tmp_path / "mine", student_of(MADE_BY, denoiser()))
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    for folder in (tmp_path / "mine", tmp_path / "copy", stranger):  # the same words as its own
        assert type(dkdm.load_student(folder)) is own_networks.Small


@pytest.mark.parametrize(
    "changed",
    [{"factory": "own_networks:Small"}, {"out_channels": 2}, {"arguments": {}}, {"network": "N"}],
)
def test_a_config_with_another_word_has_no_record(tmp_path, monkeypatch, changed):
    monkeypatch.setenv(made_here.HOME, str(tmp_path / "here"))
    write_pipeline(tmp_path / "mine", student_of(MADE_BY, denoiser()))
    config = tmp_path / "mine" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(UsageError, match="If you trust that code, name it"):
        dkdm.load_student(tmp_path / "mine")


@pytest.fixture
def forgotten():
    """Modules that a test imports are forgotten after it, and the current directory is not kept."""
    before, path = set(sys.modules), list(sys.meta_path)
    yield
    sys.meta_path[:] = path
    for name in set(sys.modules) - before:
        del sys.modules[name]


NET = "import own_networks\ndef make(*given):\n    return own_networks.make(*given)\n"


@pytest.mark.usefixtures("forgotten")
def test_a_record_is_of_one_file_and_not_of_another_with_its_name(tmp_path, monkeypatch):
    for name in ("project", "download"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "nets_of_two.py").write_text(NET)
    monkeypatch.setenv(made_here.HOME, str(tmp_path / "here"))
    monkeypatch.chdir(tmp_path / "project")
    write_pipeline(tmp_path / "mine", student_of("nets_of_two:make", denoiser()))
    del sys.modules["nets_of_two"]
    monkeypatch.chdir(tmp_path / "download")
    (tmp_path / "download" / "nets_of_two.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UsageError, match="name it: --student-factory nets_of_two:make"):
        dkdm.load_student(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "project")
    assert dkdm.load_student(tmp_path / "mine")


def test_a_home_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv(made_here.HOME, str(tmp_path / "file" / "inside"))
    network = student_of(MADE_BY, denoiser()).network
    for name in ("one", "two"):
        save_network(network, tmp_path / name)
    assert capsys.readouterr().err.count("no record of this run can be kept") == 1


@pytest.mark.parametrize(
    ("values", "home"),
    [
        ({made_here.HOME: "/a", "XDG_DATA_HOME": "/b"}, "/a"),
        ({made_here.HOME: "", "XDG_DATA_HOME": "/b"}, "/b/dkdm"),
        ({made_here.HOME: "", "XDG_DATA_HOME": "", "HOME": "/c"}, "/c/.local/share/dkdm"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_where_records_lie(monkeypatch, values, home):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert str(made_here.data_home()) == home


def test_a_record_that_is_damaged_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv(made_here.HOME, str(tmp_path))
    origin = origin_of(student_of(MADE_BY, denoiser()).network)
    made_here.remember(asdict(origin), "own_networks")
    assert made_here.was_made_here(asdict(origin), "own_networks")
    [record] = (tmp_path / "made-here").iterdir()
    for damaged in ("", "null", "7", "[", "{}"):
        record.write_text(damaged)
        assert not made_here.was_made_here(asdict(origin), "own_networks")


def test_an_object_alone_is_still_made_by_nobody_else(tmp_path):
    origin = replace(origin_of(student_of(MADE_BY, denoiser()).network), factory=None)
    with pytest.raises(UsageError, match="was given as an object"):
        make(origin, tmp_path)
    assert type(make(origin, tmp_path, MADE_BY)) is own_networks.Small


# --- a run's config file -------------------------------------------------------------------------


def test_a_config_file_names_code_only_if_the_user_does_or_did(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(made_here.HOME, str(tmp_path / "here"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"teacher": "factories:teacher", "student": "unet-tiny"}))
    args = ["distill", "--config", str(config), "--dry-run"]
    assert main(args) == 2
    assert "names code: --teacher factories:teacher" in capsys.readouterr().err
    assert main([*args, "--teacher", "factories:teacher"]) == 0
    made_here.remember({"spec": "factories:teacher"}, "factories")
    assert main(args) == 0
    config.write_text(json.dumps({"student": "os:system"}))
    assert main(args) == 2
    config.write_text(json.dumps({"student": "unet-tiny", "student_factory": "os:system"}))
    assert main(args) == 2


@pytest.mark.parametrize(
    ("said", "way"),
    [
        ({"output_dir": "/somewhere/else"}, "--output-dir"),
        ({"output_dir": "../beside"}, "--output-dir"),
        ({"push_to_hub": True, "hub_model_id": "a/b"}, "--push-to-hub"),
    ],
)
def test_a_config_file_decides_no_place_and_no_upload(tmp_path, monkeypatch, capsys, said, way):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"student": "unet-tiny", **said}))
    args = ["distill", "--config", "config.json", "--dry-run"]
    assert main(args) == 2
    assert f"say {way} on the command line too" in capsys.readouterr().err
    given = [way] if way == "--push-to-hub" else [way, "out"]
    assert main([*args, *given]) == 0


def test_a_run_is_resumed_from_its_own_config_wherever_it_lies(tmp_path, monkeypatch):
    config = tmp_path / "run" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"student": "unet-tiny", "output_dir": str(config.parent)}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["distill", "--config", str(config), "--dry-run"]) == 0


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner here")
def test_a_record_of_another_user_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv(made_here.HOME, str(tmp_path))
    facts = {"spec": "factories:teacher"}
    made_here.remember(facts, "factories")
    assert made_here.was_made_here(facts, "factories")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not made_here.was_made_here(facts, "factories")


@pytest.mark.parametrize("other", [1, 1.0, "1", [1], None])
def test_arguments_of_another_type_are_another_record(other):
    facts = {"factory": "m:f", "arguments": {"bias": True}}
    assert made_here._record(facts) != made_here._record({**facts, "arguments": {"bias": other}})


@pytest.mark.parametrize("name", ["<b>", "a\nb", "", "x()", 7])
def test_the_name_of_a_network_is_a_name(tmp_path, name):
    config = {"network": name, "factory": "m:f", "sample_shape": [1, 8, 8], "out_channels": 1}
    with pytest.raises(UsageError, match="give a class's name|network is a text"):
        own.read_origin(config, tmp_path)


# --- where code is found -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["a:b", "a.b.c:D", "_a:b2", "é:ü"])
def test_names_of_code(spec):
    assert is_spec(spec)


@pytest.mark.parametrize(
    "spec",
    ["a", "a:", ":b", "a:b:c", "a b:c", "a..b:c", "a:b()", ".a:b", "a/b:c", "a:b\n", 7, None],
)
def test_what_names_no_code(spec):
    assert not is_spec(spec)


def test_places_are_found_without_importing(tmp_path, monkeypatch):
    inner = tmp_path / "pack_of_places" / "inner"
    inner.mkdir(parents=True)
    (inner / "nets.py").write_text("raise SystemExit('was run')")
    (inner.parent / "__init__.py").write_text("raise SystemExit('was run')")
    monkeypatch.chdir(tmp_path)
    assert places_of("pack_of_places.inner.nets")[-1] == inner / "nets.py"
    assert inner.parent / "__init__.py" in places_of("pack_of_places.inner.nets")
    assert places_of("no_such_module") == []
    assert places_of("pack_of_places.absent") == []


@pytest.mark.usefixtures("forgotten")
def test_the_current_directory_is_for_what_the_user_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cgi.py").write_text("import beside_cgi\nnumber = beside_cgi.number\n")
    (tmp_path / "beside_cgi.py").write_text("number = 7\n")
    (tmp_path / "this.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ImportError):
        __import__("beside_cgi")
    assert import_object("cgi:number") == 7  # also one that is installed, for it was named
    assert os.fspath(tmp_path) not in sys.path
    with pytest.raises(UsageError, match="cannot import beside_cgi:absent"):
        import_object("beside_cgi:absent")
