"""Modules are found under the names that they had, with what users import from them."""

from importlib import import_module

import pytest

import dkdm
from dkdm import models

FORMER = {
    "dkdm": (
        "allowed api arguments arrays bundle calls card charts check_student checkpoint "
        "conditioning datasets denoiser doctor effective estimate export features finish generated "
        "given graph hub inputs inspection launch licence listing made_here markdown matching "
        "modes objective own pictures places plan plots plugins pool prediction process progress "
        "prompts quantization quantized randomness reading recipes schedulers ship sizes sources "
        "steps teachers toy trainer trainset typed"
    ),
    "dkdm.check_student": "behaviour blame case graphs saving training",
    "dkdm.core": (
        "checkpoint conditioning denoiser feature_loss fill graphs kinds objective pool "
        "prediction process progress schedules steps trainer units"
    ),
    "dkdm.evaluation": "classes features",
    "dkdm.graph": "description formats network tracing trail",
    "dkdm.inspection": "check denoising facts given memory readings remedy tables",
    "dkdm.report": "numbers",
    "dkdm.students": "other positions presets",
    "dkdm.teachers": (
        "dit downloads edm edm2 families first_stage flags guided_diffusion latent_diffusion "
        "latents locate lora lucidrains network_folder networks options originals pipeline_folder "
        "place single_file sketch state_dict text"
    ),
}
NAMES = [f"{package}.{name}" for package, names in FORMER.items() for name in names.split()]


@pytest.mark.parametrize("name", NAMES)
def test_a_former_module_is_found(name):
    assert import_module(name).__name__.partition(".")[0] == "dkdm"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("denoiser", "Batch"),
        ("estimate", "describe"),
        ("pool", "Pool"),
        ("process", "from_betas"),
        ("schedulers", "MULTISTEP"),
        ("schedulers", "from_scheduler_config"),
        ("steps", "reverse_step"),
        ("students.presets", "PRESETS"),
        ("teachers", "load_teacher"),
        ("teachers", "LoadOptions"),
        ("teachers", "with_texts"),
    ],
)
def test_a_name_is_the_same_object_under_its_former_module(module, name):
    former = getattr(import_module(f"dkdm.{module}"), name)
    assert former is getattr(dkdm, name, former)
    assert getattr(former, "__module__", "dkdm").startswith("dkdm")


@pytest.mark.parametrize("name", ["locate", "place"])
def test_a_former_module_is_the_present_one_and_leaves_the_functions_alone(name):
    assert import_module(f"dkdm.teachers.{name}") is import_module(f"dkdm.models.{name}")
    assert callable(models.load_teacher) and callable(models.builtin_names)
