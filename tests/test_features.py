"""Feature distillation: what is matched, what its loss is, and that it is part of a run."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import dkdm
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.objectives.feature_loss import (
    feature_map,
    match_features,
    resized,
    stage_maps,
    stage_names,
)
from dkdm.core.saving import checkpoint
from dkdm.errors import UsageError
from dkdm.students import student_of
from factories import denoiser

SIDES = (8, 8)


def batch_of(model, count=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    t = torch.randint(50, (count,), generator=random)
    x = torch.randn(count, 1, 8, 8, generator=random)
    return Batch(x, t, model.conditioning.draw(count, random), t)


def seen(features, teacher, student, guidance=1.0, count=4):
    batch = batch_of(teacher, count)
    with torch.no_grad():
        features.watched(teacher).predict(batch, guidance)
    features.watched(student).predict(batch)
    return features


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (torch.zeros(2, 5, 4, 4), (2, 5, 4, 4)),
        ((torch.zeros(2, 5, 4, 4), (torch.zeros(2, 5, 8, 8),)), (2, 5, 4, 4)),
        (torch.zeros(2, 16, 7), (2, 7, 4, 4)),
        ((torch.zeros(2, 77, 7), torch.zeros(2, 64, 7)), (2, 7, 8, 8)),
        (torch.zeros(2, 77, 7), None),
        (torch.zeros(2, 7), None),
        (None, None),
    ],
)
def test_feature_maps_are_found_in_outputs(output, shape):
    found = feature_map(output, SIDES)
    assert (None if found is None else tuple(found.shape)) == shape


def test_tokens_become_the_map_that_they_were_cut_from():
    image = torch.arange(2 * 3 * 4 * 2.0).reshape(2, 3, 4, 2)
    tokens = image.flatten(2).transpose(1, 2)
    assert torch.equal(feature_map(tokens, (8, 4)), image)


def test_stages_are_the_listed_blocks_and_the_middle():
    teacher = denoiser(levels=2)
    names = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert sorted(stage_names(teacher.network)) == sorted(names)
    assert stage_names(nn.ModuleDict({"first": nn.Linear(1, 1)})) == ["first"]


def test_the_same_network_matches_by_name_and_has_no_loss_through_the_identity():
    teacher = denoiser(levels=2)
    student = replace(teacher, network=copy.deepcopy(teacher.network))
    features = match_features(teacher, student)
    assert len(features.pairs) == 5 and all(a == b for a, b in features.pairs)
    for projection in features.projections:
        nn.init.dirac_(projection.weight)
        nn.init.zeros_(projection.bias)
    loss = seen(features, teacher, student).loss()
    assert loss.shape == (4,) and loss.max() < 1e-10


def test_a_transformer_matches_a_unet_by_resolution():
    teacher = denoiser(levels=2)
    student = student_of("dit-tiny", teacher)  # 8x8 tokens
    features = match_features(teacher, student)
    [(theirs, own)] = features.pairs
    assert theirs == "up_blocks.1"
    assert own == "transformer_blocks.3"
    loss = seen(features, teacher, student).loss()
    assert (loss > 0.1).all()


def test_pairs_can_be_named_and_are_brought_to_the_students_size():
    teacher = denoiser(levels=2)
    student = student_of("dit-tiny", teacher)
    student.network.eval()  # no dropout of labels
    layers = "mid_block=transformer_blocks.1, up_blocks.1 = transformer_blocks.3"
    features = match_features(teacher, student, layers, weight=3.0)
    assert features.pairs[0] == ("mid_block", "transformer_blocks.1")
    once = seen(features, teacher, student).loss()
    features.weight = 1.0
    torch.testing.assert_close(once, 3 * seen(features, teacher, student).loss())
    small = resized(torch.arange(16.0).reshape(1, 1, 4, 4), torch.Size((2, 2)))
    assert small.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize(
    ("student", "pairs"),
    [
        ("bk-tiny", [("up_blocks.1", "up_blocks.0")]),
        ("unet-tiny", [("down_blocks.0", "down_blocks.0"), ("up_blocks.1", "up_blocks.2")]),
    ],
)
def test_stages_are_matched_by_their_place_not_their_number(student, pairs):
    """The last stage up of a network with fewer, or more, of them is the last one's counterpart."""
    teacher = denoiser(layers_per_block=2, levels=2)
    found = match_features(teacher, student_of(student, teacher), "name").pairs
    assert set(pairs) <= set(found)
    assert ("up_blocks.1", "up_blocks.1") not in found


