"""Plain mistakes of a Python user are refused with the name, the value and the remedy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dkdm
from dkdm.checks.inspection import check_denoising
from dkdm.config import EvaluationOptions, GuidanceOptions, TeacherConditions
from dkdm.runs.models import ready_teacher
from factories import denoiser

BETAS = torch.linspace(1e-4, 0.02, 1000)
PROCESS = dkdm.from_betas(BETAS)
BAD = {
    "none": None,
    "word": "x",
    "nan": float("nan"),
    "array": np.zeros(3),
    "matrix": torch.zeros(2, 2),
    "class": nn.Conv2d,
    "object": object(),
    "bytes": b"x",
    "negative": -1,
    "dict": {"a": 1},
}


def as_it_is(x, t):
    del t
    return x


def model(**changed):
    arguments = {
        "network": as_it_is,
        "process": PROCESS,
        "parameterization": "epsilon",
        "sample_shape": (3, 8, 8),
    }
    return dkdm.Denoiser(**(arguments | changed))


@pytest.mark.parametrize(
    "betas", [BETAS.numpy(), BETAS.tolist(), BETAS.to(torch.float64)], ids=["numpy", "list", "f64"]
)
def test_betas_of_any_kind_give_the_same_process(betas):
    process = dkdm.from_betas(betas)
    assert torch.equal(process.alpha, PROCESS.alpha)
    assert process.scheduler == PROCESS.scheduler


REFUSED = {
    "alphas_cumprod": (
        lambda: dkdm.from_betas(torch.cumprod(1 - BETAS, 0)),
        r"betas fall from 0.9999 to 4.0\S+, as alphas_cumprod do.*Give betas = 1 - ",
    ),
    "alphas": (lambda: dkdm.from_betas(1 - BETAS), "betas fall from 0.9999 to 0.98"),
    "beta 0": (lambda: dkdm.from_betas([0.0, 0.1]), r"betas\[0\] is 0: give numbers above 0"),
    "beta nan": (lambda: dkdm.from_betas([0.1, float("nan")]), r"betas\[1\] is nan"),
    "eps": (lambda: dkdm.Parameterization("eps"), "'eps': did you mean 'epsilon'"),
    "noise": (lambda: dkdm.Parameterization("noise"), "'noise': did you mean 'epsilon'"),
    "x0": (lambda: dkdm.Parameterization("x0"), "'x0': did you mean 'sample'"),
    "v": (lambda: dkdm.Parameterization("v"), "'v': did you mean 'v_prediction'"),
    "velocity": (lambda: dkdm.Parameterization("velocity"), "did you mean 'flow_prediction'"),
    "a str": (lambda: model(parameterization="v-pred"), "did you mean 'v_prediction'"),
    "time": (lambda: model(time="t"), "time is 't': did you mean 'index'"),
    "time length": (lambda: model(time=lambda p: p.sigma[1:]), "returned 999 numbers, give 1000"),
    "swapped": (lambda: model(process="epsilon", parameterization=PROCESS), "give dkdm.from_betas"),
    "betas for process": (lambda: model(process=BETAS), r"give dkdm.from_betas\(betas\)"),
    "network class": (lambda: model(network=nn.Conv2d), r"make one first: Conv2d\(...\)"),
    "classes": (lambda: model(conditioning=10), r"is 10: give dkdm.ClassLabels\(10\)"),
    "class": (lambda: model(conditioning=dkdm.ClassLabels), "make one first: ClassLabels"),
    "null -1": (lambda: dkdm.ClassLabels(10, null_class=-1), "null_class is -1: give 10, one of"),
    "null 12": (lambda: dkdm.ClassLabels(10, null_class=12), "null_class is 12: give 10, one of"),
    "names": (lambda: dkdm.ClassLabels(2, names=("a",)), "give 2 names"),
    "reversed": (lambda: model(value_range=(1.0, 0.0)), "the smaller one comes first"),
    "clipping": (lambda: dkdm.Clipping(range=(0, 1)), r"Clipping\(range=0.5, center=0.5\)"),
    "sigmas": (lambda: dkdm.karras(10, 80.0, 0.002), "did you mean sigma_min=0.002, sigma_max=80"),
    "levels": (lambda: dkdm.rectified_flow(1), "num_levels is 1: give a whole number from 2"),
    "shift": (lambda: dkdm.rectified_flow(10, shift=0), "shift is 0: give a number above 0"),
    "keyword": (lambda: dkdm.rectified_flow(10, steps_ofset=1), "use steps_offset"),
    "Denoiser keyword": (lambda: model(prediction="eps"), "no 'prediction'.*use parameterization"),
    "tables": (
        lambda: dkdm.Process(PROCESS.alpha.flip(0), PROCESS.sigma.flip(0), PROCESS.network_time),
        "give the tables from least to most noise",
    ),
    "factory": (lambda: dkdm.distill(model), r"teacher is the function model: call it, distill\("),
    "module": (lambda: dkdm.distill(nn.Conv2d(3, 3, 3)), "teacher is a network, Conv2d.*Denoiser"),
    "student class": (
        lambda: dkdm.distill(model(), nn.Conv2d),
        r"student is the class Conv2d: make one, Conv2d\(",
    ),
    "config dict": (lambda: dkdm.distill(model(), "dit-xs", {}), r"give dkdm.DistillConfig\(\*\*"),
    "train": (lambda: dkdm.train(dkdm.DistillConfig()), r"give a dkdm.TrainConfig\("),
    "typo": (lambda: dkdm.DistillConfig(max_steps=3), "no 'max_steps'.*use max_train_steps"),
    "lr": (lambda: dkdm.DistillConfig(lr=3), "no 'lr'.*use learning_rate"),
    "union": (
        lambda: dkdm.DistillConfig(teacher_null_class="no"),
        "number of 0 or more, or none",
    ),
    "yes": (lambda: dkdm.DistillConfig(use_ema="yes"), "--use-ema yes: give True or False"),
    "word": (lambda: dkdm.DistillConfig(fill="fast"), "--fill fast: give one of few-step, ancestr"),
    "export": (lambda: dkdm.export_graph("runs/x", "x.onnx"), "load it first: dkdm.load_teacher"),
    "scheduler": (lambda: dkdm.from_scheduler_config("a.json"), "give what it holds: json.load"),
    "teacher": (lambda: dkdm.load_teacher(None), "load_teacher: model is None: give a folder"),
    "cond": (lambda: model().check([1, 2]), "check: cond is .*: give a dict of tensors"),
    "steps": (lambda: PROCESS.timesteps("ten"), "sampling steps is 'ten'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plain_mistake_is_refused_with_its_remedy(name):
    make, message = REFUSED[name]
    with pytest.raises(dkdm.UsageError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


ARGUMENTS = {
    model: ("network", "process", "parameterization", "sample_shape", "conditioning", "constants")
    + ("time", "value_range", "call", "decode", "bundle", "rescale", "evaluations", "name"),
    dkdm.Parameterization: ("prediction", "variance", "sigma_data"),
    dkdm.Clipping: ("range", "quantile", "rederive_eps", "center"),
    dkdm.from_betas: ("betas",),
    dkdm.rectified_flow: ("num_levels", "shift", "lowest", "spacing", "final", "clipping"),
    dkdm.karras: ("num_levels", "sigma_min", "sigma_max", "rho", "steps_offset", "scheduler"),
    dkdm.ClassLabels: ("num_classes", "null_class", "classes", "names", "weights"),
    dkdm.DistillConfig: ("output_dir", "max_train_steps", "eta", "classes", "pool_dtype"),
    dkdm.TrainConfig: ("sample_shape", "class_conditional", "learning_rate"),
}
FIRST = {dkdm.karras: {"num_levels": 4}, dkdm.ClassLabels: {"num_classes": 4}}
CASES = [(make, name) for make, names in ARGUMENTS.items() for name in names]


@pytest.mark.parametrize(("make", "name"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_no_argument_ends_in_a_traceback(make, name):
    """Whatever is given: it is taken, or refused in one line that names the argument."""
    flag = name.replace("_", "-")
    for value in BAD.values():
        try:
            make(**(FIRST.get(make, {}) | {name: value}))
        except dkdm.UsageError as error:
            assert name in str(error).lower() or flag in str(error)
            assert "\n" not in str(error)


def test_what_is_meant_is_taken():
    shapes = [model(sample_shape=shape).sample_shape for shape in (32, [3, 8, 8], np.array([3, 8]))]
    assert shapes == [(32,), (3, 8, 8), (3, 8)]
    assert model().parameterization == dkdm.Parameterization("epsilon")
    assert model(value_range=(0, 255)).value_range == (0.0, 255.0)
    assert model(constants={"y": [1, 2]}).constants["y"].tolist() == [1, 2]
    config = dkdm.DistillConfig(output_dir="a", stride=2, classes=[1], max_train_steps=np.int64(3))
    assert (config.output_dir, config.stride, config.classes) == (Path("a"), "2", (1,))
    assert type(config.max_train_steps) is int
    nulls = [dkdm.DistillConfig(teacher_null_class=null) for null in ("none", 3, None)]
    assert [config.teacher_null_class for config in nulls] == ["none", 3, None]


def test_tables_of_numpy_and_lists_are_a_process():
    tables = [PROCESS.alpha.numpy(), PROCESS.sigma.tolist(), PROCESS.network_time]
    process = dkdm.Process(*tables)
    assert torch.equal(process.sigma, PROCESS.sigma)
    assert torch.equal(model(time=lambda p: p.sigma.numpy()).network_time, PROCESS.sigma)


def test_images_of_numpy_are_checked():
    images = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)
    checks = [
        check_denoising(denoiser(None), num_samples=2, num_steps=2, images=given, max_trials=0)
        for given in (images, torch.from_numpy(images))
    ]
    assert checks[0].levels == checks[1].levels


def test_a_null_class_inside_is_no_class():
    labels = dkdm.ClassLabels(4, null_class=1)
    assert labels.drawn == (0, 2, 3)
    assert 1 not in labels.draw(100, torch.Generator())["class_labels"]


def test_a_network_without_the_argument_is_said_to_need_a_call():
    with pytest.raises(dkdm.UsageError, match="takes no argument 'class_labels'.*call=lambda"):
        model(conditioning=dkdm.ClassLabels(3)).check()


def test_a_shape_with_the_batch_is_told():
    with pytest.raises(dkdm.UsageError, match=r"without the batch it would be \(3, 8, 8\)"):
        model(network=lambda x, t: nn.Conv2d(3, 3, 1)(x), sample_shape=(1, 3, 8, 8)).check()


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("inspect", "inspect_denoiser"),
        ("sample", "Denoiser.sample"),
        ("flow", "rectified_flow"),
        ("Flow", "rectified_flow"),
        ("denoiser_", "did you mean dkdm.Denoiser"),
        ("from_beta", "did you mean dkdm.from_betas"),
    ],
)
def test_an_unknown_name_names_the_public_one(name, instead):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'.*{instead}"):
        getattr(dkdm, name)


def test_dir_lists_what_is_public():
    assert dir(dkdm) == sorted(dkdm.__all__)


MISTAKES = {
    "missing 1 required .*conditioning=dkdm.ClassLabels": (lambda x, t, y: x, {}),
    "returned NoneType; return a tensor": (nn.Identity(), {"call": lambda *_: None}),
    "returned ndarray; return a tensor": (nn.Identity(), {"call": lambda n, x, t, c: x.numpy()}),
    r"give a function call\(network, x, time, cond\)": (
        nn.Identity(),
        {"call": lambda x, t, cond: x},
    ),
    r"times are fed as floats: .*time.long\(\)": (
        lambda x, t: x + nn.Embedding(2000, 1)(t).reshape(-1, 1, 1, 1),
        {},
    ),
    "times are 0 to 999: check the number of levels": (
        lambda x, t: x + nn.Embedding(10, 1)(t.long()).reshape(-1, 1, 1, 1),
        {},
    ),
}


@pytest.mark.parametrize("message", sorted(MISTAKES))
def test_a_network_that_is_called_wrongly_is_told_the_remedy(message):
    network, changed = MISTAKES[message]
    with pytest.raises(dkdm.UsageError, match=message):
        model(network=network, **changed).check()


def test_a_null_class_without_a_row_is_found_before_a_guided_run():
    table = nn.Embedding(3, 1)
    labelled = model(
        network=lambda x, t, class_labels: x + table(class_labels).reshape(-1, 1, 1, 1),
        conditioning=dkdm.ClassLabels(3, null_class=3),
    )
    ready_teacher(labelled, TeacherConditions(), GuidanceOptions(), EvaluationOptions())
    with pytest.raises(dkdm.UsageError, match=r"class_labels \[3, 3\].*and null_class"):
        ready_teacher(labelled, TeacherConditions(), GuidanceOptions("2"), EvaluationOptions())
