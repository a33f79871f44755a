"""A denoiser's network as a file: it computes what PyTorch computes, at any batch, or says why not.

Each kind of network is traced and written; most of them only where slow tests run.
"""

import functools
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dkdm
import pipelines
from dkdm import Denoiser, Parameterization, UsageError, export_graph, load_teacher, rectified_flow
from dkdm.cli import main
from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional, restrict_classes
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.errors import DkdmError
from dkdm.models import LoadOptions, with_texts
from dkdm.networks.adm import AdmUNet
from dkdm.networks.lucidrains import LucidrainsUNet
from dkdm.shipping.graph import largest_difference
from dkdm.shipping.graph.formats import opened
from dkdm.shipping.graph.network import GraphNetwork, random_inputs
from dkdm.shipping.graph.tracing import trace
from factories import denoiser
from original_files.edm import KINDS
from original_files.lucidrains import PLAIN

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Denoisers of tiny pipelines by name, each saved and loaded once."""
    root, known = tmp_path_factory.mktemp("pipelines"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DKDM_CACHE", str(root / "cache"))

        def load(name, size=None):
            if name not in known:
                torch.manual_seed(0)
                getattr(pipelines, name)().save_pretrained(root / name)
                loaded = load_teacher(str(root / name), options=LoadOptions(sample_size=size))
                text = hasattr(loaded.conditioning, "texts")
                known[name] = with_texts(loaded, "a red cat", "blurry") if text else loaded
            return known[name]

        yield load


def process():
    return from_betas(beta_schedule("linear", 20))


ADM = {
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_head_channels": 16,
    "num_class_embeds": 4,
}
OWN = {name: kind for name, kind in KINDS.items() if name in ("ddpmpp", "ncsnpp", "adm", "edm2")}
OWN |= {"lucidrains": (LucidrainsUNet, PLAIN), "guided-diffusion": (AdmUNet, ADM)}


def own_network(name):
    """A denoiser with one of the networks that dkdm brings."""
    kind, sizes = OWN[name]
    torch.manual_seed(0)
    network = pipelines.seeded(kind(sample_size=16, **sizes))
    for weight in network.parameters():
        if not weight.any():  # EDM2's gains start at zero, and so would its output be
            nn.init.constant_(weight, 0.5)
    config = network.config
    learns = config.out_channels == 2 * config.in_channels
    own = Parameterization("epsilon", "learned_range" if learns else "fixed_small")
    classes = config.get("num_class_embeds")
    conditioning = ClassLabels(classes, null_class=classes - 1) if classes else Unconditional()
    return Denoiser(network, process(), own, (config.in_channels, 16, 16), conditioning)


SIZES = {"flux": (8, 8), "sana": (16, 16), "wan": (2, 2, 2)}
QUICK = ("sana", "wan")  # a UNet is written as ONNX, and its program with it
SLOW = (
    "edm",
    "class_conditional",
    "dit",
    "ldm_kl",
    "stable_diffusion",
    "sdxl",
    "pixart",
    "sd3",
    "flux",
)
SLOW += ("dance",)


def mostly_slow(quick, slow):
    """Parameters of a test, of which only the quick run by default."""
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.fixture
def difference(monkeypatch):
    """Of a written file and its network, at batches that the check of an export does not try."""
    known = functools.cache(opened)  # opening a program takes as long as writing it
    monkeypatch.setattr("dkdm.shipping.graph.opened", known)

    def largest(model, path, format):
        network = GraphNetwork(model, random_inputs(model, 3))
        return largest_difference(model, network, known(path, format), (1, 4, 7, 70))

    return largest


@pytest.mark.parametrize("name", mostly_slow(QUICK, SLOW))
def test_a_network_of_diffusers_as_an_exported_program(name, folders, difference, tmp_path):
    model = folders(name, SIZES.get(name))
    facts = export_graph(model, tmp_path / "x.pt2", format="torch-export")
    assert facts["check"]["passed"]
    assert facts["batch"] == {"min": 1, "max": None}
    assert difference(model, tmp_path / "x.pt2", "torch-export") <= 1e-5


@pytest.mark.parametrize(
    "name", mostly_slow(["guided-diffusion"], [k for k in OWN if k != "guided-diffusion"])
)
def test_a_network_of_our_own_as_an_exported_program(name, difference, tmp_path):
    model = own_network(name)
    facts = export_graph(model, tmp_path / "x.pt2", format="torch-export")
    channels = OWN[name][1].get("out_channels", model.sample_shape[0])
    assert facts["outputs"][0]["shape"] == ["batch", channels, 16, 16]
    assert difference(model, tmp_path / "x.pt2", "torch-export") <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_a_network_of_our_own_as_onnx(name, difference, tmp_path):
    model = own_network(name)
    inputs = random_inputs(model, 1)
    assert GraphNetwork(model, inputs)(**inputs).abs().max() > 0
    assert export_graph(model, tmp_path / "x.onnx")["check"]["passed"]
    assert difference(model, tmp_path / "x.onnx", "onnx") <= 1e-4


SLOW_ONNX = ("class_conditional", "dit", "ldm_kl", "edm", "stable_diffusion", "sdxl", "pixart")
SLOW_ONNX += ("sd3", "flux", "sana", "wan", "dance")


@pytest.mark.parametrize("name", mostly_slow(["sd3_of_one_layer"], SLOW_ONNX))
def test_a_network_of_diffusers_as_onnx(name, folders, difference, tmp_path):
    model = folders(name, SIZES.get(name))
    facts = export_graph(model, tmp_path / "x.onnx")
    assert facts["check"]["largest_difference"] <= 1e-4
    assert difference(model, tmp_path / "x.onnx", "onnx") <= 1e-4
    _check_interface(tmp_path / "x.onnx", facts)


def _check_interface(path, facts):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    for entry, described in zip(session.get_inputs(), facts["inputs"], strict=True):
        assert (entry.name, entry.shape) == (described["name"], described["shape"])
    output = session.get_outputs()[0]
    assert (output.name, output.shape) == ("output", facts["outputs"][0]["shape"])
    inside = json.loads(session.get_modelmeta().custom_metadata_map["dkdm"])
    assert inside["inputs"] == facts["inputs"]
    assert str(ROOT).encode() not in path.read_bytes()


def test_inputs_are_named_as_in_diffusers(folders):
    assert list(random_inputs(folders("sd3_of_one_layer"), 2)) == [
        "sample",
        "timestep",
        "encoder_hidden_states",
        "pooled_projections",
    ]
    fed = random_inputs(folders("class_conditional"), 5)
    assert (fed["class_labels"].dtype, fed["timestep"].dtype) == (torch.int64, torch.float32)


def test_null_conditions_are_compared_too():
    fed = random_inputs(denoiser(), 4)
    assert fed["class_labels"].tolist()[1::2] == [3, 3]


def test_the_networks_own_numbers_of_time_are_the_input(folders):
    model = folders("edm")
    times = random_inputs(model, 5)["timestep"]
    assert all(float(time) in model.process.network_time.float().tolist() for time in times)


def test_a_wrong_file_is_found_out(tmp_path, monkeypatch):
    """The file stays, the description says that it failed, and the command fails."""
    model = written_by_a_user(torch.relu)
    monkeypatch.setattr(
        "dkdm.shipping.graph.opened", lambda *_: lambda inputs: inputs["sample"] * 0.5
    )
    with pytest.raises(DkdmError, match="does not compute what the network does") as error:
        export_graph(model, tmp_path / "x.pt2", format="torch-export")
    assert error.value.exit_code == 1
    assert (tmp_path / "x.pt2").is_file()
    assert json.loads((tmp_path / "x.pt2.json").read_text())["check"]["passed"] is False


class Part(nn.Module):
    """A convolution, and what a user may have written around it."""

    def __init__(self, rule):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.rule = rule

    def forward(self, x):
        return self.rule(self.conv(x))


class User(nn.Module):
    """A network that somebody wrote."""

    def __init__(self, rule):
        super().__init__()
        self.blocks = nn.ModuleList([Part(lambda x: x), Part(rule)])

    def forward(self, x, time):
        for block in self.blocks:
            x = block(x)
        return x * (1 + time[:, None, None, None])


def written_by_a_user(rule):
    torch.manual_seed(0)
    own = Parameterization("sample")
    return Denoiser(User(rule).eval(), process(), own, (1, 4, 4), name="mine")


def decides(x):
    return x if x.mean() > 0 else -x


def counts(x):
    return x + torch.zeros(len(x), 1, 1, 1)


def bounded(x):
    return x if x.shape[0] < 10 else 2 * x


def unknown_to_onnx(x):
    return torch.special.bessel_j0(x)


def test_control_flow_by_values_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError) as error:
        export_graph(written_by_a_user(decides), tmp_path / "x.onnx")
    message = str(error.value)
    assert "blocks.1 (Part): its Python code decides by the value of a tensor" in message
    assert "test_graph.py" in message
    assert "return x if x.mean() > 0 else -x" in message
    assert "torch.where" in message
    assert not list(tmp_path.iterdir())


def test_a_fixed_batch_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"blocks\.1 \(Part\) works for one batch size only"):
        export_graph(written_by_a_user(counts), tmp_path / "x.pt2", format="torch-export")


def test_a_fixed_number_of_times_is_refused_by_name(tmp_path):
    """Each input has a batch of its own until they meet: it is noticed where it is fixed."""
    model = written_by_a_user(torch.relu)
    model.network.blocks[0] = Told()
    with pytest.raises(UsageError, match=r"blocks\.0 \(Told\) works for one batch size only"):
        export_graph(replace(model, call=tell), tmp_path / "x.pt2", format="torch-export")


class Told(nn.Module):
    """Is given the time alone."""

    def forward(self, time):
        return time + torch.zeros(len(time))


def tell(network, x, time, cond):
    del cond
    return network.blocks[1](x) * network.blocks[0](time)[:, None, None, None]


def test_a_bounded_batch_is_said(tmp_path):
    model = written_by_a_user(bounded)
    facts = export_graph(model, tmp_path / "x.pt2", format="torch-export")
    assert facts["batch"] == {"min": 1, "max": 9}


def finds_places(x):
    """A size that depends on values, which has a range of its own."""
    return x + 0 * (x > 0).nonzero()[:5].sum()


def test_a_size_that_depends_on_values_bounds_no_batch(tmp_path):
    model = written_by_a_user(finds_places)
    facts = export_graph(model, tmp_path / "x.pt2", format="torch-export")
    assert facts["batch"] == {"min": 1, "max": None}


def test_an_output_of_zeros_is_compared_too(tmp_path, monkeypatch):
    """A network that was not trained yet may give nothing else."""
    model = written_by_a_user(torch.zeros_like)
    facts = export_graph(model, tmp_path / "x.pt2", format="torch-export")
    assert facts["check"]["largest_difference"] == 0
    monkeypatch.setattr("dkdm.shipping.graph.opened", lambda *_: lambda inputs: inputs["sample"])
    with pytest.raises(DkdmError, match="does not compute what the network does"):
        export_graph(model, tmp_path / "y.pt2", format="torch-export")


def test_an_output_that_is_not_finite_does_not_pass(tmp_path):
    model = written_by_a_user(lambda x: x / 0)
    with pytest.raises(DkdmError, match="does not compute what the network does"):
        export_graph(model, tmp_path / "x.pt2", format="torch-export")


class Labelled(nn.Module):
    """A shift for each class."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(3, 1)

    def forward(self, x, time, class_labels):
        return x * time[:, None, None, None] + self.label(class_labels)[:, :, None, None]


