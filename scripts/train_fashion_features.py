"""Train the packaged Fashion-MNIST feature network and write its weights, statistics and card.

    python scripts/train_fashion_features.py

Five to ten minutes on two CPU threads. The seed is fixed; another machine or another number of
threads sums in another order, so it gives a network as good but not the same.
"""

import argparse
import time
from datetime import date
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from dkdm.data.fashion import load_fashion_mnist
from dkdm.data.fashion.reference import FeatureNetwork
from dkdm.data.reference import FeatureStatistics
from dkdm.evaluation.frechet import frechet_distance
from dkdm.evaluation.metrics import within_class_variance

ASSETS = Path(__file__).parents[1] / "src" / "dkdm" / "data" / "fashion" / "features"
SUBSET_SIZES = (1000, 2000, 5000, 10000)
NUM_DRAWS = 20

CARD = """\
---
license: mit
tags: [image-classification, frechet-distance, fashion-mnist]
---

# Fashion-MNIST features at 16x16

The feature space in which dkdm measures 16x16 Fashion-MNIST images: a small convolutional
classifier whose 64 penultimate activations are compared by Frechet distance, and the statistics of
the real images. Distances in this space are not FID (which uses Inception-v3 features) and compare
only with each other.

| | |
|---|---|
| Data | Fashion-MNIST (Zalando SE, 2017), 28x28 padded to 32x32, averaged over 2x2 \
pixels, in [-1, 1] |
| Licence | MIT, the data and these files |
| Network | `dkdm.data.fashion.reference.FeatureNetwork`: six 3x3 convolutions, \
{parameters:,} parameters |
| Recipe | {epochs} epochs of the 60,000 training images, batch {batch_size}, AdamW, one-cycle \
learning rate up to {learning_rate}, weight decay {weight_decay}, cross-entropy, random shifts of \
one pixel, seed {seed} |
| Cost | {seconds:.0f} s on {threads} CPU threads |
| Command | `python scripts/train_fashion_features.py` |
| Date | {date} |
| Test accuracy | {test_accuracy:.2%} |
| Train accuracy | {train_accuracy:.2%} |
| Size | `model.safetensors` {model_bytes:,} bytes, `statistics.safetensors` \
{statistics_bytes:,} bytes |

## Floors

What real images measure, that is, the best a generator can be asked for. The distance of a sample
of few images is biased upwards, so compare at one number of images. Subsets are drawn {draws} times
at random: the mean and the standard deviation over the draws.

| real images | against | Frechet distance | deviation |
|---|---|---|---|
{floors}

For scale: Gaussian noise of the test images' own mean and variance per pixel measures \
{noise:.1f} (10,000 images against `fashion-test`).

## Files

- `model.safetensors`: the weights, float32.
- `statistics.safetensors`: for `fashion-test` and `fashion-train`, the feature `mean` [64] and
  `covariance` [64, 64], the `count` of images, and `class_variance` [10], the mean over pixels of
  the variance within each class; float64.
"""


def main() -> None:
    """Train, measure, and write the assets."""
    args = _parse_args()
    torch.set_num_threads(args.threads)
    splits = {name: load_fashion_mnist(name) for name in ("train", "test")}
    start = time.perf_counter()
    network = train(*splits["train"], args)
    seconds = time.perf_counter() - start

    features = {n: network.features_in_batches(images) for n, (images, _) in splits.items()}
    statistics = {name: FeatureStatistics.of(x) for name, x in features.items()}
    accuracy = {n: _accuracy(network, features[n], labels) for n, (_, labels) in splits.items()}
    noise = FeatureStatistics.of(network.features_in_batches(_gaussian_like(splits["test"][0])))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(weights, args.output_dir / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, (images, labels) in splits.items():
        tensors[f"fashion-{name}.mean"] = statistics[name].mean
        tensors[f"fashion-{name}.covariance"] = statistics[name].covariance
        tensors[f"fashion-{name}.count"] = torch.tensor(statistics[name].count)
        tensors[f"fashion-{name}.class_variance"] = within_class_variance(images, labels, 10)
    save_file(tensors, args.output_dir / "statistics.safetensors")

    card = CARD.format(
        **vars(args),
        parameters=sum(p.numel() for p in network.parameters()),
        seconds=seconds,
        date=date.today().isoformat(),
        test_accuracy=accuracy["test"],
        train_accuracy=accuracy["train"],
        model_bytes=(args.output_dir / "model.safetensors").stat().st_size,
        statistics_bytes=(args.output_dir / "statistics.safetensors").stat().st_size,
        draws=NUM_DRAWS,
        floors=floor_rows(features, args.seed),
        noise=distance(noise, statistics["test"]),
    )
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")
    print(card)


def train(images: Tensor, labels: Tensor, args: argparse.Namespace) -> FeatureNetwork:
    """Return the network trained on images `[N, 1, 16, 16]` and labels `[N]`, in eval mode."""
    torch.manual_seed(args.seed)
    network = FeatureNetwork()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay
    )
    steps = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.epochs * steps
    )
    for epoch in range(args.epochs):
        total = 0.0
        order = torch.randperm(len(images))[: steps * args.batch_size]
        for batch in order.split(args.batch_size):
            loss = cross_entropy(network(shift_randomly(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{args.epochs}: loss {total / steps:.4f}", flush=True)
    return network.eval().requires_grad_(False)


def shift_randomly(images: Tensor) -> Tensor:
    """Move each image `[N, 1, H, W]` by -1, 0 or 1 pixel in both directions, filling with black."""
    height, width = images.shape[2:]
    windows = pad(images, (1, 1, 1, 1), value=-1.0).unfold(2, height, 1).unfold(3, width, 1)
    rows, columns = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), :, rows, columns]


def floor_rows(features: dict[str, Tensor], seed: int) -> str:
    """Return the table rows of the distances between sets of real images."""
    generator = torch.Generator().manual_seed(seed)
    train, test = features["train"], features["test"]
    whole = FeatureStatistics.of(test)
    halves = [
        distance(*(FeatureStatistics.of(half) for half in _shuffle(test, generator).chunk(2)))
        for _ in range(NUM_DRAWS)
    ]
    overall = distance(FeatureStatistics.of(train), whole)
    rows = [
        f"| 60,000 train | `fashion-test` | {overall:.3f} | |",
        f"| 5,000 test | the other 5,000 test | {_mean_and_deviation(halves)} |",
    ]
    for size in SUBSET_SIZES:
        subsets = [
            distance(FeatureStatistics.of(_shuffle(train, generator)[:size]), whole)
            for _ in range(NUM_DRAWS)
        ]
        rows.append(f"| {size:,} train | `fashion-test` | {_mean_and_deviation(subsets)} |")
    return "\n".join(rows)


def distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the Frechet distance between two sets of features."""
    return frechet_distance(a, b)


def _shuffle(features: Tensor, generator: torch.Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=generator)]


def _mean_and_deviation(values: list[float]) -> str:
    return f"{mean(values):.3f} | {stdev(values):.3f}"


def _gaussian_like(images: Tensor) -> Tensor:
    return images.mean(dim=0) + images.std(dim=0) * torch.randn_like(images)


@torch.no_grad()
def _accuracy(network: FeatureNetwork, features: Tensor, labels: Tensor) -> float:
    return (network.head(features).argmax(dim=1) == labels).double().mean().item()


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=ASSETS)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
