"""Guidance and conditions of the pool, against the closed form of a mixture's classes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import dkdm
from dkdm.config import GuidanceOptions
from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional, guide, restrict_classes
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization, Prediction
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.core.diffusion.steps import reverse_step
from dkdm.core.randomness import generator
from dkdm.core.sources.chains import Guidance, Stride, random_conditioning_odds
from dkdm.core.sources.fill import empty_pool, fill_few_step, uniform_levels
from dkdm.errors import UsageError
from factories import counting, denoiser

LEVELS = 100
CPU = torch.device("cpu")
COSINE = from_betas(beta_schedule("squaredcos_cap_v2", LEVELS))
MIXTURE = GaussianMixture.of(
    means=[[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]], std=0.3, weights=[1, 2, 1], classes=[0, 1, 2]
)
NULL = 3


def make(size=400, teacher=None, **fields):
    """A pool of noise at levels spread evenly."""
    teacher = teacher or mixture_denoiser(MIXTURE, COSINE, Parameterization("v_prediction"))
    pool = empty_pool(teacher, size, CPU, torch.float32, **fields)
    pool.t.copy_(uniform_levels(size, LEVELS, generator("cpu", "levels")))
    return pool


def move(pool, batch_size):
    batch = pool.draw(batch_size)
    target = pool.target(batch)
    pool.advance(batch, target)
    return batch, target


def true_x_0(batch, labels):
    return MIXTURE.posterior_mean(batch.x.double(), *COSINE.at(batch.t), labels)


def guided_x_0(batch, scale):
    """u + w (c - u) of x_0: guidance is linear, so it is the same in every parameterization."""
    free = true_x_0(batch, torch.full_like(batch.t, NULL))
    return free + per_sample(scale, free) * (true_x_0(batch, batch.cond["class_labels"]) - free)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-4)


def assert_chi_square(counts, expected):
    """Counts of independent draws agree with what is expected of them, p > 1e-4."""
    seen = expected > 0
    assert (counts[~seen] == 0).all()
    statistic = ((counts - expected)[seen].double() ** 2 / expected[seen]).sum()
    freedom = torch.tensor((int(seen.sum()) - 1) / 2)
    assert torch.special.gammaincc(freedom, statistic.float() / 2) > 1e-4


# --- the scale -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "low", "high"), [("1", 1, 1), ("4.5", 4.5, 4.5), ("2:8", 2, 8), ("0:1", 0, 1)]
)
def test_scales_are_read(text, low, high):
    options = GuidanceOptions(guidance_scale=text)
    assert Guidance.of_options(options) == Guidance(low, high)
    assert Guidance.of_options(options).is_off == options.is_off == (text == "1")
    assert Guidance.of_options(replace(options, guidance_on="chain")).chain_only


@pytest.mark.parametrize(
    "text", ["", "x", "4:", ":4", "8:2", "1:2:3", "nan", "nan:4", "inf", "2:inf", "2-8"]
)
def test_garbage_is_no_scale(text):
    with pytest.raises(UsageError, match="--guidance-scale .*: give a number .*, or LOW:HIGH"):
        GuidanceOptions(guidance_scale=text)


def test_scales_of_chains_are_uniform():
    scales = Guidance(2.0, 8.0).draw(40_000, generator("cpu", 0))["guidance"]
    assert 2 <= scales.min() < 2.01 < 7.99 < scales.max() <= 8
    counts = ((scales - 2) / 0.6).long().clamp(max=9).bincount(minlength=10)
    assert_chi_square(counts, torch.full((10,), 4000.0))
    assert Guidance(4.0, 4.0).draw(2, generator("cpu", 0))["guidance"].tolist() == [4, 4]
    assert Guidance().draw(2, generator("cpu", 0)) == {}


@pytest.mark.parametrize("guidance", [Guidance(3.0, 3.0), Guidance(2.0, 8.0)])
def test_a_chain_keeps_its_scale_and_the_next_has_its_own(guidance):
    pool = make(stride=Stride(1, 39), guidance=guidance)
    ended = 0
    for _ in range(20):
        before = pool.cond["guidance"].clone()
        batch, _ = move(pool, 100)
        done = pool.t[batch.rows] > batch.t
        others = torch.ones(len(pool.t), dtype=torch.bool)
        others[batch.rows[done]] = False
        assert torch.equal(pool.cond["guidance"][others], before[others])
        ended_at = before[batch.rows[done]]
        assert torch.equal(batch.cond["guidance"][done], ended_at)
        fresh = pool.cond["guidance"][batch.rows[done]]
        assert ((fresh >= guidance.low) & (fresh <= guidance.high)).all()
        if guidance.low < guidance.high:
            assert (fresh != ended_at).all()
        ended += int(done.sum())
    assert ended > 100


# --- the target and the chain --------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3.0, 3.0), Guidance(2.0, 8.0)])
def test_the_target_is_guided_in_closed_form(guidance):
    pool = make(guidance=guidance)
    for _ in range(3):
        batch, target = move(pool, 100)
        scale = batch.cond.get("guidance", torch.ones(100))
        close(target.x_0, guided_x_0(batch, scale))
        explained = COSINE.add_noise(target.x_0, target.eps, batch.t)
        close(explained, batch.x)
    assert pool.evaluations == (300 if guidance.is_off else 600)


@pytest.mark.parametrize("guidance", [Guidance(3.0, 3.0), Guidance(2.0, 8.0)])
def test_a_guided_chain_has_an_unguided_target_for_no_further_evaluation(guidance):
    both, chain = (
        make(guidance=replace(guidance, chain_only=chain_only), stride=Stride(1, 5))
        for chain_only in (False, True)
    )
    for _ in range(10):
        (batch, guided), (same, target) = move(both, 100), move(chain, 100)
        assert torch.equal(batch.x, same.x)
        close(target.x_0, true_x_0(batch, batch.cond["class_labels"]))
        assert (target.x_0 - guided.x_0).abs().max() > 0.1
        assert torch.equal(both.x, chain.x)
        assert torch.equal(both.t, chain.t)
    assert chain.evaluations == both.evaluations


@pytest.mark.parametrize("chain_only", [False, True])
def test_states_move_by_the_guided_reverse_step(chain_only):
    pool = make(guidance=Guidance(2.0, 8.0, chain_only), eta=0.0)
    batch, _ = move(pool, 200)
    x_0 = guided_x_0(batch, batch.cond["guidance"])
    alpha, sigma = (per_sample(value, x_0) for value in COSINE.at(batch.t))
    by_hand = Prediction(x_0, x_0, (batch.x - alpha * x_0) / sigma)
    z, s = torch.zeros_like(x_0), batch.t - 1
    own = pool.teacher.parameterization
    expected = reverse_step(COSINE, own, batch.x.double(), by_hand, batch.t, s, z, eta=0.0)
    going = s >= 0
    close(pool.x[batch.rows][going], expected[going])


def test_a_fill_is_guided_as_the_chain_is():
    point = GaussianMixture.of([[-1.0], [1.0]], std=0.0, classes=[0, 1])
    teacher = mixture_denoiser(point, COSINE, Parameterization("sample"))
    for chain_only in (False, True):
        pool = empty_pool(teacher, 64, CPU, torch.float32, guidance=Guidance(3.0, 3.0, chain_only))
        fill_few_step(pool, 1, 64)
        # From pure noise p(class) is about 1/2: u is about 0, and u + 3 (c - u) about 3 c.
        clean = pool.x[pool.t < 5].flatten() / COSINE.alpha[pool.t[pool.t < 5]]
        labels = pool.cond["class_labels"][pool.t < 5]
        assert ((clean - 3 * (2.0 * labels - 1)).abs() < 0.9).all()


class Halves(nn.Module):
    """A mean that depends on the class, and a variance that does too."""

    def forward(self, x, time, class_labels):
        del time
        label = per_sample(class_labels.to(x), x)
        return torch.cat([label * x, 0.1 * label + 0 * x], dim=1)


def test_guidance_acts_on_the_mean_alone():
    own = Parameterization("epsilon", "learned_range")
    teacher = Denoiser(Halves(), COSINE, own, (2, 3), ClassLabels(4, null_class=4))
    x, t = torch.randn(3, 2, 3), torch.tensor([10, 50, 90])
    batch = Batch(x, t, {"class_labels": torch.tensor([0, 1, 2])}, t)
    scale = torch.tensor([1.0, 2.0, 5.0])
    teacher, counts = counting(teacher)
    unguided, guided = teacher.predict_both(batch, scale)
    label = torch.tensor([0.0, 1.0, 2.0])
    assert torch.equal(unguided.output, per_sample(label, x) * x)
    close(guided.output, per_sample(4 + scale * (label - 4), x) * x)
    for prediction in (unguided, guided):
        close(prediction.variance_output, per_sample(0.1 * label, x).expand_as(x))
    assert counts == [6]
    raw = torch.randn(2, 3, 4, 5)
    assert torch.equal(guide(raw[:1], raw[1:], 7.0, 2)[:, 2:], raw[:1, 2:])


# --- networks that are fed the scale -------------------------------------------------------------


class Fed(nn.Module):
    """A network with a `guidance` argument; notes what it is fed."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, x, time, class_labels, guidance):
        del time, class_labels
        self.seen.append(guidance)
        return self.weight * per_sample(guidance, x) * x