def test_the_example_draws_the_classes_that_were_learnt(tmp_path, monkeypatch):
    model = Denoiser(Labelled().eval(), process(), "sample", (1, 4, 4), ClassLabels(3))
    learnt = restrict_classes(model.conditioning, (0, 2))
    facts = export_graph(replace(model, conditioning=learnt), tmp_path / "x.onnx")
    assert facts["classes"]["learnt"] == [0, 2]
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "x.onnx"), "--classes", "1"])
    with pytest.raises(SystemExit, match=r"--classes 1: expected some of \[0, 2\]"):
        example().main()
    drawn = []
    sampler = example()
    monkeypatch.setattr(sampler, "sample", lambda *given: drawn.append(given[3]) or given[2])
    words = ["x", str(tmp_path / "x.onnx"), "--num-samples", "4", "--output"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "x.png")])
    sampler.main()
    assert drawn[0].tolist() == [0, 2, 0, 2]


def test_an_operator_unknown_to_onnx_is_refused_by_name(tmp_path):
    model = written_by_a_user(unknown_to_onnx)
    with pytest.raises(UsageError, match=r"blocks\.1 \(Part\) uses aten\.special_bessel_j0"):
        export_graph(model, tmp_path / "x.onnx")


def test_lumina_is_refused(folders, tmp_path):
    """It takes the lengths of its prompts as Python numbers."""
    with pytest.raises(UsageError, match=r"Lumina2Transformer2DModel: .*SymInt.*len\(set\(seq_len"):
        export_graph(folders("lumina"), tmp_path / "x.pt2", format="torch-export")