def test_blocks_of_a_shorter_transformer_are_matched_with_those_they_start_from():
    teacher = student_of("dit-tiny", denoiser(levels=2))
    student = student_of("shallow-50", teacher)
    found = match_features(teacher, student).pairs
    assert found == [
        ("transformer_blocks.0", "transformer_blocks.0"),
        ("transformer_blocks.3", "transformer_blocks.1"),
    ]


def test_a_networks_own_output_is_no_stage():
    adm = student_of("adm-14m", replace(denoiser(levels=2), sample_shape=(1, 16, 16)))
    names = list(stage_maps(adm))
    assert names and not any(name.startswith("out.") for name in names)


def test_stages_inside_of_lists_of_lists_are_found():
    names = list(stage_maps(student_of("mobile-tiny", denoiser(levels=2))))
    assert any(name.startswith("down.") for name in names)
    assert any(name.startswith("up.") for name in names)


def test_tokens_of_a_sound_are_told_from_its_maps():
    tokens = torch.arange(2 * 64 * 96.0).reshape(2, 64, 96)
    assert torch.equal(feature_map(tokens, (256,)), tokens.transpose(1, 2))
    assert feature_map(torch.zeros(2, 32, 128), (256,)).shape == (2, 32, 128)


def test_of_a_pictures_and_a_prompts_tokens_the_pictures_are_taken():
    prompt, picture = torch.zeros(2, 512, 7), torch.zeros(2, 2048, 7)
    assert feature_map((prompt, picture), (64, 128)).shape == (2, 7, 32, 64)


def test_gradients_reach_student_and_projections_only():
    teacher, student = denoiser(levels=2), student_of("dit-tiny", denoiser(seed=1, levels=2))
    features = match_features(teacher, student)
    seen(features, teacher, student).loss().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in features.parameters())
    assert student.network.transformer_blocks[0].attn1.to_q.weight.grad is not None
    assert all(p.grad is None for p in teacher.network.parameters())


def test_of_a_guided_teacher_the_conditional_half_is_matched():
    teacher, student = denoiser(levels=2), student_of("dit-tiny", denoiser(levels=2))
    features = match_features(teacher, student)
    plain = seen(features, teacher, student).loss()
    guided = seen(features, teacher, student, guidance=3.0).loss()
    torch.testing.assert_close(plain, guided, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("all", "give auto, name, resolution, or pairs"),
        ("name", r"no stage .* teacher has down_blocks.0 \(4x4\).* student transformer_blocks.0"),
        ("mid_block=blocks.0", "DiTTransformer2DModel has no module blocks.0; its stages are"),
        ("time_embedding=transformer_blocks.0", "time_embedding of the teacher returns no feature"),
    ],
)
def test_what_cannot_be_matched_is_refused(layers, message):
    with pytest.raises(UsageError, match=message):
        match_features(denoiser(levels=2), student_of("dit-tiny", denoiser(levels=2)), layers)


def run(folder, steps=3, **options):
    config = dkdm.DistillConfig(
        output_dir=folder,
        max_train_steps=steps,
        train_batch_size=4,
        pool_size=16,
        fill_steps=2,
        lr_scheduler="constant",
        logging_steps=1,
        checkpointing_steps=2,
        evaluation_samples=0,
        validation_steps=0,
        **options,
    )
    dkdm.distill(denoiser(levels=2), "dit-tiny", config)
    return checkpoint.read_tensors(folder / "transformer" / checkpoint.WEIGHTS)


def test_a_run_with_features_resumes_exactly_and_ships_the_network_alone(tmp_path):
    torch.manual_seed(0)
    whole = run(tmp_path / "whole", feature_weight=0.5)
    run(tmp_path / "parts", steps=2, feature_weight=0.5)
    parts = run(tmp_path / "parts", feature_weight=0.5, resume_from_checkpoint="latest")
    plain = run(tmp_path / "plain")
    assert whole.keys() == plain.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert any(not torch.equal(whole[key], plain[key]) for key in whole)
    assert not any("projection" in key for key in whole)


@pytest.mark.parametrize("before", [0.0, 0.5])
def test_features_cannot_come_and_go_within_a_run(tmp_path, before):
    run(tmp_path, steps=2, feature_weight=before)
    with pytest.raises(UsageError, match="written by a run with.*--feature-weight"):
        run(
            tmp_path,
            feature_weight=0.5 - before,
            resume_from_checkpoint="latest",
            accept_changes=True,
        )


def test_features_need_a_teacher_that_sees_the_batches(tmp_path):
    with pytest.raises(UsageError, match="--feature-weight: with this --source"):
        run(tmp_path, feature_weight=1.0, source="synthetic")