def fed(conditioning=None):
    conditioning = conditioning or ClassLabels(3)
    return Denoiser(Fed(), COSINE, Parameterization("sample"), (2,), conditioning)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3.0, 3.0), Guidance(2.0, 8.0)])
def test_a_network_that_embeds_guidance_is_fed_the_scale_of_each_chain(guidance):
    pool, student = make(teacher=fed(), guidance=guidance), fed()
    batch = pool.draw(50)
    target = pool.target(batch)
    scale = batch.cond.get("guidance", torch.ones(50))
    assert torch.equal(pool.teacher.network.seen[-1], scale)
    assert torch.equal(target.x_0, per_sample(scale, batch.x) * batch.x)
    assert pool.evaluations == 50
    student.predict(batch)
    assert torch.equal(student.network.seen[-1], scale)


def test_a_student_that_embeds_guidance_learns_the_guided_mixture():
    pool, student = make(guidance=Guidance(2.0, 8.0)), fed(ClassLabels(3, null_class=3))
    batch = pool.draw(50)
    assert pool.target(batch).x_0.shape == student.predict(batch).x_0.shape
    assert torch.equal(student.network.seen[-1], batch.cond["guidance"])
    assert len(student.network.seen) == 1


def test_a_student_that_does_not_embed_guidance_is_not_fed_it():
    pool = make(guidance=Guidance(2.0, 8.0))
    student = mixture_denoiser(MIXTURE, COSINE, Parameterization("v_prediction"))
    batch = pool.draw(50)
    close(student.predict(batch).x_0, true_x_0(batch, batch.cond["class_labels"]))


