"""Foreign checkpoints: every layout gives the same weights, and nothing in a file is ever run."""

import argparse
import os
import pickle
import sys
import types
import typing
from collections import OrderedDict, defaultdict
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dkdm.errors import DkdmError, UsageError
from dkdm.models.formats.state_dict import _unpickle, read_weights, without_prefix

PLAIN = {"conv.weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)}
AVERAGED = {key: value + 1 for key, value in PLAIN.items()}


def assert_weights(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key])


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


TRAINERS = {
    "pytorch_lightning": types.ModuleType("pytorch_lightning"),
    "pytorch_lightning.callbacks": types.ModuleType("pytorch_lightning.callbacks"),
    "omegaconf": types.ModuleType("omegaconf"),
}


class Remembering:
    """Keeps what it is made with, as the real classes do."""

    def __init__(self, value):
        self.value = value


def of_trainer(module, name, made):
    """The same class or function, as if a trainer's module had defined it."""
    made.__module__, made.__name__, made.__qualname__ = module, name, name
    setattr(TRAINERS[module], name, made)
    return made


CALLBACK = of_trainer("pytorch_lightning.callbacks", "Checkpoint", type("_", (Remembering,), {}))
CONFIG = of_trainer("omegaconf", "DictConfig", type("_", (Remembering,), {}))


def save_where_trainers_are(content, file):
    """Save; the trainers' modules can be imported meanwhile, and not when the file is read."""
    with patch.dict(sys.modules, TRAINERS):
        torch.save(content, file)


# --- layouts -------------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    save_file(PLAIN, tmp_path / "model.safetensors")
    found = read_weights(tmp_path / "model.safetensors")
    assert_weights(found.tensors, PLAIN)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
def test_a_bare_state_dict(tmp_path, suffix, zipped):
    file = tmp_path / f"model.{suffix}"
    torch.save(OrderedDict(PLAIN), file, _use_new_zipfile_serialization=zipped)
    assert_weights(read_weights(file).tensors, PLAIN)


@pytest.mark.parametrize("name", ["state_dict", "model", "net", "network", "params"])
def test_a_state_dict_under_a_name_with_other_things_beside_it(tmp_path, name):
    file = tmp_path / "model.pt"
    config = {"width": 8, "betas": [0.1, 0.2]}
    torch.save({name: PLAIN, "config": config, "epoch": 3}, file)
    found = read_weights(file)
    assert_weights(found.tensors, PLAIN)


@pytest.mark.parametrize("name", ["ema", "model_ema", "ema_model"])
def test_averaged_weights_come_first_where_they_are_asked_for(tmp_path, name):
    file = tmp_path / "model.pt"
    torch.save({"model": PLAIN, name: AVERAGED, "opt": {"lr": 0.1}}, file)
    assert_weights(read_weights(file).tensors, AVERAGED)
    assert_weights(read_weights(file, ema=False).tensors, PLAIN)


