"""Does a text model draw what it is asked for? A classifier looks at its Fashion-MNIST samples.

    python benchmarks/prompt_agreement.py runs/fashion-text --prompts runs/fashion-prompts.txt

Prints the class accuracy (how often the classifier sees the class that the prompt names), and
the mean brightness of what was asked to be dark, grey and white.
"""

import argparse

import torch

from dkdm.data.fashion import TONES, WORDS
from dkdm.data.named import load_reference
from dkdm.evaluation.metrics import evaluate_images
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.models import load_teacher, with_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = with_texts(load_teacher(args.model), args.prompts)
    cond = model.conditioning.in_turns(args.num_samples)
    sampling = Sampling(args.num_samples, args.steps, args.seed)
    images = decoded(model, draw(model, cond, sampling, args.guidance_scale)).clamp(-1, 1)
    texts = [model.conditioning.text_of(number) for number in cond["prompt"].tolist()]
    labels = torch.tensor([WORDS.index(text.split()[-1]) for text in texts])
    found = evaluate_images(images, labels, load_reference("fashion-test"))
    print(f"class accuracy {found.class_accuracy:.1%}")
    for tone in TONES:
        asked = images[torch.tensor([tone in text.split() for text in texts])]
        inside = asked > -0.9
        print(f"{tone:6s}{asked[inside].mean().item():6.2f}")


if __name__ == "__main__":
    main()
