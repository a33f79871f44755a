"""Programs that dkdm writes hold literals and names of its own, whatever a folder says."""

import ast
import builtins
import inspect
import json
import symtable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import pipelines
from dkdm.core.denoisers import calls
from dkdm.core.denoisers.calls import CALLS
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.denoiser import Batch
from dkdm.errors import DkdmError, UsageError
from dkdm.models import LoadOptions, load_teacher
from dkdm.models.architectures import component_of
from dkdm.models.components import Component
from dkdm.models.prompts import with_prompts
from dkdm.models.schedulers import from_scheduler_config
from dkdm.models.text import encoder_width
from dkdm.networks import HOMES, network_class, shipped_source
from dkdm.reading.allowed import component_class, library_class
from dkdm.reading.files import dotted, identifier, literal
from dkdm.shipping.call_source import call_source
from dkdm.shipping.hub import _name_in_card
from dkdm.shipping.pipeline_folder import COMPONENTS, usage_snippet, write_pipeline
from factories import SCHEDULER

HOSTILE = (
    'x"""\nimport os\nos.system("exit 7")\n"""',
    "'''+__import__('os').getcwd()+'''",
    "{{ 7 * 7 }}{% raw %}",
    "\\\n#\r\u2028'\"",
    "```\n<script>alert(1)</script>",
)


class Blanked(ast.NodeTransformer):
    """Puts one constant in the place of every literal."""

    def visit_Constant(self, node):
        del node
        return ast.Constant(0)

    def visit_UnaryOp(self, node):
        plain = isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)
        return ast.Constant(0) if plain else self.generic_visit(node)


def tree(path):
    return ast.dump(Blanked().visit(ast.parse(path.read_text())))


def no_stock(model):
    """The same model on levels that its own pipeline does not sample: `pipeline.py` is written."""
    return replace(model, process=from_scheduler_config(SCHEDULER))


@pytest.fixture
def sana(tmp_path):
    pipelines.sana().save_pretrained(tmp_path / "sana")
    model = load_teacher(str(tmp_path / "sana"))
    return no_stock(replace(model, conditioning=with_prompts(model.conditioning, ("a cat",))))


def with_entries(model, **entries):
    return replace(model, bundle=replace(model.bundle, entries={**model.bundle.entries, **entries}))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_folder_is_a_literal_in_the_program(sana, tmp_path, text):
    entry = {"complex_human_instruction": ["be kind", "x"]}
    write_pipeline(tmp_path / "plain", with_entries(sana, **entry))
    entry = {"complex_human_instruction": [text, text]}
    write_pipeline(tmp_path / "hostile", with_entries(sana, **entry))
    files = [tmp_path / name / "pipeline.py" for name in ("plain", "hostile")]
    assert tree(files[0]) == tree(files[1])
    constants = [n.value for n in ast.walk(ast.parse(files[1].read_text())) if hasattr(n, "value")]
    assert constants.count(text) == 2


def latent(tmp_path):
    pipelines.dit().save_pretrained(tmp_path / "dit")
    return load_teacher(str(tmp_path / "dit"))


def test_a_dit_of_few_named_classes_brings_its_own_pipeline(tmp_path):
    names = ("shirt", "coat", "bag")
    model = replace(latent(tmp_path), conditioning=ClassLabels(3, 3, names=names))
    write_pipeline(tmp_path / "out", model)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DenoiserPipeline"]
    assert tuple(index["class_names"].values()) == names


@pytest.mark.parametrize(
    "name", ["b=open('x')", "b)\nimport os#", "class", "é", "a b", "", "..", "../up", "/abs", "a/b"]
)
def test_a_component_that_is_no_name_is_refused(tmp_path, name):
    model = latent(tmp_path)
    parts = {**model.bundle.components, name: model.bundle.autoencoder.component}
    model = replace(model, bundle=replace(model.bundle, components=parts))
    with pytest.raises(UsageError, match="is not a name"):
        write_pipeline(tmp_path / "out", model)
    assert not (tmp_path / "out" / "pipeline.py").exists()


@pytest.mark.parametrize("name", ["num_classes", "self", "torch", "unet", "print", "tokenizer_9"])
def test_a_component_of_an_unknown_name_is_left_out(tmp_path, name):
    model = latent(tmp_path)
    write_pipeline(tmp_path / "plain", model)
    parts = {**model.bundle.components, name: model.bundle.autoencoder.component}
    write_pipeline(
        tmp_path / "more", replace(model, bundle=replace(model.bundle, components=parts))
    )
    for file in ("pipeline.py", "model_index.json"):
        assert (tmp_path / "plain" / file).read_text() == (tmp_path / "more" / file).read_text()
    assert not (tmp_path / "more" / name).exists()
    assert name not in COMPONENTS