# --- what is refused, before anything is written -------------------------------------------------


@pytest.mark.parametrize("labels", [ClassLabels(3), Unconditional()], ids=["no null", "no class"])
@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": "2"},
        {"guidance_scale": "2:8", "guidance_on": "chain"},
        {"sampling_guidance_scale": 1.5},
        {"condition_dropout": 0.1},
    ],
    ids=lambda options: "-".join(options),
)
def test_guidance_without_a_null_class_is_refused(tmp_path, labels, options):
    classes = 3 if isinstance(labels, ClassLabels) else None
    teacher = replace(denoiser(classes), conditioning=labels)
    config = dkdm.DistillConfig(output_dir=tmp_path / "run", **options)
    with pytest.raises(UsageError, match="need a (null class|conditional model).*--condition-drop"):
        dkdm.distill(teacher, "unet-tiny", config)
    assert teacher.conditioning == labels
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (fed, {"guidance_on": "chain", "guidance_scale": "4"}, "use --guidance-on target"),
        (lambda: denoiser(None), {"random_conditioning": 0.5}, "the teacher is unconditional"),
        (
            denoiser,
            {"random_conditioning": 1.5},
            r"--random-conditioning 1\.5: give a number from 0 to 1",
        ),
        (
            denoiser,
            {"condition_dropout": -0.1},
            r"--condition-dropout -0\.1: give a number from 0 to 1",
        ),
        (denoiser, {"guidance_scale": "four"}, "--guidance-scale 'four': give"),
        (lambda: denoiser(None), {"classes": (1,)}, "--classes or --class-weights was given, but"),
        (denoiser, {"classes": (7,)}, r"class id 7 out of range: use 0\.\.2"),
        (denoiser, {"class_weights": (1.0,)}, "class weights 1.0: give 3 numbers"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, teacher, options, message):
    with pytest.raises(UsageError, match=message):
        config = dkdm.DistillConfig(output_dir=tmp_path / "run", pool_size=128, **options)
        dkdm.distill(teacher(), "unet-tiny", config)
    assert list(tmp_path.iterdir()) == []


