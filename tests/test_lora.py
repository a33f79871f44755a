"""LoRA files are merged as the stock pipeline loads, weighs and fuses them, and leave no trace."""

import copy
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pipelines
from dkdm.config import DistillConfig, from_mapping, to_json
from dkdm.errors import DkdmError, UsageError
from dkdm.models.lora import Lora, merge_loras, read_choice, read_choices

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def made():
    """Pipelines by name, each made once; a test works on copies of its network."""
    found = {}

    def get(name):
        if name not in found:
            found[name] = getattr(pipelines, name)()
        return found[name]

    return get


def component_of(pipeline):
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def layers_of(network, *endings):
    """Shapes of linear layers by name, those whose names end so."""
    return {
        name: module.weight.shape
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(endings)
    }


def updates(shapes, ranks=(2, 3)):
    """(name, down, up) for each layer, with ranks in turns."""
    for index, (name, (given, taken)) in enumerate(shapes.items()):
        rank = ranks[index % len(ranks)]
        yield name, torch.randn(rank, taken), torch.randn(given, rank)


def peft_file(file, pipeline, header=None, ranks=(2, 3), endings=("to_q", "to_v")):
    """As diffusers saves a LoRA: peft's names, and its settings in the header."""
    component = component_of(pipeline)
    tensors = {}
    for name, down, up in updates(layers_of(getattr(pipeline, component), *endings), ranks):
        tensors[f"{component}.{name}.lora_A.weight"] = down
        tensors[f"{component}.{name}.lora_B.weight"] = up
    settings = {f"{component}.{key}": value for key, value in (header or {}).items()}
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if header else {}
    save_file(tensors, file, {"format": "pt", **metadata})
    return file


def kohya_file(file, shapes, rename=lambda name: name, alphas=(1.0, 4.0)):
    """As kohya's scripts save a LoRA: alphas beside the weights."""
    tensors = {}
    for index, (name, down, up) in enumerate(updates(shapes)):
        key = f"lora_unet_{rename(name).replace('.', '_')}"
        alpha = torch.tensor(alphas[index % len(alphas)])
        parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
        tensors |= {f"{key}.{part}": value for part, value in parts.items()}
    save_file(tensors, file)
    return file


