"""The records of networks and pipelines say what diffusers' own classes say."""

import inspect
import typing

import diffusers
import pytest

from dkdm.core.denoisers.calls import CALLS
from dkdm.models.architectures import ARCHITECTURES, architecture_of, with_layout
from dkdm.models.custom_network import OWN_CLASS
from dkdm.models.pipelines import PIPELINES, encoding_of, text_pipelines
from dkdm.networks import HOMES, network_class

HERE = [name for name in PIPELINES if name != "AudioDiffusionPipeline"]  # it needs librosa
WITH_A_CODER = [name for name in HERE if PIPELINES[name].factors is not None]


def signature(name):
    return inspect.signature(getattr(diffusers, name).__init__).parameters


def arguments(name):
    return inspect.signature(network_class(name).__init__).parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_record_is_found_by_the_class_of_a_network(name):
    assert architecture_of(type(name, (), {})()) is ARCHITECTURES[name]


def test_every_network_of_dkdm_has_a_record():
    assert set(HOMES) <= set(ARCHITECTURES)


def test_records_are_of_classes_that_diffusers_has():
    assert all(hasattr(diffusers, name) for name in {*ARCHITECTURES, *CALLS} - {OWN_CLASS, *HOMES})
    assert all(hasattr(diffusers, name) for name in PIPELINES)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {OWN_CLASS}))
def test_entries_are_arguments_of_the_class(name):
    known = ARCHITECTURES[name]
    entries = set(known.refused)
    entries |= {known.classes} if known.extra_row else set()
    entries |= {*known.text_widths}
    entries |= {"attention_head_dim"} if known.layout else set()
    assert entries <= arguments(name).keys()


@pytest.mark.parametrize("name", HERE)
def test_a_pipeline_has_the_network_of_its_record(name):
    hints = typing.get_type_hints(getattr(diffusers, name).__init__)
    assert any(PIPELINES[name].network in str(hint) for hint in hints.values())


@pytest.mark.parametrize("name", WITH_A_CODER)
def test_a_pipeline_reads_the_factors_of_its_record(name):
    source = inspect.getsource(inspect.getmodule(getattr(diffusers, name)))
    every = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
    assert set(PIPELINES[name].factors) == {factor for factor in every if factor in source}


@pytest.mark.parametrize("name", text_pipelines())
def test_prompts_are_encoded_by_the_encoders_of_the_record(name):
    known = PIPELINES[name].encoding
    assert {key for key in signature(name) if key.startswith("text_encoder")} == set(known.encoders)
    called = inspect.signature(getattr(diffusers, name).encode_prompt).parameters
    assert {*known.arguments, *known.defaults} <= called.keys()


def test_what_is_not_known_says_nothing():
    class Other:
        pass

    known = architecture_of(Other())
    assert known.layout is None and not known.needs_text({})
    assert encoding_of("DDPMPipeline") is None and encoding_of(None) is None


def test_networks_that_can_be_cut():
    assert with_layout("unet") == ["UNet2DModel", "UNet2DConditionModel"]
    assert with_layout("transformer") == ["DiTTransformer2DModel", "SD3Transformer2DModel"]