# --- classes and their weights -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "weights", "expected"),
    [
        (None, None, [1, 1, 1, 1, 1, 0]),
        ((4, 1), None, [0, 1, 0, 0, 1, 0]),
        (None, (1, 2, 3, 4, 0), [1, 2, 3, 4, 0, 0]),
        ((0, 4, 2), (1, 2, 7), [1, 0, 7, 0, 2, 0]),
    ],
)
def test_classes_are_drawn_by_their_weights_from_the_start_and_at_restarts(
    classes, weights, expected
):
    labels = restrict_classes(ClassLabels(5, null_class=5), classes, weights)
    teacher = Denoiser(lambda x, *_, **__: x, COSINE, Parameterization("sample"), (1,), labels)
    pool = make(6000, teacher=teacher)
    share = torch.tensor(expected) / sum(expected)
    for _ in range(2):
        counts = pool.cond["class_labels"].bincount(minlength=6)
        assert_chi_square(counts, 6000 * share)
        pool.t.zero_()
        move(pool, 6000)
    in_turns = labels.in_turns(10)["class_labels"].unique().tolist()
    assert in_turns == sorted(classes or range(5))


def test_weights_alone_keep_the_classes():
    labels = ClassLabels(5, classes=(1, 3))
    weighted = restrict_classes(labels, None, (1.0, 2.0))
    assert (weighted.classes, weighted.weights) == ((1, 3), (1.0, 2.0))
    assert restrict_classes(labels, None) is labels


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, 2.0, 3.0), (0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0), ()]
)
def test_weights_that_are_none_are_refused(weights):
    accepted = "give (2 numbers >= 0 that are not all|a tuple of finite numbers)"
    with pytest.raises(UsageError, match=f"weights .*: {accepted}"):
        restrict_classes(ClassLabels(5), (1, 3), weights)


def test_no_class_at_all_is_refused():
    with pytest.raises(UsageError, match="give at least one class id"):
        restrict_classes(ClassLabels(5), ())


# --- random conditioning -------------------------------------------------------------------------

OWN, OTHER = 0, 1


def shown_pool(size=400, **fields):
    """Entries are of one class, and whatever is drawn is of another."""
    pool = make(size, **fields)
    pool.teacher.conditioning = ClassLabels(3, null_class=NULL, classes=(OTHER,))
    pool.cond["class_labels"].fill_(OWN)
    return pool


def test_the_law_is_the_published_one():
    t = torch.tensor([0, 500, 700, 999])
    # exp(-lambda * (1 - t / n_T)) with lambda = 5 and n_T = 1000, by the authors' own code.
    published = torch.tensor([0.006737947, 0.082084999, 0.223130160, 0.995012479]).double()
    torch.testing.assert_close(random_conditioning_odds(t, 1000, 1.0), published)
    torch.testing.assert_close(random_conditioning_odds(t, 1000, 0.3), 0.3 * published)