NESTED = {
    "ema, state_dict": {"model": PLAIN, "ema": {"state_dict": AVERAGED, "decay": 0.99}},
    "ema_state_dict": {"model_state_dict": PLAIN, "ema_state_dict": AVERAGED},
    "network, ema": {"network": {"state_dict": PLAIN}, "network_ema": 3, "ema": AVERAGED},
    "shadow": {"model": PLAIN, "ema": {"shadow": AVERAGED, "mu": 0.99}},
    "shadow_params": {"model": PLAIN, "ema": {"shadow_params": list(AVERAGED.values())}},
    "callback of lightning": {
        "state_dict": PLAIN,
        "callbacks": {"EMA{}": {"decay": 0.999, "ema_state_dict": AVERAGED}, "Timer": 3},
    },
    "ema_params": {"state_dict": PLAIN, "ema_params": [list(AVERAGED.values())]},
    "tuple": {"state_dict": PLAIN, "ema_params": tuple(AVERAGED.values())},
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_and_listed_averages(tmp_path, name):
    torch.save(NESTED[name], tmp_path / "model.pt")
    assert_weights(read_weights(tmp_path / "model.pt").tensors, AVERAGED)
    assert_weights(read_weights(tmp_path / "model.pt", ema=False).tensors, PLAIN)


def test_a_list_of_averages_without_buffers(tmp_path):
    """`steps` is none of the parameters that were averaged."""
    content = {"model": PLAIN, "ema": {"shadow_params": [AVERAGED["conv.weight"]]}}
    torch.save(content, tmp_path / "model.pt")
    expected = {"conv.weight": AVERAGED["conv.weight"], "steps": PLAIN["steps"]}
    assert_weights(read_weights(tmp_path / "model.pt").tensors, expected)


@pytest.mark.parametrize(
    "averages", [[torch.ones(3, 2)], [torch.ones(2, 3)] * 3, [torch.ones(()), torch.ones(2, 3)]]
)
def test_a_list_of_averages_of_other_shapes_is_refused(tmp_path, averages):
    torch.save({"model": PLAIN, "ema": {"shadow_params": averages}}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match="a list of . tensors without names"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_forward_module.module.", "module.module."],
)
def test_wrappers_are_taken_off(tmp_path, prefix):
    wrapped = {f"{prefix}{key}": value for key, value in PLAIN.items()}
    averaged = wrapped | {"n_averaged": torch.tensor(5)}
    for tensors in (wrapped, averaged):
        torch.save(tensors, tmp_path / "model.pt")
        assert_weights(read_weights(tmp_path / "model.pt").tensors, PLAIN)
    save_file(wrapped, tmp_path / "model.safetensors")
    assert_weights(read_weights(tmp_path / "model.safetensors").tensors, PLAIN)


def test_an_average_without_tensors_is_passed_over(tmp_path):
    torch.save({"ema": {"decay": 0.999}, "model": PLAIN}, tmp_path / "model.pt")
    assert_weights(read_weights(tmp_path / "model.pt").tensors, PLAIN)


def test_what_is_no_tensor_is_no_weight(tmp_path):
    torch.save({**PLAIN, "version": "1.0"}, tmp_path / "model.pt")
    found = read_weights(tmp_path / "model.pt")
    assert_weights(found.tensors, PLAIN)


def test_prefixes_are_taken_off():
    tensors = {"model.diffusion_model.a": PLAIN["steps"], "model_ema.a": PLAIN["steps"]}
    assert without_prefix(tensors, "model.diffusion_model.").keys() == {"a"}


# --- what trainers leave in a file ---------------------------------------------------------------


def test_objects_of_trainers_become_inert(tmp_path):
    content = {
        "state_dict": PLAIN,
        "callbacks": {CALLBACK: {"best": 0.5}, "last": CALLBACK(1)},
        "hyper_parameters": CONFIG({"width": 8, "kinds": (list, typing.Any)}),
        "counts": defaultdict(int, {"a": 2}),
        "args": argparse.Namespace(lr=0.1),
    }
    file = tmp_path / "last.ckpt"
    save_where_trainers_are(content, file)
    assert_weights(read_weights(file).tensors, PLAIN)
    found = _unpickle(file)
    assert found["counts"] == {"a": 2}
    inert = found["hyper_parameters"]
    assert type(inert).__name__ == "DictConfig"
    assert type(inert) is not CONFIG
    assert not hasattr(inert, "value")
    assert not isinstance(found["args"], argparse.Namespace)


def test_a_call_of_a_trainers_function_is_not_made(tmp_path):
    called = []
    load = of_trainer("omegaconf", "load", lambda *arguments: called.append(arguments))
    reduced = type("Reduced", (), {"__reduce__": lambda _: (load, ("a", "b"))})
    save_where_trainers_are({"model": PLAIN, "x": reduced()}, tmp_path / "a.ckpt")
    assert_weights(read_weights(tmp_path / "a.ckpt").tensors, PLAIN)
    assert called == []


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_code_is_refused_by_name_and_not_run(tmp_path, zipped):
    target, file = tmp_path / "owned", tmp_path / "model.pt"
    content = {"state_dict": PLAIN, "x": Payload(target)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=r"holds more than weights \((posix|nt)\.system\)") as told:
        read_weights(file)
    assert "torch.save(torch.load(path, weights_only=False)['state_dict']" in str(told.value)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_plain_pickle_is_no_checkpoint(tmp_path, protocol):
    target, file = tmp_path / "owned", tmp_path / "model.pt"
    file.write_bytes(pickle.dumps(Payload(target), protocol))
    with pytest.raises(DkdmError):
        read_weights(file)
    assert not target.exists()


@pytest.mark.parametrize("name", ["edm-cifar10", "a\"); print('ran'); (\"", "it's"])
def test_a_pkl_is_refused_with_a_remedy_that_works(tmp_path, monkeypatch, capsys, name):
    file = tmp_path / f"{name}.pkl"
    network = torch.nn.Linear(2, 3)
    file.write_bytes(pickle.dumps({"ema": network}))
    with pytest.raises(UsageError, match=r"a \.pkl is a program that runs when it is read") as told:
        read_weights(file)
    remedy = [line.strip() for line in str(told.value).splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    with pytest.warns(ResourceWarning):
        exec("\n".join(remedy), {"pickle": pickle, "torch": torch})
    assert_weights(read_weights(tmp_path / f"{name}.pt").tensors, network.state_dict())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "before torch 1.6"])
def test_a_file_cut_short_is_named(tmp_path, kind, share):
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "safetensors":
        save_file(PLAIN, file)
    else:
        torch.save(PLAIN, file, _use_new_zipfile_serialization=kind == "zip")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DkdmError, match=r"model\.(pt|safetensors): cannot be read as"):
        read_weights(file)


def test_torchs_advice_to_run_code_is_left_out(tmp_path):
    (tmp_path / "model.pt").write_text("import torch\n")
    with pytest.raises(DkdmError, match=r"cannot be read as .* \(\w+Error: .+\)$") as error:
        read_weights(tmp_path / "model.pt")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "config": {"width": 8}}, r"no weights in it \(found epoch, config\)"),
        ({}, r"no weights in it \(found nothing\)"),
        ([PLAIN], "not a state dict but list"),
        (PLAIN["steps"], "not a state dict but Tensor"),
    ],
)
def test_a_file_without_weights_says_what_it_has(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(DkdmError, match=message):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.pkl"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UsageError, match=rf"{name}: no such file"):
        read_weights(tmp_path / name)


def test_arrays_are_refused(tmp_path):
    torch.save({"model": PLAIN, "mean": np.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match=r"holds more than weights \(numpy\."):
        read_weights(tmp_path / "model.pt")
