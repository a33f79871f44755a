"""What the pool shows a student: every level equally often, and states on the teacher's own law.

The teachers are exact, so the laws are known. Of three, every jump of any length is exact too:

- point masses with fixed_small: x_0 is known, and the posterior q(x_s | x_t, x_0) is the truth;
- point masses with eta = 0: alpha_s x_0 + sigma_s eps is exact for known x_0;
- unit Gaussians on a variance-preserving process with fixed_large: E[x_0 | x_t] is linear, every
  level has variance 1, and so beta_{t|s} = 1 - (alpha_t / alpha_s)^2 is the variance of x_s | x_t.

For any other mixture a move puts E[x_0 | x_t] in place of x_0 and is exact only as moves become
small: the ancestral chain on the cosine schedule ends within 0.76 / T (fixed_small) of the true
distribution function, largest at t = 0.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dkdm.config import PoolOptions
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import beta_schedule, from_betas, zero_terminal_snr
from dkdm.core.randomness import generator
from dkdm.core.shards import Shards
from dkdm.core.sources.chains import Stride
from dkdm.core.sources.fill import empty_pool, fill_ancestral, fill_few_step, uniform_levels
from dkdm.core.sources.pool import Pool

CPU = torch.device("cpu")
SHARED = {"shards": Shards(2)}  # each shard has generators of its own, at every step
LINE = GaussianMixture.of([[-1.0], [0.5], [2.0]], std=[0.3, 0.2, 0.5], weights=[1, 2, 3])
POINTS = GaussianMixture.of([[-2.0], [0.5], [3.0]], std=0.0, classes=[0, 1, 2])
GAUSSIANS = GaussianMixture.of([[-2.0], [0.5], [3.0]], std=1.0, classes=[0, 1, 2])
EXACT = {
    "points": (POINTS, "fixed_small", 1.0),
    "points, ddim": (POINTS, "fixed_small", 0.0),
    "unit Gaussians": (GAUSSIANS, "fixed_large", 1.0),
}


def cosine(levels):
    return from_betas(beta_schedule("squaredcos_cap_v2", levels))


def zero_snr(levels):
    """Begins at exactly no signal, so that pure noise is exactly the law of T-1."""
    return from_betas(zero_terminal_snr(beta_schedule("squaredcos_cap_v2", levels)))


# --- levels --------------------------------------------------------------------------------------


class AlwaysFromTheTop(Pool):
    """The rule that is right for k = 1 only: chains restart at T-1 whatever the stride."""

    def advance(self, batch, target):
        super().advance(batch, target)
        restarted = batch.rows[self.t[batch.rows] > batch.t]
        self.t[restarted] = self.teacher.process.num_levels - 1


def blank_pool(kind, size, levels, stride):
    """A pool of a teacher that costs nothing, with levels spread as a fill spreads them."""
    teacher = Denoiser(
        lambda x, _: torch.zeros_like(x), cosine(levels), Parameterization("sample"), (1,)
    )
    t = uniform_levels(size, levels, generator("cpu", "levels"))
    return kind(
        teacher,
        torch.randn(size, 1),
        t,
        {},
        Stride.of_options(PoolOptions(stride=stride), levels),
        **SHARED,
    )


def move(pool, batch_size):
    batch = pool.draw(batch_size)
    pool.advance(batch, pool.target(batch))
    return batch


def next_evaluated(pool, batch_size):
    """The level at which each entry is evaluated next.

    The draws of one chain depend on one another; this counts every entry once, and the entries
    are independent. (From the start less than independent: levels begin spread evenly, which only
    makes chi-square smaller.)
    """
    level = torch.full((len(pool.t),), -1)
    while (level < 0).any():
        batch = move(pool, batch_size)
        new = level[batch.rows] < 0
        level[batch.rows[new]] = batch.t[new]
    return level


def chi_square(t, levels):
    """Pearson's statistic against uniform levels, and the probability of one as large."""
    expected = len(t) / levels
    statistic = ((t.bincount(minlength=levels) - expected) ** 2 / expected).sum().double()
    freedom = torch.tensor((levels - 1) / 2, dtype=torch.float64)
    return float(statistic), float(torch.special.gammaincc(freedom, statistic / 2))


def after_cycles(pool, cycles, batch_size):
    """Move every entry round the cycle that many times on average; returns how many chains end."""
    mean = (pool.stride.low + pool.stride.high) / 2
    moves = cycles * pool.teacher.process.num_levels / mean
    batches = (move(pool, batch_size) for _ in range(math.ceil(moves * len(pool.t) / batch_size)))
    return sum(int((batch.s < 0).sum()) for batch in batches)