def stock_weights(pipeline, files, weights):
    """The network's weights after the stock pipeline has loaded, weighed and fused the files."""
    component = component_of(pipeline)
    original = getattr(pipeline, component)
    setattr(pipeline, component, copy.deepcopy(original))
    names = [f"adapter{index}" for index in range(len(files))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, file in zip(names, files, strict=True):
            pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(names, list(weights))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = getattr(pipeline, component).state_dict()
    setattr(pipeline, component, original)
    return fused


def merged_network(pipeline, files, weights):
    component = component_of(pipeline)
    network = copy.deepcopy(getattr(pipeline, component))
    loras = [Lora(file, weight) for file, weight in zip(files, weights, strict=True)]
    merge_loras(network, type(pipeline).__name__, component, loras)
    return network


def assert_merged_as_by_stock(pipeline, files, weights, changed):
    """The merged network has the stock one's weights; so many of them are other than before."""
    before = getattr(pipeline, component_of(pipeline)).state_dict()
    network = merged_network(pipeline, files, weights)
    after, expected = network.state_dict(), stock_weights(pipeline, files, weights)
    assert after.keys() == expected.keys() == before.keys()
    for key, value in expected.items():
        torch.testing.assert_close(after[key], value, rtol=1e-6, atol=1e-6)
    assert sum(not torch.equal(after[key], before[key]) for key in before) == changed
    return network


# --- the same as the stock pipeline --------------------------------------------------------------

SUPPORTED = ("stable_diffusion", "sdxl", "sd3", "flux", "sana", "lumina", "wan")


@pytest.mark.parametrize("name", SUPPORTED)
def test_several_files_with_weights(made, tmp_path, name):
    pipeline = made(name)
    network = getattr(pipeline, component_of(pipeline))
    layers = sorted(layers_of(network, "to_q", "to_v"))
    header = {
        "r": 2,
        "lora_alpha": 12,
        "rank_pattern": dict.fromkeys(layers[::2], 2) | dict.fromkeys(layers[1::2], 3),
        "alpha_pattern": {layers[0]: 1},
        "target_modules": ["to_q", "to_v"],
        "peft_type": "LORA",
        "init_lora_weights": True,
        "bias": "none",
    }
    shapes = layers_of(network, "to_q", "to_v")
    assert len(shapes) > 1
    ranks = tuple(header["rank_pattern"][name] for name in shapes)
    files = [
        peft_file(tmp_path / "settings.safetensors", pipeline, header, ranks),
        peft_file(tmp_path / "plain.safetensors", pipeline),
    ]
    assert_merged_as_by_stock(pipeline, files, (0.8, -0.5), len(shapes))


def test_alphas_of_kohyas_names(made, tmp_path):
    pipeline = made("stable_diffusion")
    shapes = layers_of(pipeline.unet, "to_q", "to_v", "ff.net.2")
    file = kohya_file(tmp_path / "kohya.safetensors", shapes, alphas=(0.5,))
    assert_merged_as_by_stock(pipeline, [file], (1.0,), len(shapes))


def test_alphas_that_diffusers_passes_over_are_said(made, tmp_path):
    pipeline = made("stable_diffusion")
    shapes = layers_of(pipeline.unet, "to_q", "to_v")
    file = kohya_file(tmp_path / "kohya.safetensors", shapes, alphas=(1.0, 4.0))
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"):
        assert_merged_as_by_stock(pipeline, [file], (1.0,), len(shapes))


def sgm_name(name):
    """The original repository's name of a block in a UNet of two levels and one block a level."""
    places = {
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
    }
    place = next(place for place in places if name.startswith(place))
    return name.replace(place, places[place])


def test_original_block_names_of_sdxl(made, tmp_path):
    pipeline = made("sdxl")
    shapes = layers_of(pipeline.unet, "attn1.to_q", "attn2.to_v")
    file = kohya_file(tmp_path / "kohya.safetensors", shapes, sgm_name, alphas=(0.25,))
    assert_merged_as_by_stock(pipeline, [file], (0.7,), len(shapes))


def test_kohyas_names_of_flux(made, tmp_path):
    pipeline = made("flux")
    width = pipeline.transformer.config.num_attention_heads * 16
    shapes = {
        "double_blocks.0.img_attn.proj": (width, width),
        "double_blocks.0.img_attn.qkv": (3 * width, width),
        "single_blocks.0.modulation.lin": (3 * width, width),
    }
    file = kohya_file(tmp_path / "kohya.safetensors", shapes)
    assert_merged_as_by_stock(pipeline, [file], (1.0,), 5)


def test_names_of_xlabs(made, tmp_path):
    pipeline = made("flux")
    width = pipeline.transformer.config.num_attention_heads * 16
    shapes = {
        "double_blocks.0.processor.proj_lora1": (width, width),
        "double_blocks.0.processor.proj_lora2": (width, width),
        "double_blocks.0.processor.qkv_lora1": (3 * width, width),
        "double_blocks.0.processor.qkv_lora2": (3 * width, width),
        "single_blocks.0.processor.qkv_lora": (3 * width, width),
    }
    tensors = {}
    for name, down, up in updates(shapes):
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    save_file(tensors, tmp_path / "xlabs.safetensors")
    assert_merged_as_by_stock(pipeline, [tmp_path / "xlabs.safetensors"], (0.7,), 11)


def test_a_file_of_torch_is_read_as_data(made, tmp_path):
    pipeline = made("stable_diffusion")
    shapes = layers_of(pipeline.unet, "to_q")
    tensors = {}
    for name, down, up in updates(shapes):
        stem = f"unet.{name.removesuffix('to_q')}processor.to_q_lora"
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    file = read_choice(tmp_path).file
    assert file.name == "pytorch_lora_weights.bin"
    assert_merged_as_by_stock(pipeline, [file], (1.0,), len(shapes))


def test_half_precision(made, tmp_path):
    pipeline = copy.deepcopy(made("sd3"))
    pipeline.transformer.to(torch.bfloat16)
    file = peft_file(tmp_path / "a.safetensors", pipeline)
    changed = len(layers_of(pipeline.transformer, "to_q", "to_v"))
    assert_merged_as_by_stock(pipeline, [file], (0.3,), changed)


def test_nothing_of_peft_stays(made, tmp_path):
    pipeline = made("flux")
    file = peft_file(tmp_path / "a.safetensors", pipeline)
    before = copy.deepcopy(pipeline.transformer)
    network = merged_network(pipeline, [file, file], (1.0, 0.5))
    assert vars(network).keys() <= vars(before).keys()
    for name, module in network.named_modules():
        assert type(module) is type(before.get_submodule(name))
    assert not any(parameter.requires_grad for parameter in network.parameters())


# --- how a file and its weight are written -------------------------------------------------------


def test_weights_are_written_behind_a_colon(tmp_path):
    file, odd = tmp_path / "a.safetensors", tmp_path / "b:0.5"
    file.touch()
    odd.touch()
    assert read_choice(file) == Lora(file)
    assert read_choice(str(file)) == Lora(file)
    assert read_choice(f"{file}:0.8") == Lora(file, 0.8)
    assert read_choice(Path(f"{file}:-1e-1")) == Lora(file, -0.1)
    assert read_choice((str(file), 2)) == Lora(file, 2.0)
    assert read_choice(str(odd)) == Lora(odd)
    assert read_choice(f"{odd}:0.25") == Lora(odd, 0.25)
    assert read_choices((file, 0.5)) == (Lora(file, 0.5),)
    assert read_choices(f"{file}:0.5") == (Lora(file, 0.5),)
    assert read_choices((file, f"{file}:0.5", (file, 0.1))) == (
        Lora(file),
        Lora(file, 0.5),
        Lora(file, 0.1),
    )


def test_options_of_earlier_runs_name_files_alone():
    values = {"kind": "DistillConfig", "teacher_lora": ["a.safetensors", "b.safetensors:0.5"]}
    config = from_mapping(DistillConfig, values)
    assert config.teacher_lora == ("a.safetensors", "b.safetensors:0.5")
    assert from_mapping(DistillConfig, json.loads(to_json(config))) == config


@pytest.mark.parametrize(
    "choice",
    [
        "C:\\loras\\a.safetensors",
        "a.safetensors:strong",
        "a.safetensors:nan",
        ("a", "b"),
        3,
        ("a",),
    ],
)
def test_what_is_no_file_and_no_weight(choice):
    with pytest.raises(UsageError, match="--teacher-lora .*"):
        read_choice(choice)


# --- what is refused -----------------------------------------------------------------------------


def refused(pipeline, file, kind=UsageError):
    with pytest.raises(kind) as caught:
        merged_network(pipeline, [file], (1.0,))
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def changed_file(file, pipeline, **changes):
    """A good file with some tensors more, or others."""
    component = component_of(pipeline)
    tensors = {}
    for name, down, up in updates(layers_of(getattr(pipeline, component), "to_q")):
        tensors[f"{component}.{name}.lora_A.weight"] = down
        tensors[f"{component}.{name}.lora_B.weight"] = up
    save_file(tensors | {key: value for key, value in changes.items()}, file)
    return file


def test_names_of_lycoris(made, tmp_path):
    at = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    save_file({f"{at}.{part}": torch.ones(4, 4) for part in parts}, tmp_path / "a.safetensors")
    message = refused(made("stable_diffusion"), tmp_path / "a.safetensors", DkdmError)
    assert "does not fit this network" in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text_encoder.a.lora_A.weight": torch.ones(2, 2)}, "also changes text_encoder"),
        ({"unet.a.dora_scale": torch.ones(2)}, "holds DoRA scales"),
    ],
)
def test_what_would_be_dropped(made, tmp_path, tensors, message):
    pipeline = made("stable_diffusion")
    assert message in refused(
        pipeline, changed_file(tmp_path / "a.safetensors", pipeline, **tensors)
    )