@pytest.mark.parametrize(
    "config",
    [
        {"latents_mean": ["__import__('os').getcwd()"] * 4},
        {"latents_mean": "0"},
        {"latents_std": [0.5, float("inf"), 1.0, 1.0]},
        {"latents_std": [0.0]},
        {"scaling_factor": "1 if open('x') else 2"},
        {"scaling_factor": float("nan")},
        {"scaling_factor": True},
        {"shift_factor": [1]},
    ],
    ids=repr,
)
def test_numbers_of_an_autoencoder_are_numbers(tmp_path, config):
    model = latent(tmp_path)
    path = tmp_path / "dit" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    [name] = config
    with pytest.raises(DkdmError, match=name):
        model.bundle.autoencoder.standard()
    with pytest.raises(DkdmError, match=name):
        write_pipeline(tmp_path / "out", model)


# --- the three ways into a program ---------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, True, 7, -0.5, 1e300, *HOSTILE, [], [1], (), (1,), (1, "a"), {"a": [None, {"b": (2,)}]}],
)
def test_literals_read_back(value):
    assert ast.literal_eval(literal(value)) == value


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), object(), {1, 2}, b"x", torch.ones(1), [open], 1j]
)
def test_what_has_no_literal_is_refused(value):
    with pytest.raises(UsageError, match="give plain values"):
        literal(value)


def test_subclasses_do_not_write_themselves():
    class Text(str):
        def __repr__(self):
            return "open('x')"

    class Number(float):
        def __repr__(self):
            return "open('x')"

    assert literal([Text("a"), Number(0.5)]) == "['a', 0.5]"


@pytest.mark.parametrize("text", [*HOSTILE, "a.b", "for", "", None, 7, "é"])
def test_what_is_no_name_is_refused(text):
    with pytest.raises(UsageError):
        identifier(text)
    if text not in ("a.b", "é"):
        with pytest.raises(UsageError):
            dotted(text)


# --- how networks are called ---------------------------------------------------------------------


SHIPPED = dict.fromkeys(call for call in CALLS.values() if call is not calls.unet)


def global_names(table):
    inner = set().union(*map(global_names, table.get_children()))
    return inner | {s.get_name() for s in table.get_symbols() if s.is_global()}


@pytest.mark.parametrize("call", SHIPPED, ids=lambda call: call.__name__)
def test_the_source_of_a_call_stands_alone(call):
    text = call_source(call)
    table = symtable.symtable(text, "shipped", "exec")
    used = global_names(table) - set(dir(builtins))
    assert used <= {"torch", "nullcontext", *table.get_identifiers()}
    for function in ast.parse(text).body:
        source = ast.parse(inspect.getsource(getattr(calls, function.name))).body[0]
        assert ast.dump(ast.Module(function.body, [])) == ast.dump(ast.Module(source.body, []))


def test_calls_that_a_pipeline_writes_itself_are_not_shipped():
    assert [call_source(call) for call in (calls.plain, calls.unet, lambda *_: None)] == [
        "",
        "",
        "",
    ]


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3", "pixart", "lumina", "wan"])
def test_a_pipeline_calls_a_text_network_as_training_does(tmp_path, name):
    getattr(pipelines, name)().save_pretrained(tmp_path / "a")
    size = LoadOptions(sample_size={"flux": (8, 8), "wan": (1, 8, 8)}.get(name))
    model = load_teacher(str(tmp_path / "a"), options=size)
    scheduler = {**model.process.scheduler, "use_flow_sigmas": True}  # what no pipeline can keep
    model = replace(model, process=replace(model.process, scheduler=scheduler))
    prompts = with_prompts(model.conditioning, ("a cat", "a dog"), root=tmp_path)
    model = replace(model, conditioning=prompts)
    write_pipeline(tmp_path / "out", model)
    shipped = {}
    exec((tmp_path / "out" / "pipeline.py").read_text(), shipped)
    pipeline = SimpleNamespace(
        **{component_of(type(model.network).__name__): model.network},
        scheduler=SimpleNamespace(scale_model_input=lambda x, t: x),
    )
    pipeline._call = shipped["DenoiserPipeline"]._call
    cond = prompts.embed(prompts.in_turns(2))
    if model.embeds_guidance:
        cond["guidance"] = torch.ones(2)
    x, t = torch.randn(2, *model.sample_shape), torch.tensor([7, 7])
    with torch.no_grad():
        found = shipped["DenoiserPipeline"]._predict(
            pipeline, x, model.network_time[7].float(), cond
        )
    cond = prompts.in_turns(2) | ({"guidance": torch.ones(2)} if model.embeds_guidance else {})
    output = model.predict(Batch(x, t, cond, t)).output
    torch.testing.assert_close(found[:, : output.shape[1]], output)


# --- cards ---------------------------------------------------------------------------------------


def test_entries_of_an_index_are_no_arguments_of_the_cards_lines(tmp_path):
    pipelines.sd3().save_pretrained(tmp_path / "sd3")
    model = load_teacher(str(tmp_path / "sd3"))
    model = replace(model, conditioning=with_prompts(model.conditioning, ("a cat",)))
    odd = {"a=open('x'), b": [None, None], "of_its_own": [None, None]}
    plain = usage_snippet("run", model)
    assert usage_snippet("run", with_entries(model, **odd)) == plain
    ast.parse(plain)


