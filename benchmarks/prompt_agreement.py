"""Does a text model draw what it is asked for? A classifier looks at its Fashion-MNIST samples.

    python benchmarks/prompt_agreement.py runs/fashion-text --prompts runs/fashion-prompts.txt

Prints the share of samples in which the classifier sees the class that the prompt names, and
the mean brightness of what was asked to be dark, grey and white.
"""

import argparse

import torch

from dkdm.data.datasets import FASHION_TONES, FASHION_WORDS
from dkdm.evaluation.classes import class_agreement
from dkdm.evaluation.features import to_image_shape
from dkdm.evaluation.same_noise import Plan, draw, pictures
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
    plan = Plan(args.num_samples, args.steps, args.seed)
    images = pictures(model, draw(model, cond, plan, args.guidance_scale)).clamp(-1, 1)
    texts = [model.conditioning.text_of(number) for number in cond["prompt"].tolist()]
    labels = torch.tensor([FASHION_WORDS.index(text.split()[-1]) for text in texts])
    print(f"class {class_agreement(to_image_shape(images), labels):.1%}")
    for tone in FASHION_TONES:
        asked = images[torch.tensor([tone in text.split() for text in texts])]
        inside = asked > -0.9
        print(f"{tone:6s}{asked[inside].mean().item():6.2f}")


if __name__ == "__main__":
    main()
