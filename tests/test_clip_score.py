"""The CLIP score with a tiny random CLIP, against transformers' own preparation and logits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from dkdm.data.clip import MEAN, STD, clip_score
from dkdm.data.resizing import eight_bits
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.same_noise import Sampling
from dkdm.evaluation.single_images import SingleImages

WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "red</w>", "blue</w>", "cat</w>", "dog</w>"]
LETTERS = sorted(set("abcdegloru")) + [f"{c}</w>" for c in sorted(set("abcdegloru"))]
PROMPTS = ["a red cat", "a blue dog", "a cat", "red red red red red red red red red red"]
LENGTH, SIZE = 8, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model as transformers saves it, with 8 tokens and 16 pixels."""
    path = tmp_path_factory.mktemp("clip")
    vocabulary = {word: i for i, word in enumerate([*WORDS, *LETTERS])}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(
        **sizes,
        vocab_size=len(vocabulary),
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vision = CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    CLIPModel(config).save_pretrained(path)
    CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    return path


def images(count=4, channels=3, height=24, width=40):
    pixels = torch.randint(
        0, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(2)
    )
    return pixels / 127.5 - 1


def as_pil_has_it(image):
    """Resized, cropped and normalized as the paper's code does it."""
    picture = Image.fromarray(eight_bits(image[None])[0].permute(1, 2, 0).byte().numpy())
    scale = SIZE / min(picture.size)
    picture = picture.resize(tuple(int(scale * n) for n in picture.size), Image.Resampling.BICUBIC)
    left, top = ((n - SIZE) // 2 for n in picture.size)
    values = np.asarray(picture.crop((left, top, left + SIZE, top + SIZE))) / 255
    return torch.from_numpy((values - MEAN) / STD).permute(2, 0, 1).float()


def test_images_are_prepared_as_by_pil(folder):
    found = clip_score(folder).prepared(images())
    expected = torch.stack([as_pil_has_it(image) for image in images()])
    assert found.shape == (4, 3, SIZE, SIZE)
    levels = (found - expected).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.max() < 1.01
    assert (levels < 0.01).double().mean() > 0.98  # the weights of the two are rounded differently


def test_scores_are_the_cosine_of_the_models_embeddings(folder):
    score = clip_score(folder)
    pictures = images(40)
    prompts = [PROMPTS[i % 4] for i in range(40)]
    found = score(pictures, prompts)
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(pixel_values=score.prepared(pictures), **tokens).logits_per_image
    cosine = logits.diagonal() / model.logit_scale.exp().detach()
    torch.testing.assert_close(found, (100 * cosine).clamp(min=0), rtol=1e-4, atol=1e-3)
    assert (cosine < 0).any() and (cosine > 0).any()
    assert found.min() == 0


def test_batches_and_grey(folder, monkeypatch):
    score, grey = clip_score(folder), images(4, channels=1)
    whole = score(grey, PROMPTS)
    torch.testing.assert_close(score(grey.expand(-1, 3, -1, -1), PROMPTS), whole)
    monkeypatch.setattr("dkdm.data.clip.BATCH", 3)
    torch.testing.assert_close(score(grey, PROMPTS), whole, rtol=1e-4, atol=1e-3)


def test_normalization_of_the_folder(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    black = -torch.ones(1, 3, SIZE, SIZE)
    assert torch.equal(clip_score(tmp_path).prepared(black), torch.full((1, 3, SIZE, SIZE), -2.0))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, "x", 0.5]}')
    with pytest.raises(UsageError, match="preprocessor_config.json holds .*: give 3 numbers"):
        clip_score(tmp_path)


def test_images_and_prompts_that_do_not_fit(folder):
    score = clip_score(folder)
    for wrong, prompts in ((images(4), PROMPTS[:3]), (images(4)[0], PROMPTS)):
        with pytest.raises(UsageError, match="each with a prompt"):
            score(wrong, prompts)


def test_models_that_are_none(folder, tmp_path):
    with pytest.raises(UsageError, match="--clip-model nowhere: give the folder or the hub id"):
        clip_score("nowhere")
    with pytest.raises(UsageError, match=r"config.json is missing: give a CLIP model"):
        clip_score(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="its model_type is 'bert': give a CLIP model"):
        clip_score(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(DkdmError, match="cannot be loaded") as told:
        clip_score(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DkdmError, match="cannot be loaded"):
        clip_score(tmp_path)
    assert "\n" not in str(told.value)


def test_each_image_is_scored_with_its_own_prompt():
    asked = []

    def score(pictures, prompts):
        asked.extend(prompts)
        return torch.full((len(pictures),), float(len(asked)))

    cond = {"prompt": torch.tensor([3, 1, 2, 1])}
    prompts = ("negative", *PROMPTS[:3])
    single = SingleImages(cond, Sampling(4, 1, seed=0), clip=score, prompts=prompts)
    columns = single.of(range(1, 4))
    columns.add(images(2), range(1, 3))
    columns.add(images(1), range(3, 4))
    assert asked == [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    assert columns.whole()["clip"].tolist() == [2, 2, 3] and columns.whole().keys() == {"clip"}