def test_the_network_is_as_it_was_after_a_failure():
    model = written_by_a_user(decides)
    network = GraphNetwork(model, random_inputs(model, 3))
    with pytest.raises(UsageError):
        trace(network, random_inputs(model, 3), "mine")
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_half_precision(format, tmp_path):
    """Inputs and output stay float32."""
    model = written_by_a_user(torch.relu)
    model.network.half()
    suffix = "onnx" if format == "onnx" else "pt2"
    facts = export_graph(model, tmp_path / f"x.{suffix}", format=format)
    assert facts["precision"] == "float16"
    assert facts["check"]["passed"]
    assert {entry["dtype"] for entry in facts["inputs"]} == {"float32"}


def refused(model, path, **options):
    with pytest.raises(DkdmError) as error:
        export_graph(model, path, **options)
    return str(error.value)


def test_bad_input(tmp_path, monkeypatch):
    model = denoiser()
    program = {"format": "torch-export"}
    assert "give a name that ends in .onnx" in refused(model, tmp_path)
    assert "give a name that ends in .pt2" in refused(model, tmp_path / "x.json", **program)
    (tmp_path / "f.onnx").mkdir()
    assert "f.onnx is a folder: give the name of a file" in refused(model, tmp_path / "f.onnx")
    assert "has no opsets" in refused(model, tmp_path / "x.pt2", opset=18, **program)
    assert "use 18 to" in refused(model, tmp_path / "x.onnx", opset=9)
    (tmp_path / "x.onnx.json").write_text("{}")
    assert "x.onnx.json exists: give another name" in refused(model, tmp_path / "x.onnx")
    model.network.bfloat16()
    assert "bfloat16" in refused(model, tmp_path / "y.onnx")
    model.network.double()
    assert "is in torch.float64: load it in float32" in refused(model, tmp_path / "y.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'dkdm[onnx]'" in refused(denoiser(), tmp_path / "y.onnx")


def test_a_function_is_no_graph(tmp_path):
    model = Denoiser(lambda x, time: x, process(), Parameterization("sample"), (1, 4, 4))
    assert "torch.nn.Module" in refused(model, tmp_path / "x.pt2", format="torch-export")


class Wide(nn.Module):
    """A network with a megabyte in one tensor: small ones stay in the graph."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(512, 512)

    def forward(self, x, time):
        return self.linear(x) * (1 + time[:, None, None])


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr("dkdm.shipping.graph.formats.MAX_PROTOBUF", 2**20)
    model = Denoiser(Wide().eval(), process(), Parameterization("sample"), (1, 512))
    facts = export_graph(model, tmp_path / "x.onnx")
    assert facts["check"]["passed"]
    assert (tmp_path / "x.onnx").stat().st_size < 2**18
    assert (tmp_path / "x.onnx.data").stat().st_size >= 2**20
    (tmp_path / "x.onnx").unlink()
    (tmp_path / "x.onnx.json").unlink()
    assert "x.onnx.data exists" in refused(model, tmp_path / "x.onnx")


def example():
    """The module examples/onnx_sampler.py."""
    spec = importlib.util.spec_from_file_location("sampler", ROOT / "examples/onnx_sampler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sampled_alike(model, path, labels=None, guidance=1.0):
    """The largest difference of the example's samples and dkdm's own from the same noise."""
    sampler = example()
    evaluate, facts = sampler.load(path)
    noise = np.random.default_rng(0).standard_normal((3, *model.sample_shape), "f4")
    cond = {} if labels is None else {"class_labels": torch.tensor(labels)}
    ours = model.sample(lambda _: torch.from_numpy(noise), cond, 6, guidance_scale=guidance)
    given = None if labels is None else np.array(labels, "int64")
    theirs = sampler.sample(evaluate, facts, noise, given, 6, guidance)
    return np.abs(theirs - ours.numpy()).max()


@pytest.mark.parametrize("name", mostly_slow(["factories:teacher"], ["builtin:fashion"]))
def test_the_example_samples_a_teacher_alike(name, tmp_path, capsys, monkeypatch):
    """From the command line to a picture."""
    path = tmp_path / "teacher.onnx"
    assert main(["export", name, "--format", "onnx", "--output", str(path)]) == 0
    assert "differs from PyTorch by" in capsys.readouterr().out
    assert sampled_alike(load_teacher(name), path, [0, 1, 2], 1.5) <= 1e-3
    picture = tmp_path / "drawn.png"
    words = ["x", str(path), "--num-samples", "3", "--steps", "2", "--output", str(picture)]
    monkeypatch.setattr(sys, "argv", words)
    example().main()
    assert picture.stat().st_size > 100
    assert main(["export", name, "--output", str(path)]) == 2
    assert "exists" in capsys.readouterr().err


def flow_model():
    torch.manual_seed(0)
    own, flow = Parameterization("flow_prediction"), rectified_flow(30, shift=3.0)
    return Denoiser(User(torch.tanh).eval(), flow, own, (1, 4, 4), time="fraction")


def test_the_example_samples_a_flow_alike(tmp_path):
    model = flow_model()
    export_graph(model, tmp_path / "x.onnx")
    assert sampled_alike(model, tmp_path / "x.onnx") <= 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "edm"])
def test_the_examples_rules(prediction):
    """The algebra alone: a linear network, no file."""
    sampler = example()
    edm = prediction == "edm"
    known = dkdm.karras(20, 0.1, 10.0) if edm else process()
    own = Parameterization(prediction)
    model = Denoiser(lambda x, time: 0.3 * x, known, own, (1, 2, 2))
    from dkdm.shipping.graph.description import sampling_tables

    facts = {
        "prediction_type": prediction,
        "sigma_data": own.sigma_data if edm else None,
        "process": sampling_tables(model),
    }
    noise = np.random.default_rng(0).standard_normal((2, 1, 2, 2), "f4")
    ours = model.sample(lambda _: torch.from_numpy(noise), {}, 5)
    theirs = sampler.sample(
        lambda sample, timestep: np.float32(0.3) * sample, facts, noise, None, 5
    )
    np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-4, atol=1e-4)


def test_the_command_refuses_what_does_not_go_together(tmp_path, capsys):
    where = ["--output", str(tmp_path / "x.onnx")]
    assert main(["export", "builtin:fashion", "--dtype", "int8", *where]) == 2
    assert "use --format int8" in capsys.readouterr().err
    assert main(["export", "builtin:fashion", "--format", "int8", "--opset", "18", *where]) == 2
    assert "only --format onnx" in capsys.readouterr().err
