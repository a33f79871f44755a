"""What a run asks its teacher for, in evaluations, and how many noisy samples its pool holds."""

from __future__ import annotations

import math

from dkdm.config import PoolOptions, TrainingOptions
from dkdm.core.shards import Shards
from dkdm.errors import UsageError

PUBLISHED_RHO = 0.4
FILL_SHARE = 0.2  # of the evaluations that follow, at most, if the pool's size is left open


def newly_drawn(pool: PoolOptions, training: TrainingOptions) -> int:
    """Samples in the new batches of the run: all but those that `--replay` shows again."""
    batches = training.max_train_steps * training.gradient_accumulation_steps
    return math.ceil(batches / pool.replay) * training.batch_size


def pool_entries(pool: PoolOptions, training: TrainingOptions, num_levels: int) -> int:
    """Entries of the pool: as asked, or rho * T * batch, but at most what the run draws.

    If neither is asked for, rho is the paper's, and the fill costs at most FILL_SHARE of the
    evaluations that follow it.
    """
    batch = training.batch_size
    if pool.pool_size is not None:
        if pool.pool_size < batch:
            raise UsageError(
                f"--pool-size {pool.pool_size} is smaller than a batch of {batch}: give {batch} "
                "or more"
            )
        return pool.pool_size
    drawn = newly_drawn(pool, training)
    most, each = float(drawn), evaluations_an_entry(pool, num_levels)
    if pool.rho is None and each:
        most = min(most, FILL_SHARE * drawn / each)
    return max(batch, round(min((pool.rho or PUBLISHED_RHO) * num_levels * batch, most)))


def fill_cost(pool: PoolOptions, size: int, num_levels: int) -> float:
    """Teacher evaluations, of an unguided teacher, that fill a pool of `size` entries."""
    if pool.fill != "few-step":
        return size * evaluations_an_entry(pool, num_levels)
    shards = Shards(min(pool.shards, size)).sizes(size).values()
    return pool.fill_steps * sum(math.ceil(count / pool.entries_of_a_sample) for count in shards)


def evaluations_an_entry(pool: PoolOptions, num_levels: int) -> float:
    """Teacher evaluations, of an unguided teacher, that an entry of a large pool costs to fill."""
    few = pool.fill_steps / pool.entries_of_a_sample
    return {"none": 0.0, "ancestral": num_levels / 2, "few-step": few}[pool.fill]
