"""A conditioning of a user's own: tried, distilled, resumed, shipped, and given as a file."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import dkdm
from dkdm.cli import main
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.inputs import GivenRows, from_index, to_index, with_rows
from dkdm.core.denoisers.kinds import kind_of
from dkdm.runs.models import ready_teacher
from dkdm.students import student_of

PROCESS = dkdm.from_betas(torch.linspace(1e-4, 0.02, 50))
QUICK = {
    "train_batch_size": 4,
    "pool_size": 8,
    "fill_steps": 2,
    "lr_scheduler": "constant",
    "validation_sampling_steps": 2,
    "evaluation_samples": 2,
}


class Robot:
    """A state of four numbers, and which of three tasks; 3 and zeros are no condition."""

    def draw(self, count, generator, dropout=0.0):
        state = torch.randn(count, 4, generator=generator)
        task = torch.randint(3, (count,), generator=generator)
        gone = torch.rand(count, generator=generator) < dropout
        return {"state": state.masked_fill(gone[:, None], 0.0), "task": task.masked_fill(gone, 3)}

    def null(self, count):
        return {"state": torch.zeros(count, 4), "task": torch.full((count,), 3)}

    def in_turns(self, count):
        state = torch.linspace(-1, 1, count)[:, None].repeat(1, 4)
        return {"state": state, "task": torch.arange(count) % 3}

    def embed(self, cond):
        return cond


class Policy(nn.Module):
    """A network of 1x4x4 samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16 + 4 + 4, 16)

    def forward(self, x, t, state, task):
        task = nn.functional.one_hot(task, 4).to(x)
        out = self.layer(torch.cat([x.flatten(1), state.to(x), task], dim=1))
        return out.reshape(x.shape) + 0 * t.reshape(-1, 1, 1, 1)


def teacher(conditioning=None, seed=0):
    torch.manual_seed(seed)
    own = conditioning or Robot()
    return dkdm.Denoiser(Policy().eval(), PROCESS, "epsilon", (1, 4, 4), conditioning=own)


def changed(**methods):
    return type("Robot", (Robot,), methods)()


def rows(count=3):
    return {"state": torch.randn(count, 4), "task": torch.arange(count) % 3}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"draw": lambda *_: [1]}, r"Robot.draw returned \[1\]: it must return a dict of tensors"),
        ({"draw": lambda *_: {"state": 3}}, "Robot.draw returned int for 'state'"),
        ({"draw": lambda s, n, g, d: {"state": torch.randn(n, 4)}}, "draw from `generator` alone"),
        ({"draw": lambda s, n, g: {}}, r"Robot.draw\(3\) raised TypeError"),
        ({"draw": lambda s, n, g, d: {"a b": torch.zeros(n)}}, "the key 'a b': use another name"),
        ({"draw": lambda s, n, g, d: Robot.draw(s, n, g)}, "with probability `dropout`"),
        ({"absent": lambda s, c: [True]}, r"Robot.absent returned \[True\]: return a bool tensor"),
        ({"null": lambda s, n: {"state": torch.zeros(n, 4)}}, "Robot.null returned .*same names"),
        ({"null": lambda s, n: 1 / 0}, "raise dkdm.UsageError if there is no null condition"),
        ({"in_turns": lambda s, n: s.null(n + 1)}, r"in_turns returned \(4, 4\) for 'state'"),
        ({"embed": lambda s, c: None}, "Robot.embed returned None"),
    ],
)
def test_wrong_methods_are_refused_at_the_start(tmp_path, methods, message):
    own = teacher(changed(**methods))
    for start in (
        own.check,
        lambda: dkdm.distill(own, Policy(), dkdm.DistillConfig(output_dir=tmp_path / "run")),
    ):
        with pytest.raises(dkdm.UsageError, match=message):
            start()
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_absent_are_evaluated_without_any_condition():
    """`absent` is honoured: such a row is that of a network which is fed nothing."""

    def network(x, t, state=None, task=None):
        del t, task
        return x if state is None else x + state.sum(1).reshape(-1, 1, 1, 1)

    own = changed(absent=lambda self, cond: cond["task"] == 3)
    model = dkdm.Denoiser(network, PROCESS, "epsilon", (1, 4, 4), conditioning=own)
    x, t = torch.randn(3, 1, 4, 4), torch.tensor([1, 20, 40])
    cond = {"state": torch.ones(3, 4), "task": torch.tensor([0, 3, 1])}
    expected = x + torch.tensor([4.0, 0.0, 4.0]).reshape(-1, 1, 1, 1)
    assert torch.equal(model.predict(Batch(x, t, cond, t)).output, expected)
    model.check()


def plain_factory(sample_shape, out_channels, conditioning):
    del sample_shape, out_channels, conditioning
    return Policy()


def curious_factory(sample_shape, out_channels, conditioning):
    assert conditioning.draw(1, torch.Generator())["task"] is not None
    return plain_factory(sample_shape, out_channels, conditioning)


def test_a_factory_that_asks_a_conditioning_of_ones_own_is_refused_at_the_start():
    assert isinstance(student_of("test_inputs:plain_factory", teacher()).network, Policy)
    with pytest.raises(
        dkdm.UsageError, match="does not hold Robot.*raised KeyError.*without reading"
    ):
        student_of("test_inputs:curious_factory", teacher())


def ready(model):
    run = dkdm.DistillConfig()
    return ready_teacher(model, run.conditions, run.guidance, run.evaluation)


def test_a_run_as_teacher_asks_for_its_conditioning():
    rows = GivenRows(kind_of(Robot()).fed())
    with pytest.raises(dkdm.UsageError, match="--teacher module:function.*conditioning=") as caught:
        ready(teacher(rows))
    assert "--cond" not in str(caught.value)
    ready(teacher())