def test_layers_that_are_not_there_and_numbers_that_are_none(made, tmp_path):
    pipeline = made("sd3")
    odd = {f"transformer.none.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    file = changed_file(tmp_path / "a.safetensors", pipeline, **odd)
    assert "1 of its" in refused(pipeline, file, DkdmError)
    odd = {"transformer.none.lora_A.weight": torch.full((2, 2), torch.nan)}
    file = changed_file(tmp_path / "a.safetensors", pipeline, **odd)
    assert "not finite numbers" in refused(pipeline, file, DkdmError)


def test_a_control_lora_of_flux(made, tmp_path):
    pipeline = made("flux")
    inputs = {
        "transformer.x_embedder.lora_A.weight": torch.ones(2, 32),
        "transformer.x_embedder.lora_B.weight": torch.ones(32, 2),
    }
    file = changed_file(tmp_path / "a.safetensors", pipeline, **inputs)
    assert "is fed an image too (32 channels, not 16)" in refused(pipeline, file)


def test_a_pipeline_without_a_loader(made, tmp_path):
    pipeline = made("pixart")
    file = peft_file(tmp_path / "a.safetensors", pipeline)
    assert "PixArtAlphaPipeline takes no LoRA" in refused(pipeline, file)


GOOD = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**6}, "r is 1000000: give a whole number from 1 to 3"),
        ({"r": "2"}, "r is '2'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": ["to_q"]}, "rank_pattern is ['to_q']: give an object"),
        ({"rank_pattern": {"(a+)+": 2}}, "is not the name of a layer"),
        ({"alpha_pattern": {"to_q": None}}, "to_q is None"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config is {'a': 1}"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save is ['conv_in']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"anything": {"new": 1}}, "anything is {'new': 1}"),
    ],
)
def test_headers_that_ask_for_more(made, tmp_path, changes, message):
    pipeline = made("stable_diffusion")
    file = peft_file(tmp_path / "a.safetensors", pipeline, GOOD | changes)
    assert message in refused(pipeline, file)


