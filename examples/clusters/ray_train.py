"""A distillation on a Ray cluster, started anew by Ray when workers are lost.

python ray_train.py, or: ray job submit --working-dir . -- python ray_train.py
"""

from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

WORKERS = 16  # one for each device
OPTIONS: dict[str, Any] = {
    "teacher": "path/to/teacher",
    "student": "dit-s",
    "output_dir": "/runs/mine",  # on a file system that all nodes share
    "train_batch_size": 1024,
    "shards": 16,
    "max_train_steps": 100_000,
    "checkpointing_steps": 1000,
    "resume_from_checkpoint": "latest",
}


def work(options: dict[str, Any]) -> None:
    """What each worker does; Ray has connected them already."""
    import dkdm

    dkdm.distill(config=dkdm.DistillConfig(**options))


def trainer() -> TorchTrainer:
    """The processes, and what happens if one is lost: all start again, from the last checkpoint."""
    return TorchTrainer(
        work,
        train_loop_config=OPTIONS,
        scaling_config=ScalingConfig(num_workers=WORKERS, use_gpu=True),
        run_config=RunConfig(name="dkdm", failure_config=FailureConfig(max_failures=-1)),
    )


if __name__ == "__main__":
    trainer().fit()
