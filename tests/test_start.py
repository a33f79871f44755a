"""What students start from: the teacher or any checkpoint, with adapters on it or without."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file
from torch import nn

import dkdm
from dkdm.core.saving import checkpoint
from dkdm.errors import DkdmError, UsageError
from dkdm.runs.distill import describe
from dkdm.students import student_of
from dkdm.students.lora import add_lora, inherited_names, merge_lora, merged_weights
from dkdm.students.start import inherit, read_checkpoint, start_student
from factories import Blank, denoiser, tiny_unet

CONFIG = dkdm.DistillConfig(
    student="thin-50",
    student_init="teacher",
    max_train_steps=4,
    train_batch_size=8,
    pool_size=16,
    fill_steps=1,
    learning_rate=1e-2,
    logging_steps=1,
    checkpointing_steps=2,
    validation_steps=0,
    evaluation_samples=0,
)


def started(student="thin-50", teacher=None, **changes):
    teacher = teacher or denoiser()
    learner = student_of(student, teacher) if isinstance(student, str) else student
    return learner, start_student(learner, teacher, replace(CONFIG, **changes).student_choice)


def evaluate(network):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=random)
    with torch.no_grad():
        return network(x, torch.tensor([3, 40]), torch.tensor([0, 3])).sample


def same(weights, others):
    return weights.keys() == others.keys() and all(
        torch.equal(value, others[key]) for key, value in weights.items()
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that started from a slice of its teacher."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return dkdm.distill(denoiser(), None, replace(CONFIG, output_dir=folder))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The same with adapters of rank 2."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    return dkdm.distill(denoiser(), None, replace(CONFIG, output_dir=folder, lora_rank=2))


def test_random_is_left_alone():
    learner = denoiser(seed=5)
    before = copy.deepcopy(learner.network.state_dict())
    _, start = started(learner, student_init="random")
    assert same(learner.network.state_dict(), before)
    assert str(start) == "random weights"


def test_student_of_the_teachers_architecture_starts_as_the_teacher():
    teacher, twin = denoiser(), denoiser(seed=9)
    assert not torch.equal(evaluate(twin.network), evaluate(teacher.network))
    _, start = started(twin, teacher)
    assert torch.equal(evaluate(twin.network), evaluate(teacher.network))
    assert len(start.whole) == len(list(teacher.network.parameters()))
    assert "0 sliced, 0 left random; 100.0% of the parameters" in str(start)


def test_what_finds_no_source_stays_random_and_is_named():
    torch.manual_seed(3)
    network = tiny_unet(classes=9, out_channels=2)  # the teacher has 4 rows of classes, 1 channel
    before = copy.deepcopy(network.state_dict())
    start = inherit(network, denoiser().network.state_dict(), "teacher")
    assert start.random == ("class_embedding.weight", "conv_out.weight", "conv_out.bias")
    assert "3 left random (class_embedding.weight, conv_out.weight, conv_out.bias)" in str(start)
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in start.random)
    assert 0.5 < start.share < 1


def test_learned_variance_is_dropped_but_not_invented():
    teacher = tiny_unet(classes=4, out_channels=2)
    network = tiny_unet(classes=4, out_channels=1)
    start = inherit(network, teacher.state_dict(), "teacher")
    assert start.sliced == ("conv_out.weight", "conv_out.bias")
    assert torch.equal(evaluate(network), evaluate(teacher)[:, :1])


def test_network_of_unknown_layout_is_not_sliced():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    wide = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    start = inherit(network, wide.state_dict(), "wide")
    assert start.random == ("0.weight",)
    assert start.whole == ("0.bias", "1.weight", "1.bias")


@pytest.mark.parametrize(
    ("student", "changes", "message"),
    [
        ("dit-xs", {}, "--student-init teacher: nothing in it fits this DiTTransformer2DModel"),
        ("dit-xs", {"student_init": "no/such/path"}, "no model at 'no/such/path'"),
        ("thin-50", {"student_init": "random", "lora_rank": 2}, "add --student-init teacher"),
        ("thin-50", {"lora_rank": 0}, "--lora-rank 0: give a whole number of 1 or more"),
    ],
)
def test_start_that_is_impossible_is_refused(student, changes, message):
    with pytest.raises(UsageError, match=message):
        started(student, **changes)


def test_teacher_without_readable_weights_is_refused():
    teacher, learner = denoiser(), denoiser()
    network = teacher.network
    with pytest.raises(UsageError, match="is a function and has no weights"):
        started(learner, replace(teacher, network=lambda *a, **k: network(*a, **k)))
    with pytest.raises(UsageError, match="in int8 or offloaded"):
        started(learner, replace(teacher, network=network.to("meta")))


def test_run_its_checkpoint_its_folder_and_its_file_are_one_start(run):
    final = UNet2DModel.from_pretrained(run / "unet").state_dict()
    file = run / "unet" / checkpoint.WEIGHTS
    for spec in (run, run / "checkpoint-4", run / "unet", file):
        assert same(read_checkpoint(str(spec)), final), spec
    learner, start = started(student_init=str(run / "checkpoint-4"))
    assert same(learner.network.state_dict(), final)
    assert start.share == 1.0
    assert not start.sliced


def test_unfinished_run_gives_its_latest_checkpoint(run, tmp_path):
    unfinished = tmp_path / "run"
    shutil.copytree(run / "checkpoint-2", unfinished / "checkpoint-2")
    averaged = checkpoint.read_tensors(run / "checkpoint-2" / "unet_ema" / checkpoint.WEIGHTS)
    assert same(read_checkpoint(str(unfinished)), averaged)


def test_a_checkpoint_of_a_run_without_average_gives_its_plain_weights(tmp_path):
    folder = tmp_path / "run"
    dkdm.distill(denoiser(), None, replace(CONFIG, output_dir=folder, use_ema=False))
    whole = read_checkpoint(str(folder))
    assert same(read_checkpoint(str(folder / "checkpoint-4")), whole)
    (folder / "model_index.json").unlink()  # as if it were not finished
    assert same(read_checkpoint(str(folder)), whole)


def test_weights_in_several_files_are_joined(run, tmp_path):
    weights = sorted(checkpoint.read_tensors(run / "unet" / checkpoint.WEIGHTS).items())
    for i, part in enumerate((weights[:9], weights[9:]), start=1):
        name = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file(dict(part), tmp_path / name)
    assert same(read_checkpoint(str(tmp_path)), dict(weights))


def test_wider_checkpoint_is_sliced_as_the_teacher_is():
    learner, start = started(student_init="builtin:fashion")
    assert start.sliced
    assert "builtin:fashion: " in str(start)
    assert evaluate(learner.network).isfinite().all()


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no diffusion_pytorch_model\.safetensors in"):
        read_checkpoint(str(tmp_path))


def test_damaged_checkpoint_is_refused(run, tmp_path):
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "unet_ema" / checkpoint.WEIGHTS).write_bytes(b"?")
    with pytest.raises(DkdmError, match="is damaged"):
        read_checkpoint(str(tmp_path / "checkpoint-2"))


def test_resumed_run_does_not_read_its_start_again(run, tmp_path):
    given, folder = tmp_path / "given", tmp_path / "run"
    shutil.copytree(run / "unet", given)
    config = replace(CONFIG, output_dir=folder, student_init=str(given))
    dkdm.distill(denoiser(), None, replace(config, max_train_steps=2))
    shutil.rmtree(given)
    dkdm.distill(denoiser(), None, replace(config, resume_from_checkpoint="latest"))
    assert (folder / "checkpoint-4").is_dir()


def test_dry_run_says_where_the_student_starts():
    config = replace(CONFIG, teacher="factories:teacher", lora_rank=3)
    text = describe(config)
    assert "start     teacher: " in text
    assert "LoRA of rank 3 on them" in text


def with_adapters(rank=2):
    """A network with adapters that do something, what it was, and what is frozen."""
    network = tiny_unet(classes=4, levels=2)
    base = copy.deepcopy(network)
    left = {"conv_in.weight", "mid_block.resnets.0.norm1.weight"}
    frozen = add_lora(network, base.state_dict().keys() - left, rank)
    return network, base, frozen


def test_adapters_change_nothing_at_first_and_freeze_what_was_inherited():
    network, base, frozen = with_adapters()
    assert type(network) is UNet2DModel
    assert torch.equal(evaluate(network), evaluate(base))
    trained = {name for name, _ in network.named_parameters()} - frozen
    plain = {name for name in trained if ".lora_" not in name}
    assert plain == {"conv_in.weight", "mid_block.resnets.0.norm1.weight"}
    assert inherited_names(frozen) == base.state_dict().keys() - plain
    layers = [m for m in base.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert len(trained - plain) == 2 * (len(layers) - 1)  # conv_in was not inherited


def test_merged_network_is_plain_and_computes_the_same():
    network, base, _ = with_adapters()
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)
    adapted = evaluate(network)
    assert not torch.allclose(adapted, evaluate(base), atol=1e-2)
    weights = merged_weights(network.state_dict())
    merged = merge_lora(copy.deepcopy(network))
    assert torch.allclose(evaluate(merged), adapted, atol=1e-6, rtol=1e-6)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert same(merged.state_dict(), weights)
    assert merge_lora(base) is base


@pytest.mark.parametrize("odd", [{"dilation": 2}, {"padding_mode": "circular"}])
def test_convolutions_that_adapters_do_not_compute_are_left_alone(odd):
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, **odd), nn.Conv2d(4, 4, 3))
    add_lora(network, {"0.weight", "0.bias", "1.weight", "1.bias"}, 2)
    assert not hasattr(network[0], "lora_A")
    assert hasattr(network[1], "lora_A")


def test_nothing_to_adapt_is_refused():
    with pytest.raises(UsageError, match="of this Blank was inherited"):
        add_lora(Blank(1), {"scale"}, 2)


def test_missing_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(DkdmError, match=r"pip install 'dkdm\[lora\]'"):
        with_adapters()


def test_run_with_adapters_trains_them_alone_and_ends_as_a_plain_network(adapted):
    first, last = (
        checkpoint.read_tensors(adapted / f"checkpoint-{step}" / "unet" / checkpoint.WEIGHTS)
        for step in (2, 4)
    )
    changed = {key for key in first if not torch.equal(first[key], last[key])}
    assert changed == {key for key in first if ".lora_" in key}
    learner, _ = started()  # what the run started from
    base = learner.network.state_dict()
    assert all(torch.equal(last[k], base[n]) for n, k in named_base(last, base))
    network = UNet2DModel.from_pretrained(adapted / "unet")
    assert network.state_dict().keys() == base.keys()
    averaged = checkpoint.read_tensors(adapted / "checkpoint-4" / "unet_ema" / checkpoint.WEIGHTS)
    assert same(network.state_dict(), merged_weights(averaged))
    assert same(read_checkpoint(str(adapted / "checkpoint-4")), network.state_dict())


def named_base(weights, base):
    """Pairs of a plain name and the name it has beside adapters."""
    plain = {key.replace(".base_layer.", "."): key for key in weights if ".lora_" not in key}
    assert plain.keys() == base.keys()
    return plain.items()


def test_resumed_run_with_adapters_is_bitwise_the_uninterrupted_one(adapted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(adapted, folder)
    shutil.rmtree(folder / "checkpoint-4")
    config = replace(CONFIG, output_dir=folder, lora_rank=2, resume_from_checkpoint="latest")
    dkdm.distill(denoiser(), None, config)
    manifests = [
        json.loads((path / "checkpoint-4" / "manifest.json").read_text())
        for path in (adapted, folder)
    ]
    assert manifests[0] == manifests[1]


def test_adapters_are_not_added_when_a_run_goes_on(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = replace(CONFIG, output_dir=folder, lora_rank=2, resume_from_checkpoint="latest")
    config = replace(config, accept_changes=True)
    with pytest.raises(UsageError, match="checkpoint-4 was trained without LoRA"):
        dkdm.distill(denoiser(), None, config)