@pytest.mark.parametrize("raw", ["{", "3", "[]", "null", "[" * 100_000])
def test_headers_that_are_no_settings(made, tmp_path, raw):
    pipeline = made("stable_diffusion")
    file = tmp_path / "a.safetensors"
    tensors = {"unet.a.lora_A.weight": torch.ones(2, 2), "unet.a.lora_B.weight": torch.ones(2, 2)}
    save_file(tensors, file, {"lora_adapter_metadata": raw})
    assert "lora_adapter_metadata" in refused(pipeline, file)


def test_files_that_are_no_lora(made, tmp_path):
    pipeline = made("stable_diffusion")
    file = tmp_path / "a.safetensors"
    file.write_bytes(os.urandom(64))
    assert "cannot be read as safetensors" in refused(pipeline, file, DkdmError)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(pipeline, file)
    save_file({"conv_in.weight": torch.ones(1)}, file)
    assert "changes conv_in, nothing of unet" in refused(pipeline, file)
    save_file({"unet.conv_in.weight": torch.ones(1)}, file)
    assert "Invalid LoRA checkpoint" in refused(pipeline, file, DkdmError)


def test_dora_as_peft_saves_it(made, tmp_path):
    import peft

    pipeline = copy.deepcopy(made("sd3"))
    settings = {"r": 2, "lora_alpha": 4, "use_dora": True, "init_lora_weights": False}
    pipeline.transformer.add_adapter(peft.LoraConfig(**settings, target_modules=["to_q"]))
    layers = peft.get_peft_model_state_dict(pipeline.transformer)
    layers = {key: value + 0.1 for key, value in layers.items()}
    header = {"transformer": pipeline.transformer.peft_config["default"].to_dict()}
    type(pipeline)._save_lora_weights(
        tmp_path, {"transformer": layers}, header, True, "a.safetensors", None, True
    )
    plain = made("sd3")
    changed = len(layers_of(plain.transformer, "to_q"))
    assert_merged_as_by_stock(plain, [tmp_path / "a.safetensors"], (1.0,), changed)