@pytest.mark.parametrize("highest", [0.3, 1.0])
def test_states_are_shown_another_condition_by_the_law(highest):
    pool = shown_pool(4000, random_conditioning=highest)
    swapped, expected, variance = torch.zeros(3, 10)
    for pool.step in range(20):
        batch = pool.draw(4000)
        assert torch.equal(pool.cond["class_labels"][batch.rows], torch.full((4000,), OWN))
        odds = random_conditioning_odds(batch.t, LEVELS, highest).float()
        bucket = batch.t // 10
        swapped.index_add_(0, bucket, (batch.cond["class_labels"] == OTHER).float())
        expected.index_add_(0, bucket, odds)
        variance.index_add_(0, bucket, odds * (1 - odds))
    assert ((swapped - expected).abs() < 4 * variance.sqrt()).all()
    assert (swapped[1:] > swapped[:-1]).all()


def test_the_teacher_labels_and_moves_what_the_student_is_shown():
    pool = shown_pool(random_conditioning=1.0, eta=0.0)
    batch, target = move(pool, 400)
    assert set(batch.cond["class_labels"].tolist()) == {OWN, OTHER}
    close(target.x_0, true_x_0(batch, batch.cond["class_labels"]))
    going = batch.t > 0
    alpha, sigma = (per_sample(value, batch.x) for value in COSINE.at(batch.t - 1))
    close(pool.x[batch.rows][going], (alpha * target.x_0 + sigma * target.eps)[going])
    assert (pool.cond["class_labels"][batch.rows[going]] == OWN).all()
    assert (pool.cond["class_labels"][batch.rows[~going]] == OTHER).all()


def test_another_condition_may_be_the_null_one_and_leaves_the_scale():
    pool = shown_pool(
        4000, random_conditioning=1.0, condition_dropout=0.5, guidance=Guidance(2.0, 8.0)
    )
    pool.t.fill_(LEVELS - 1)
    pool.cond["class_labels"].fill_(OWN)
    batch = pool.draw(4000)
    assert torch.equal(batch.cond["guidance"], pool.cond["guidance"][batch.rows])
    share = torch.tensor([0.0, 0.0, 0.0, 0.0])
    share[OWN] = 1 - torch.tensor(-5 / LEVELS).exp()
    share[[OTHER, NULL]] = (1 - share[OWN]) / 2
    assert_chi_square(batch.cond["class_labels"].bincount(minlength=4), 4000 * share)


def test_what_is_shown_follows_from_the_state():
    options = {"random_conditioning": 0.9, "stride": Stride(1, 39), "guidance": Guidance(2.0, 4.0)}
    pool = make(**options)
    for _ in range(3):
        move(pool, 60)
    restored = make(**options)
    for name, shard in restored.parts().items():
        shard.load_state_dict(pool.parts()[name].state_dict())
    for _ in range(10):
        expected, found = move(pool, 60)[0], move(restored, 60)[0]
        for key in expected.cond:
            assert torch.equal(found.cond[key], expected.cond[key])
        assert torch.equal(restored.x, pool.x)


def test_what_a_shard_shows_does_not_depend_on_the_others():
    few, many = (shown_pool(random_conditioning=0.9) for _ in range(2))
    with_two, with_three = few.draw(16), many.draw(17)
    assert torch.equal(with_two.rows[2:], with_three.rows[3:])
    for key in with_two.cond:
        assert torch.equal(with_two.cond[key][2:], with_three.cond[key][3:])


def test_without_random_conditioning_nothing_is_drawn(monkeypatch):
    plain, shown = shown_pool(), shown_pool(random_conditioning=1.0)
    first, other = plain.draw(200), shown.draw(200)
    for field in ("x", "t", "rows"):
        assert torch.equal(getattr(first, field), getattr(other, field))
    assert (first.cond["class_labels"] == OWN).all()
    purposes = []
    monkeypatch.setattr(
        "dkdm.core.sources.pool.generator",
        lambda *parts: purposes.append(parts[2]) or generator(*parts),
    )
    plain.draw(200)
    assert set(purposes) == {"move"}