def check_levels(stride, size, levels):
    pool = blank_pool(Pool, size, levels, stride)
    for when in ("from the start", "after ten cycles"):
        if when == "after ten cycles":
            after_cycles(pool, 10, size // 2)
        found = next_evaluated(pool, size // 2)
        statistic, p = chi_square(found, levels)
        print(f"T={levels} k={stride} {when}: chi-square {statistic:.1f}, p {p:.3f}")
        assert p > 0.01


@pytest.mark.parametrize(
    ("stride", "levels"), [("1", 50), ("random:5", 100), ("random:20", 100), ("20", 100)]
)
def test_levels_stay_uniform(stride, levels):
    check_levels(stride, 1000, levels)


@pytest.mark.slow
@pytest.mark.parametrize("stride", ["1", "random:20", "random:100", "20"])
def test_levels_stay_uniform_at_full_length(stride):
    check_levels(stride, 10_000, 1000)


@pytest.mark.parametrize("stride", ["random:5", "random:20", "20"])
def test_restarting_at_the_top_would_not_keep_them_uniform(stride):
    pool = blank_pool(AlwaysFromTheTop, 2000, 100, stride)
    after_cycles(pool, 2, 1000)
    statistic, p = chi_square(next_evaluated(pool, 1000), 100)
    print(f"T=100 k={stride} restarts at T-1: chi-square {statistic:.1f}, p {p:.1e}")
    assert p < 1e-20


def test_restarting_at_the_top_is_right_at_stride_one():
    wrong, right = (blank_pool(kind, 200, 50, "1") for kind in (AlwaysFromTheTop, Pool))
    after_cycles(wrong, 2, 100)
    assert after_cycles(right, 2, 100) > 300
    assert torch.equal(wrong.t, right.t)


# --- states --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Kolmogorov-Smirnov tests of a pool: at every level, and of all entries together.

    position: where each entry lies in its own law, uniform on 0..1 if the states are right.
    """

    t: Tensor
    position: Tensor
    levels: int

    def band(self, low, high):
        """(D, p) of the entries at levels low..high-1."""
        return kolmogorov_smirnov(self.position[(self.t >= low) & (self.t < high)])

    def assert_good(self, name):
        """Passes a 1 % test at every level, all together, and not too many fail alone.

        Bonferroni: the smallest p of T levels is above 0.01 / T. Alone, 1 % of the levels fail by
        chance; more than the binomial 99 % quantile of them is a failure. All entries together,
        the sharpest test and one made a dozen times here, are tested at 0.1 %.
        """
        p = torch.tensor([self.band(t, t + 1)[1] for t in range(self.levels)])
        distance, pooled = kolmogorov_smirnov(self.position)
        below, allowed = int((p < 0.01).sum()), allowed_failures(self.levels)
        print(
            f"{name}: {len(self.t)} entries, {self.levels} levels, smallest p {p.min():.1e}, "
            f"{below} below 0.01 (allowed {allowed}), together D {distance:.4f} p {pooled:.3f}"
        )
        assert p.min() > 0.01 / self.levels
        assert below <= allowed
        assert pooled > 0.001


def kolmogorov_smirnov(position):
    """(D, p) of values that should be uniform on 0..1, by the asymptotic series.

    Q(x) = 2 sum_j (-1)^(j-1) exp(-2 j^2 x^2) at x = (sqrt(n) + 0.12 + 0.11 / sqrt(n)) D (Stephens,
    1970), good from n = 8 on.
    """
    u, n = position.sort().values, len(position)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum(steps[1:] - u, u - steps[:-1]).max())
    x = (n**0.5 + 0.12 + 0.11 / n**0.5) * distance
    if x < 0.2:
        return distance, 1.0
    total = sum((-1) ** (j - 1) * math.exp(-2 * (j * x) ** 2) for j in range(1, 101))
    return distance, min(max(2 * total, 0.0), 1.0)


def allowed_failures(tests):
    """The smallest c with P(more than c of the tests fail by chance at 1 %) < 1 %."""
    below, count = 0.99**tests, 0
    while below < 0.99:
        count += 1
        below += math.comb(tests, count) * 0.01**count * 0.99 ** (tests - count)
    return count


def fit(pool, mixture, off=0):
    """Hold every entry against the law of its class and its level (or of one `off` by some)."""
    process, position = pool.teacher.process, torch.empty(len(pool.t), dtype=torch.float64)
    labels = pool.cond.get("class_labels", torch.zeros(len(pool.t), dtype=torch.int64))
    for label in labels.unique().tolist():
        own = mixture.of_class(label)
        for t in range(process.num_levels):
            at = min(max(t + off, 0), process.num_levels - 1)
            law = own.noised(float(process.alpha[at]), float(process.sigma[at]))
            on = (pool.t == t) & (labels == label)
            position[on] = law.cdf(pool.x[on].squeeze(1))
    return Fit(pool.t.clone(), position, process.num_levels)


def exact_pool(name, size, levels, **fields):
    mixture, variance, eta = EXACT[name]
    teacher = mixture_denoiser(
        mixture, zero_snr(levels), Parameterization("v_prediction", variance)
    )
    return empty_pool(teacher, size, CPU, torch.float32, eta=eta, **SHARED, **fields), mixture


def line_pool(size, levels, variance="fixed_small", **fields):
    teacher = mixture_denoiser(LINE, cosine(levels), Parameterization("v_prediction", variance))
    return empty_pool(teacher, size, CPU, torch.float32, **SHARED, **fields)


def test_the_statistics_know_their_tables():
    found = chi_square(torch.tensor([0] * 10 + [1] * 20), 2)
    assert found == pytest.approx((10 / 3, 0.06789), rel=1e-4)
    even = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    # The asymptotic 1 % and 5 % points of sqrt(n) D are 1.6276 and 1.3581.
    for point, probability in ((1.6276, 0.01), (1.3581, 0.05)):
        shift = point / (100 + 0.12 + 0.0011) - 0.5e-4
        assert kolmogorov_smirnov(even + shift)[1] == pytest.approx(probability, rel=2e-3)
    assert [allowed_failures(tests) for tests in (1, 50, 100, 1000)] == [0, 3, 4, 18]


@pytest.mark.parametrize("name", ["points", "unit Gaussians"])
def test_the_ancestral_fill_is_exact(name):
    pool, mixture = exact_pool(name, 20_480, 64)
    fill_ancestral(pool, 4096)
    fit(pool, mixture).assert_good(f"ancestral, {name}")


@pytest.mark.parametrize("off", [-1, 1])
def test_a_level_off_by_one_is_noticed(off):
    pool, mixture = exact_pool("points", 20_480, 16)
    fill_ancestral(pool, 4096)
    distance, p = fit(pool, mixture, off).band(1, 15)
    print(f"ancestral, points, judged {off:+} level: D {distance:.4f} p {p:.1e}")
    assert p < 1e-6


def test_the_ancestral_fill_of_a_mixture():
    pool = line_pool(20_480, 100)
    fill_ancestral(pool, 4096)
    fit(pool, LINE).assert_good("ancestral, mixture")


def test_a_wrong_variance_is_noticed():
    pool, mixture = exact_pool("unit Gaussians", 20_480, 8)
    pool.teacher.parameterization = Parameterization("v_prediction", "fixed_small")
    fill_ancestral(pool, 4096)
    distance, p = kolmogorov_smirnov(fit(pool, mixture).position)
    print(f"ancestral, unit Gaussians with fixed_small, T=8: D {distance:.4f} p {p:.1e}")
    assert p < 1e-6


@pytest.mark.parametrize(("stride", "cycles"), [("1", 2), ("10", 4), ("random:10", 4)])
@pytest.mark.parametrize("name", EXACT)
def test_exact_states_stay_exact_through_moves_and_restarts(name, stride, cycles):
    pool, mixture = exact_pool(
        name, 4096, 64, stride=Stride.of_options(PoolOptions(stride=stride), 64)
    )
    fill_few_step(pool, 1, 512)
    assert after_cycles(pool, cycles, 2048) > 4096 * (cycles - 0.2)
    fit(pool, mixture).assert_good(f"after {cycles} cycles of stride {stride}, {name}")


def test_the_few_step_fill_is_right_at_high_noise_and_better_with_more_steps():
    errors = []
    for steps in (3, 10, 40):
        pool = line_pool(20_480, 100)
        fill_few_step(pool, steps, 4096)
        found = fit(pool, LINE)
        low, middle, high = found.band(0, 20), found.band(20, 80), found.band(80, 100)
        print(
            f"few-step fill, {steps} steps: D {low[0]:.4f} at t < 20, {middle[0]:.4f} between, "
            f"{high[0]:.4f} (p {high[1]:.2f}) at t >= 80"
        )
        assert high[1] > 0.01
        errors.append(low[0])
    assert errors[0] > 2 * errors[1] > 3 * errors[2]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_few_step_fill_begins_at_the_top_whatever_the_teachers_spacing(spacing):
    times = []

    def network(x, time):
        times.append(float(time[0]))
        return torch.zeros_like(x)

    process = from_betas(beta_schedule("linear", 100), spacing=spacing)
    teacher = Denoiser(network, process, Parameterization("sample"), (1,))
    fill_few_step(empty_pool(teacher, 8, CPU, torch.float32, shards=Shards(1)), 40, 8)
    assert times[0] == 99
    assert len(times) == 40


@pytest.mark.slow
@pytest.mark.parametrize("name", ["points", "unit Gaussians"])
def test_the_ancestral_fill_is_exact_with_20_000_entries_at_every_level(name):
    pool, mixture = exact_pool(name, 50 * 20_480, 50)
    fill_ancestral(pool, 8192)
    fit(pool, mixture).assert_good(f"ancestral, {name}")


@pytest.mark.slow
def test_20_000_entries_a_level_show_the_error_of_coarse_steps():
    pool = line_pool(50 * 20_480, 50)
    fill_ancestral(pool, 8192)
    found = fit(pool, LINE)
    low, high = found.band(0, 1), found.band(45, 50)
    print(
        f"ancestral, mixture, T=50: D {low[0]:.4f} p {low[1]:.1e} at t = 0, p {high[1]:.2f} at top"
    )
    assert low[1] < 0.01
    assert high[1] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_ancestral_fill_of_a_mixture_at_full_length(variance):
    pool = line_pool(40_960, 1000, variance)
    fill_ancestral(pool, 5120)
    fit(pool, LINE).assert_good(f"ancestral, mixture, {variance}")