def test_a_missing_method_is_named():
    class Half:
        draw = Robot.draw

    with pytest.raises(dkdm.UsageError, match=r"Half has no null\(count\), in_turns\(count\), emb"):
        teacher(Half())


def test_a_preset_that_does_not_take_it_is_refused(tmp_path):
    config = dkdm.DistillConfig(output_dir=tmp_path / "run", **QUICK)
    with pytest.raises(dkdm.UsageError, match="'(state|task)'"):
        dkdm.distill(teacher(), "dit-xs", config)


def test_distilled_resumed_sampled_and_shipped(tmp_path, capsys):
    """The same weights with an interruption as without; the folder samples in plain diffusers."""
    options = {"condition_dropout": 0.3, "checkpointing_steps": 2, "validation_steps": 0, **QUICK}
    options["evaluation_samples"] = 0

    def run(name, steps, **further):
        folder = tmp_path / name
        config = dkdm.DistillConfig(output_dir=folder, max_train_steps=steps, **(options | further))
        torch.manual_seed(1)
        return dkdm.distill(teacher(), Policy(), config)

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume_from_checkpoint="latest")
    pair = [dkdm.load_student(folder, network=Policy()) for folder in (whole, parts)]
    for one, other in zip(*(network.parameters() for network in pair), strict=True):
        assert torch.equal(one, other)
    capsys.readouterr()

    given = rows()
    save_file(
        given | {"null.state": torch.zeros(1, 4), "null.task": torch.tensor([3])},
        whole / "c.safetensors",
    )
    np.savez(whole / "c.npz", **{key: value.numpy() for key, value in given.items()})
    sample = ["sample", str(whole), "--steps", "2", "--num-samples", "3", "--output"]
    assert main([*sample, str(tmp_path / "a.safetensors"), "--cond", str(whole / "c.npz")]) == 0
    drawn = load_file(tmp_path / "a.safetensors")
    assert torch.equal(drawn["state"], given["state"])
    guided = ["--cond", str(whole / "c.safetensors"), "--guidance-scale", "2"]
    assert main([*sample, str(tmp_path / "b.png"), *guided]) == 0

    assert main([*sample, str(tmp_path / "c.png")]) == 2
    assert (
        "this model is fed state (4,) float32, task () int64: give rows" in capsys.readouterr().err
    )
    without_null = ["--cond", str(whole / "c.npz"), "--guidance-scale", "2"]
    assert main([*sample, str(tmp_path / "d.png"), *without_null]) == 2
    assert "add null.state, null.task of one row" in capsys.readouterr().err


def test_the_shipped_pipeline_feeds_the_rows(tmp_path):
    """One DDIM step of the folder equals that of the network itself with the same rows."""
    folder = dkdm.distill(
        teacher(),
        Policy(),
        dkdm.DistillConfig(output_dir=tmp_path / "run", max_train_steps=2, **QUICK),
    )
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    pipeline.unet.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True
    )
    given = rows()
    images = pipeline(cond=given, num_inference_steps=1, output_type="latent").images
    assert images.shape == (3, 1, 4, 4)
    assert torch.equal(seen[0]["state"], given["state"])
    assert torch.equal(seen[0]["task"], given["task"])
    null = {"state": torch.zeros(1, 4), "task": torch.tensor([3])}
    pipeline(cond=given, negative_cond=null, guidance_scale=2.0, num_inference_steps=1)
    assert seen[2]["task"].tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match="give a dict of tensors"):
        pipeline(cond={"state": given["state"]}, num_inference_steps=1)


def test_the_description_of_rows_comes_back():
    shapes = kind_of(Robot()).fed()
    assert from_index(to_index(shapes), "here").shapes == shapes


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"a b": {"shape": [1], "dtype": "float32"}},
        {"a": {"shape": [-1], "dtype": "float32"}},
        {"a": {"shape": [1], "dtype": "object"}},
        {"a": {"shape": "1", "dtype": "int64"}},
        {"a": {"dtype": "int64"}},
        {"import": {"shape": [1], "dtype": "int64"}},
    ],
)
def test_a_wrong_description_is_refused(entry):
    with pytest.raises(dkdm.UsageError, match="^here: _conditions"):
        from_index(entry, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.zeros(3, 5)}, r"state has shape \(3, 5\): give \(N, 4\)"),
        ({"task": torch.zeros(2, dtype=torch.int64)}, "give as many rows under each name"),
        ({"speed": torch.zeros(3)}, "the model is not fed 'speed': give state, task"),
        ({"null.state": torch.zeros(1, 4)}, "has no null.task: add it"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, change, message):
    path = tmp_path / "rows.safetensors"
    save_file(rows() | change, path)
    with pytest.raises(dkdm.UsageError, match=message):
        with_rows(GivenRows(kind_of(Robot()).fed()), path)


def test_files_that_hold_no_rows_are_refused(tmp_path):
    given = GivenRows(kind_of(Robot()).fed())
    np.savez(tmp_path / "a.npz", state=np.array([object()], dtype=object))
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    (tmp_path / "c.npz").write_bytes(b"nothing")
    for name in ("a.npz", "b.safetensors", "c.npz", "d.npz", "e.pt"):
        with pytest.raises(dkdm.UsageError, match="--cond .*(cannot be read|give a .safetensors)"):
            with_rows(given, tmp_path / name)
    with pytest.raises(dkdm.UsageError, match="no custom conditions: remove --cond"):
        with_rows(dkdm.Unconditional(), tmp_path / "a.npz")
