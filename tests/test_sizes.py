"""What a file describes is measured before memory is taken for it."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

import pipelines
from dkdm import load_teacher
from dkdm.errors import DkdmError, UsageError
from dkdm.models import LoadOptions, sketch_teacher
from dkdm.reading.sizes import bounded, building, check_numbers, check_sample, make_network


@pytest.fixture
def model(tmp_path):
    pipelines.ldm_kl().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers_per_block": 100_000}, "layers_per_block is 100000: give at most 2,000"),
        ({"layers_per_block": 2_000}, r"bytes of weights beside it|weight tensors"),
        ({"block_out_channels": [30_000, 30_000]}, r"numbers or more, \d+\.\d GiB in float32"),
        ({"num_class_embeds": 10**9}, "num_class_embeds is 1000000000: give at most"),
        ({"num_class_embeds": 900_000}, "the limit is what"),
        ({"sample_size": 10**6}, r"a sample of shape 3x1000000x1000000 takes .* GiB, two of them"),
        ({"sample_size": [8, 10**9]}, "sample_size is 1000000000: give at most"),
        ({"norm_eps": float("inf")}, "norm_eps is inf: give a finite number"),
    ],
)
def test_a_network_larger_than_its_weights_is_refused_before_it_is_made(model, values, message):
    change(model / "unet" / "config.json", **values)
    with pytest.raises(DkdmError, match=message) as seen:
        load_teacher(str(model))
    assert "config.json" in str(seen.value) and "\n" not in str(seen.value)


def test_an_autoencoder_larger_than_its_weights_is_refused(model):
    teacher = load_teacher(str(model))
    change(model / "vqvae" / "config.json", block_out_channels=[20_000, 20_000], norm_num_groups=4)
    with pytest.raises(UsageError, match="DKDM_MAX_GIB"):
        teacher.bundle.autoencoder.component.load()


def test_the_limit_is_lifted_by_the_environment(monkeypatch):
    monkeypatch.setenv("DKDM_MAX_GIB", "0.001")
    config = {"num_layers": 4, "attention_head_dim": 64, "num_attention_heads": 4}
    with pytest.raises(UsageError, match=r"the limit is 0\.0 GiB \(DKDM_MAX_GIB\)"):
        make_network(DiTTransformer2DModel, config, "config.json")
    monkeypatch.setenv("DKDM_MAX_GIB", "many")
    with pytest.raises(UsageError, match="DKDM_MAX_GIB=many: give a positive number of GiB"):
        make_network(DiTTransformer2DModel, config, "config.json")


def test_a_description_may_be_larger_than_this_machine():
    config = {"num_layers": 100, "attention_head_dim": 128, "num_attention_heads": 64}
    with torch.device("meta"):
        network = make_network(DiTTransformer2DModel, config, "config.json")
    assert sum(p.numel() for p in network.parameters()) > 10**10
    with pytest.raises(UsageError, match="GiB of memory that are free"):
        make_network(DiTTransformer2DModel, config | {"num_layers": 2_000}, "config.json")


def test_making_a_network_draws_what_its_class_draws():
    config = {"sample_size": 8, "block_out_channels": [32, 64]}
    config |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    torch.manual_seed(0)
    made = make_network(UNet2DModel, config, "config.json").state_dict()
    torch.manual_seed(0)
    stock = UNet2DModel(**config).state_dict()
    assert all(torch.equal(made[key], stock[key]) for key in stock)


def test_the_memory_of_what_is_refused_is_not_touched():
    before = nn.Linear.reset_parameters
    with (
        pytest.raises(UsageError, match="config describes"),
        bounded("config", 1e6, "1"),
    ):
        nn.Linear(30_000, 30_000)
    assert nn.Linear.reset_parameters is before
    nn.Linear(1100, 1100)  # the limit ends with the block


def test_many_small_layers_are_stopped(monkeypatch):
    monkeypatch.setattr("dkdm.reading.sizes.MAX_TENSORS", 500)
    monkeypatch.setattr("dkdm.reading.sizes.MAX_MODULES", 2000)
    for layer in (nn.LayerNorm, lambda _: nn.ModuleList([nn.ModuleList()])):
        refused = pytest.raises(UsageError, match="more than 500 weight tensors or 2,000 layers")
        with refused, bounded("config", 1e12, "none"):
            for _ in range(10**9):
                layer(1)


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError("by\nzero"), RecursionError()])
def test_whatever_a_constructor_raises_is_one_line(error):
    refused = pytest.raises(UsageError, match="config.json: Net cannot be made of it")
    with refused as seen, building({}, "config.json", "Net"):
        raise error
    assert "\n" not in str(seen.value)


def test_real_sizes_pass():
    flux = {"num_layers": 19, "num_single_layers": 38, "axes_dims_rope": [16, 56, 56]}
    t5 = {"vocab_size": 256_384, "d_ff": 10_240, "rope_theta": 10_000_000, "num_layers": 24}
    audio = {"sample_size": 131_072, "sample_rate": 48_000, "max_position_embeddings": 131_072}
    for config in (flux, t5, audio):
        check_numbers(config, "config.json")
    check_sample((16, 31, 90, 160), "Wan, 720p", 2)
    check_sample((3, 81, 720, 1280), "video in pixels")
    check_sample((2, 2**24), "six minutes of sound")


@pytest.mark.parametrize("shape", [(3, 0, 8), (3, -1, 8), (3, 2.5, 8), (3, True, 8)])
def test_a_sample_has_whole_sides(shape):
    with pytest.raises(UsageError, match="give whole numbers above 0"):
        check_sample(shape, "config.json")


def test_tokens_of_a_transformer_are_bounded():
    with pytest.raises(UsageError, match="tokens: give at most"):
        check_sample((4, 8192, 8192), "config.json", 2)


def test_a_sketch_is_bounded_too(model):
    change(model / "unet" / "config.json", sample_size=10**6)
    with pytest.raises(UsageError, match="takes .* GiB"):
        sketch_teacher(str(model), LoadOptions())
