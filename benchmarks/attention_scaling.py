"""Time and memory of one evaluation against the number of tokens: linear and softmax attention.

    python benchmarks/attention_scaling.py

Two transformers of one width and depth, dkdm's LinearTransformer and diffusers' DiT, with patches
of one pixel. Each number is of a process of its own, with one thread and a batch of one: the median
processor time of an evaluation, and how far it raised the peak of resident memory above that of the
idle network.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

WIDTH, DEPTH, HEADS = 96, 4, 3
TOKENS = (256, 1024, 4096, 16384)


def build(kind: str, side: int) -> nn.Module:
    if kind == "linear":
        from dkdm.networks.linear import LinearTransformer

        return LinearTransformer((side, side), (1, 1), 3, 3, WIDTH, DEPTH, HEADS)
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=3,
        num_layers=DEPTH,
        sample_size=side,
        patch_size=1,
        num_embeds_ada_norm=1,
    )


@torch.no_grad()
def measure(kind: str, tokens: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    side = math.isqrt(tokens)
    network, x, t = build(kind, side).eval(), torch.randn(1, 3, side, side), torch.tensor([500.0])
    cond = {} if kind == "linear" else {"class_labels": torch.tensor([0])}
    idle, durations = _peak_mib(), []
    for _ in range(repeats + 1):
        started = time.process_time()
        network(x, t, **cond)
        durations.append(time.process_time() - started)
    return {"seconds": statistics.median(durations[1:]), "mib": _peak_mib() - idle}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs=2, metavar=("KIND", "TOKENS"), help="one row, as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only[0], int(args.only[1]), args.repeats)))
        return
    print("| tokens | linear, ms | softmax, ms | ratio | linear, MiB | softmax, MiB |")
    print("|---|---|---|---|---|---|")
    for tokens in TOKENS:
        linear, softmax = (_row(kind, tokens, args.repeats) for kind in ("linear", "softmax"))
        times = f"{1000 * linear['seconds']:,.0f} | {1000 * softmax['seconds']:,.0f}"
        ratio = f"{softmax['seconds'] / linear['seconds']:.1f}"
        print(f"| {tokens} | {times} | {ratio} | {linear['mib']:,.0f} | {softmax['mib']:,.0f} |")


def _row(kind: str, tokens: int, repeats: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", kind, str(tokens), "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
