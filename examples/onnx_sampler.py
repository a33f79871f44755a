"""Samples from an exported model with numpy and onnxruntime: no torch, no diffusers, no dkdm.

    dkdm export runs/mine --format onnx --output student.onnx
    python onnx_sampler.py student.onnx --classes 0 1 2 --num-samples 30 --output samples.png

Reads student.onnx and the student.onnx.json beside it. Pictures become a PNG grid; latents, which
an autoencoder still has to decode, are written as they are, into a .npy file.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime


def load(path):
    """The network as a function of named arrays, and its description."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    facts = json.loads(Path(f"{path}.json").read_text())
    return lambda **inputs: session.run(["output"], inputs)[0], facts


def levels(process, steps):
    """The noise levels visited, from most to least; the spacings are those of diffusers."""
    total = len(process["alpha"])
    if process["spacing"] == "linspace":
        chosen = np.linspace(0, total - 1, steps).round()
    elif process["spacing"] == "trailing":
        chosen = np.arange(total, 0, -total / steps)[:steps].round() - 1
    else:
        chosen = np.arange(steps) * (total // steps) + process["steps_offset"]
    return sorted({min(int(level), total - 1) for level in chosen}, reverse=True)


def clean_and_noise(facts, output, x, alpha, sigma):
    """What the output says of x = alpha * clean + sigma * noise."""
    kind = facts["prediction_type"]
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    if kind == "sample":
        return output, (x - alpha * output) / sigma
    if kind == "v_prediction":
        norm = alpha**2 + sigma**2
        return (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
    if kind == "flow_prediction":  # the velocity, noise - clean
        total = alpha + sigma
        return (x - sigma * output) / total, (x + alpha * output) / total
    data = facts["sigma_data"]  # EDM, arXiv 2206.00364, Eq. 7
    total = sigma**2 + data**2
    clean = x * data**2 / total + output * sigma * data / total**0.5
    return clean, (x - alpha * clean) / sigma


def clipped(clipping, clean, noise, x, alpha, sigma):
    """The clean prediction kept in range, as the model's own scheduler does it."""
    if clipping is None:
        return clean, noise
    if clipping["quantile"] is not None:
        raise SystemExit("dynamic thresholding is not written here")
    clean = clean.clip(clipping["low"], clipping["high"])
    return clean, (x - alpha * clean) / sigma if clipping["rederive_eps"] else noise


def sample(evaluate, facts, noise, labels=None, steps=25, guidance_scale=1.0):
    """Run the chain from standard normal noise [B, C, ...]: DDIM, which on a flow is Euler's rule.

    labels: class ids [B]. Source: arXiv 2010.02502, Eq. 12.
    """
    process, channels = facts["process"], noise.shape[1]
    x, visited = noise * np.float32(process["start_std"]), levels(process, steps)
    for level, following in zip(visited, [*visited[1:], None], strict=True):
        alpha, sigma = (np.float32(process[name][level]) for name in ("alpha", "sigma"))
        data = facts["sigma_data"]
        shown = x if data is None else x / np.float32((sigma**2 + data**2) ** 0.5)
        inputs = {"sample": shown, "timestep": np.full(len(x), process["timestep"][level], "f4")}
        if labels is not None:
            inputs["class_labels"] = labels
        output = evaluate(**inputs)
        if guidance_scale != 1:
            null = np.full_like(labels, facts["classes"]["null"])
            free = evaluate(**{**inputs, "class_labels": null})
            output = free + guidance_scale * (output - free)
        parts = clean_and_noise(facts, output[:, :channels], x, alpha, sigma)
        clean, eps = clipped(process["clipping"], *parts, x, alpha, sigma)
        last = process["final"]
        pair = last if following is None else [process[k][following] for k in ("alpha", "sigma")]
        x = np.float32(pair[0]) * clean + np.float32(pair[1]) * eps
    return x


def grid(samples, low, high, columns=10, scale=4):
    """A picture of samples [N, 1 or 3, H, W], in rows."""
    from PIL import Image

    count, channels, height, width = samples.shape
    rows = -(-count // columns)
    pixels = ((samples - low) / (high - low) * 255).clip(0, 255).round().astype("uint8")
    sheet = np.full((rows * columns, channels, height, width), 255, "uint8")
    sheet[:count] = pixels
    sheet = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, default=Path("samples.png"))
    parser.add_argument("--num-samples", type=int, default=40)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--classes", type=int, nargs="+", help="taken in turns; all by default")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    evaluate, facts = load(args.model)
    others = {i["name"] for i in facts["inputs"]} - {"sample", "timestep", "class_labels"}
    if others:
        raise SystemExit(
            f"this model is fed {', '.join(sorted(others))} too: feed them in sample()"
        )
    classes, labels = facts["classes"], None
    if args.guidance_scale != 1 and (classes is None or classes["null"] is None):
        raise SystemExit("--guidance-scale needs a model with a null class")
    if classes is not None:
        learnt = classes.get("learnt") or list(range(classes["count"]))
        unknown = set(args.classes or []) - set(learnt)
        if unknown:
            raise SystemExit(f"--classes {min(unknown)}: expected some of {learnt}")
        labels = np.resize(args.classes or learnt, args.num_samples).astype("int64")
    shape = facts["inputs"][0]["shape"][1:]
    noise = np.random.default_rng(args.seed).standard_normal((args.num_samples, *shape), "f4")
    samples = sample(evaluate, facts, noise, labels, args.steps, args.guidance_scale)
    output = args.output
    if facts["latents"] is not None or len(shape) != 3 or shape[0] not in (1, 3):
        output = output.with_suffix(".npy")  # latents: decode x / scale + shift
        np.save(output, samples)
    else:
        grid(samples, *facts["value_range"]).save(output)
    print(output)


if __name__ == "__main__":
    main()