def test_the_repository_in_a_card_is_text(tmp_path):
    card = tmp_path / "README.md"
    card.write_text('x = A.from_pretrained("runs/mine", trust_remote_code=True)\n')
    _name_in_card(card, 'a\\g<0>"b')
    assert ast.parse(card.read_text()).body[0].value.args[0].value == 'a\\g<0>"b'


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("os", "system"),
        ("subprocess", "run"),
        ("m.evil", "Net"),
        ("builtins", "eval"),
        ("diffusers", "DiffusionPipeline"),
        ("diffusers", "StableDiffusionPipeline"),
        ("diffusers", "load_image"),
        ("diffusers", "utils"),
        ("diffusers", "utils.load_image"),
        ("diffusers", "__dict__"),
        ("diffusers", "nothing"),
        ("diffusers.utils", "load_image"),
        ("transformers", "pipeline"),
        ("transformers", "AutoModel"),
        ("transformers", "Trainer"),
        ("transformers", "CLIPTextConfig"),
        ("dkdm", "load_teacher"),
    ],
)
def test_classes_that_no_file_may_name(tmp_path, library, name):
    assert library_class(library, name) is None
    with pytest.raises(UsageError, match="No other class is made because a file names it"):
        Component(tmp_path, library, name).load()


@pytest.mark.parametrize("named", [(None, "A"), (["os"], "system"), ("os", ["x"]), (7, 7)])
def test_names_that_are_no_text(tmp_path, named):
    with pytest.raises(UsageError, match="give a model or tokenizer"):
        component_class(tmp_path, *named)


def test_classes_that_a_file_may_name():
    import diffusers
    import transformers

    assert library_class("diffusers", "AutoencoderKL") is diffusers.AutoencoderKL
    assert library_class("diffusers", "DDIMScheduler") is diffusers.DDIMScheduler
    assert library_class("transformers", "T5EncoderModel") is transformers.T5EncoderModel
    kind = "PreTrainedTokenizerFast"
    assert library_class("transformers", kind) is getattr(transformers, kind)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DiffusionPipeline", "load_image", "x.y", "os"])
def test_no_network(name):
    assert network_class(name) is None


def test_networks_of_dkdm_are_known():
    assert all(network_class(name).__name__ == name for name in HOMES)


@pytest.mark.parametrize("name", HOMES)
def test_the_file_of_a_network_needs_no_dkdm_and_defines_each_name_once(name):
    tree = ast.parse(shipped_source(network_class(name)))
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert name in defined
    assert len(defined) == len(set(defined))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in imports if "dkdm" in ast.unparse(node)]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"attn_implementation": "evil/kernel"}, "attn_implementation is 'evil/kernel'"),
        ({"inner": {"_attn_implementation": {"": "evil/kernel"}}}, "_attn_implementation is"),
        ({"experts_implementation": "a/b"}, "experts_implementation is"),
        ({"text_config": {"auto_map": {"AutoModel": "m.Net"}}}, "auto_map names code"),
        ({"parts": [{"auto_map": {"AutoModel": "m.Net"}}]}, "auto_map names code"),
    ],
)
def test_an_encoder_fetches_no_code(tmp_path, changed, said):
    pipelines.clip().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(UsageError, match=said):
        Component(tmp_path, "transformers", "CLIPTextModel").load()


def test_an_encoders_own_auto_map_is_ignored(tmp_path):
    pipelines.clip().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    auto = {"auto_map": {"AutoModel": "m.Net", "AutoConfig": "a/b--m.Config"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | auto))
    assert type(Component(tmp_path, "transformers", "CLIPTextModel").load()).__name__ == (
        "CLIPTextModel"
    )


@pytest.mark.parametrize("named", [("transformers", "pipeline"), ("os", "system"), ("x.y", "Z")])
def test_the_width_of_an_encoder_is_asked_of_a_known_class(tmp_path, named):
    pipelines.clip().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="No other class is made"):
        encoder_width(Component(tmp_path, *named))
    assert encoder_width(Component(tmp_path, "transformers", "CLIPTextModel")) == 32


def test_an_encoder_takes_no_adapter(tmp_path):
    pipelines.clip().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(UsageError, match="an adapter lies beside"):
        Component(tmp_path, "transformers", "CLIPTextModel").load()


@pytest.mark.parametrize(
    "named", [["os", "DiTTransformer2DModel"], ["m.evil", "DiTTransformer2DModel"], ["x", "UVit"]]
)
def test_the_library_of_the_network_is_the_one_it_is_read_from(tmp_path, named):
    pipelines.dit().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"transformer": named}))
    with pytest.raises(UsageError, match=r"transformer is \["):
        load_teacher(str(tmp_path))


def test_a_user_networks_file_names_its_own_module_only():
    from dkdm.models.custom_network import Origin
    from dkdm.shipping.custom_network import shipment

    good = Origin("Small", "own_networks:make", (1, 8, 8), 1)
    assert ast.parse(shipment(good).text)
    with pytest.raises(UsageError, match="is not a module"):
        shipment(replace(good, factory='own_networks:make"""\nimport os'))
