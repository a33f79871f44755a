"""Prompts: how files are read, what the cache holds and encodes, what is drawn."""

import itertools
import json
import random
import tracemalloc
from pathlib import Path

import pytest
import torch

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.core.randomness import generator
from dkdm.errors import DkdmError, UsageError
from dkdm.models import prompts as prompts_module
from dkdm.models import with_texts
from dkdm.models.prompts import (
    EmbeddingCache,
    Prompts,
    TextEncoders,
    folder_fingerprint,
    read_prompts,
    with_prompts,
)

TEXTS = tuple(f"number {i}" for i in range(10))
WIDTH = 3
MAPS = Path("/proc/self/maps")


def embedding(text):
    """What the stand-in encoders make of a text, [WIDTH]."""
    return torch.randn(WIDTH, generator=generator("cpu", "embedding", text))


class Encoders:
    """Text encoders that note what they are asked; `fails_at` texts they give up."""

    def __init__(self, fails_at=None):
        self.asked, self.released, self.fails_at = [], 0, fails_at

    def encode(self, texts):
        if self.fails_at is not None and len(self.asked) >= self.fails_at:
            raise RuntimeError("out of memory")
        self.asked += texts
        rows = torch.stack([embedding(text) for text in texts])
        return {"encoder_hidden_states": rows, "pooled_projections": rows.sum(1).half()}

    def release(self):
        self.released += 1

    def conditioning(self, fingerprint="abc"):
        return Prompts(TextEncoders(self.encode, self.release, fingerprint))


@pytest.fixture
def small_files(monkeypatch):
    """Files of four rows, encoded two at once."""
    monkeypatch.setattr(prompts_module, "ROWS_A_FILE", 4)
    monkeypatch.setattr(prompts_module, "ENCODED_AT_ONCE", 2)


def given(root, texts=TEXTS, **fields):
    return with_prompts(Encoders().conditioning(), texts, root=root, **fields)


def assert_rows(conditioning, cond, texts):
    rows = conditioning.embed(cond)
    expected = torch.stack([embedding(text) for text in texts])
    assert torch.equal(rows["encoder_hidden_states"], expected)
    assert torch.equal(rows["pooled_projections"], expected.sum(1).half())


# --- reading -------------------------------------------------------------------------------------


def test_a_file_has_a_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a cat\r\n\n  a dog\t\n   \na cat\nein Mädchen".encode())
    assert read_prompts(str(file), 10, 0) == ("a cat", "a dog", "ein Mädchen")


def test_the_mark_that_editors_put_first_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a cat\n".encode("utf-8-sig"))
    assert read_prompts(str(tmp_path / "prompts.txt"), 10, 0) == ("a cat",)


def test_a_pattern_takes_all_files_in_the_order_of_their_names(tmp_path, monkeypatch):
    for name, text in (("b.txt", "two\nthree"), ("a.txt", "one\ntwo"), ("c.md", "four")):
        (tmp_path / name).write_text(text)
    assert read_prompts(str(tmp_path / "*.txt"), 10, 0) == ("one", "two", "three")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_prompts("~/[ab].txt", 10, 0) == ("one", "two", "three")


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    (tmp_path / "mine [1].txt").write_text("a cat")
    assert read_prompts(str(tmp_path / "mine [1].txt"), 10, 0) == ("a cat",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompts in it; write one prompt a line"),
        (b" \n\t\n\n", "no prompts in it; write one prompt a line"),
        ("Mädchen".encode("latin-1"), r"cannot be read as UTF-8 text \(.*codec can't decode"),
        (None, "no such file"),
    ],
)
def test_files_without_prompts_are_refused_by_name(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"--prompts .*prompts\.txt: {message}"):
        read_prompts(str(file), 10, 0)


def test_a_folder_is_not_a_file_of_prompts(tmp_path):
    with pytest.raises(UsageError, match="cannot be read as UTF-8 text"):
        read_prompts(str(tmp_path), 10, 0)


def test_a_long_file_is_streamed_and_says_what_was_left_out(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    with open(file, "w") as opened:
        opened.writelines(f"a picture of the number {i}\n" for i in range(90_000))
    tracemalloc.start()
    found = read_prompts(str(file), 1000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 1000
    assert peak < 1e6 < file.stat().st_size
    printed = capsys.readouterr()
    assert "1,000 of 90,000 prompts, drawn at random (--max-prompts)" in printed.err
    assert printed.out == ""
    # A uniform sample: thirds of the file are chosen alike (4 standard deviations are 60).
    thirds = torch.tensor([int(text.rpartition(" ")[2]) // 30_000 for text in found]).bincount()
    assert (thirds - 1000 / 3).abs().max() < 60


def test_the_sample_is_uniform_and_depends_on_the_seed_alone(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(map(str, range(12))))
    chosen = torch.zeros(12)
    for seed in range(2000):
        kept = read_prompts(str(file), 3, seed)
        assert len(set(kept)) == 3
        chosen[[int(text) for text in kept]] += 1
    # Each is kept with probability 1/4: 4 standard deviations are 78.
    assert (chosen - 500).abs().max() < 78
    random.seed(7)
    torch.manual_seed(7)
    assert read_prompts(str(file), 3, 1999) == kept
    assert read_prompts(str(file), 3, 0) != kept
    assert read_prompts(str(file), 12, 5) == tuple(map(str, range(12)))


# --- the cache -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_files")
def test_rows_are_what_was_encoded(tmp_path):
    conditioning = given(tmp_path, negative="ugly")
    assert_rows(conditioning, conditioning.of(["number 9", "number 0"]), ["number 9", "number 0"])
    assert_rows(conditioning, conditioning.null(2), ["ugly", "ugly"])
    assert_rows(conditioning, conditioning.in_turns(11), [*TEXTS, "number 0"])
    files = sorted(file.name for file in (tmp_path / "prompts" / "abc").iterdir())
    assert files == [".lock", *(f"embeddings-0000{i}.safetensors" for i in range(3)), "index.jsonl"]


@pytest.mark.usefixtures("small_files")
def test_every_prompt_is_encoded_once(tmp_path):
    first, second = Encoders(), Encoders()
    with_prompts(first.conditioning(), TEXTS, root=tmp_path)
    assert first.asked == ["", *TEXTS]
    assert first.released == 1
    more = with_prompts(second.conditioning(), ("new", *TEXTS, "new"), root=tmp_path)
    assert second.asked == ["new"]
    assert_rows(more, more.of(["new", *TEXTS]), ["new", *TEXTS])
    third = Encoders()
    with_prompts(third.conditioning(), TEXTS[::-1], root=tmp_path)
    assert (third.asked, third.released) == ([], 0)


def test_other_encoders_have_a_cache_of_their_own(tmp_path):
    given(tmp_path)
    other = Encoders()
    with_prompts(other.conditioning("xyz"), TEXTS, root=tmp_path)
    assert other.asked == ["", *TEXTS]


@pytest.mark.usefixtures("small_files")
def test_what_was_encoded_before_an_interruption_stays(tmp_path):
    failing, later = Encoders(fails_at=6), Encoders()
    with pytest.raises(RuntimeError, match="out of memory"):
        with_prompts(failing.conditioning(), TEXTS, root=tmp_path)
    assert failing.asked == ["", *TEXTS[:5]]
    conditioning = with_prompts(later.conditioning(), TEXTS, root=tmp_path)
    assert later.asked == list(TEXTS[3:])
    assert_rows(conditioning, conditioning.of(TEXTS), TEXTS)


@pytest.mark.usefixtures("small_files")
def test_two_processes_that_encode_at_once_share_the_cache(tmp_path):
    other = Encoders()
    theirs = []

    class Interrupted(Encoders):
        def encode(self, texts):
            if not theirs:  # as another process that encodes other prompts meanwhile
                theirs.append(with_prompts(other.conditioning(), ("theirs", "both"), root=tmp_path))
            return super().encode(texts)

    ours = with_prompts(Interrupted().conditioning(), ("ours", "both"), root=tmp_path)
    assert_rows(ours, ours.of(["ours", "both"]), ["ours", "both"])
    assert_rows(theirs[0], theirs[0].of(["theirs", "both"]), ["theirs", "both"])
    later = Encoders()
    both = with_prompts(later.conditioning(), ("ours", "theirs", "both"), root=tmp_path)
    assert later.asked == []
    assert_rows(both, both.of(["theirs", "ours", "both"]), ["theirs", "ours", "both"])


@pytest.mark.usefixtures("small_files")
def test_rows_that_were_written_but_not_indexed_are_written_again(tmp_path):
    given(tmp_path)
    index = tmp_path / "prompts" / "abc" / "index.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:2]))
    again = Encoders()
    conditioning = with_prompts(again.conditioning(), TEXTS, root=tmp_path)
    assert again.asked == list(TEXTS[7:])
    assert_rows(conditioning, conditioning.of(TEXTS), TEXTS)


@pytest.mark.skipif(not MAPS.is_file(), reason="only Linux says what is mapped")
def test_embeddings_stay_on_disk(tmp_path):
    conditioning = given(tmp_path)
    conditioning.embed(conditioning.null(1))
    held = conditioning.cache.opened[0]["encoder_hidden_states"]
    file = tmp_path / "prompts" / "abc" / "embeddings-00000.safetensors"
    assert held.shape == (len(TEXTS) + 1, WIDTH)
    mapped = [line for line in MAPS.read_text().splitlines() if line.endswith(str(file))]
    ranges = [line.split()[0].split("-") for line in mapped]
    assert any(int(low, 16) <= held.data_ptr() < int(high, 16) for low, high in ranges)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "index.jsonl").write_text('["abc", "de'),
        lambda folder: (folder / "index.jsonl").write_text("7\n"),
        lambda folder: (folder / "index.jsonl").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "embeddings-00000.safetensors").unlink(),
        lambda folder: (folder / "embeddings-00000.safetensors").write_bytes(b"short"),
    ],
    ids=["half a line", "another kind", "not text", "a missing file", "a cut file"],
)
def test_a_damaged_cache_is_named_with_a_remedy(tmp_path, damage):
    given(tmp_path)
    damage(tmp_path / "prompts" / "abc")
    with pytest.raises(DkdmError, match=r"abc: the cache of prompts is damaged .*: delete this fo"):
        given(tmp_path).embed({"prompt": torch.tensor([1])})


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "here"))
    with_prompts(Encoders().conditioning(), TEXTS)
    assert (tmp_path / "here" / "prompts" / "abc" / "index.jsonl").is_file()
    monkeypatch.delenv("DKDM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    with_prompts(Encoders().conditioning(), TEXTS)
    assert (tmp_path / ".cache" / "dkdm" / "prompts" / "abc" / "index.jsonl").is_file()


def test_the_index_holds_hashes_and_no_prompts(tmp_path):
    given(tmp_path)
    index = (tmp_path / "prompts" / "abc" / "index.jsonl").read_text()
    assert "number" not in index
    assert len(json.loads(index)) == len(EmbeddingCache.open(tmp_path / "prompts" / "abc").places)


# --- what is drawn -------------------------------------------------------------------------------


def test_prompts_are_drawn_uniformly_and_dropped_by_chance(tmp_path):
    conditioning = given(tmp_path)
    drawn = conditioning.draw(20_000, generator("cpu", 0))["prompt"]
    counts = drawn.bincount(minlength=11)
    assert counts[0] == 0
    statistic = ((counts[1:] - 2000) ** 2 / 2000).sum()
    assert statistic < 27.9  # chi-square of 9 degrees of freedom, p = 0.001
    dropped = conditioning.draw(20_000, generator("cpu", 0), dropout=0.25)["prompt"]
    assert (dropped == 0).double().mean() == pytest.approx(0.25, abs=0.012)
    assert torch.equal(dropped[dropped > 0], drawn[dropped > 0])


def test_conditions_are_numbers_and_texts_can_be_had_back(tmp_path):
    conditioning = given(tmp_path, negative="ugly")
    assert conditioning.of(["number 3", "number 0"])["prompt"].tolist() == [4, 1]
    assert conditioning.null(2)["prompt"].tolist() == [0, 0]
    assert conditioning.in_turns(12)["prompt"].tolist() == [*range(1, 11), 1, 2]
    assert conditioning.shown_names(4) == ("ugly", *(f"number {i}" for i in range(4)))
    with pytest.raises(UsageError, match="'number 11' is not among the 10 given"):
        conditioning.of(["number 3", "number 11"])


def test_other_conditions_stay_beside_the_embeddings(tmp_path):
    conditioning = given(tmp_path)
    scale = torch.tensor([4.0])
    fed = conditioning.embed(conditioning.null(1) | {"guidance": scale})
    assert set(fed) == {"guidance", "encoder_hidden_states", "pooled_projections"}
    assert fed["guidance"] is scale


def test_shapes_of_embeddings(tmp_path):
    conditioning = given(tmp_path)
    assert conditioning.shape_of("encoder_hidden_states") == (WIDTH,)
    assert conditioning.shape_of("pooled_projections") == ()
    assert conditioning.shape_of("image_embeds") is None


def test_without_prompts_everything_asks_for_them():
    conditioning = Encoders().conditioning()
    calls = [
        lambda: conditioning.draw(1, generator("cpu", 0)),
        lambda: conditioning.in_turns(1),
        lambda: conditioning.embed(conditioning.null(1)),
        lambda: conditioning.shape_of("encoder_hidden_states"),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="give --prompts, a text file"):
            call()


# --- of a model ----------------------------------------------------------------------------------


def text_model(seen):
    """A model whose x_0 is the sum of the prompt's embedding; notes what it is shown."""

    def network(x, time, encoder_hidden_states, pooled_projections):
        del time, pooled_projections
        seen.append(encoder_hidden_states)
        return x * 0 + per_sample(encoder_hidden_states.sum(1), x)

    process = from_betas(beta_schedule("squaredcos_cap_v2", 20))
    conditioning = Encoders().conditioning()
    return Denoiser(network, process, Parameterization("sample"), (2,), conditioning)


def test_a_prompt_may_be_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path))
    seen = []
    model = with_texts(text_model(seen), "a red boot", "ugly")
    assert model.conditioning.texts == ("a red boot",)
    noise = generator("cpu", 0)
    cond = model.conditioning.in_turns(2)
    x_0 = model.sample(lambda _: torch.randn(2, 2, generator=noise), cond, 3, guidance_scale=3.0)
    positive, negative = embedding("a red boot"), embedding("ugly")
    assert torch.equal(seen[-1], torch.stack([positive, positive, negative, negative]))
    guided = negative.sum() + 3 * (positive.sum() - negative.sum())
    torch.testing.assert_close(x_0, guided.expand(2, 2))


def test_prompts_of_files_and_their_absence(tmp_path, monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path))
    (tmp_path / "my prompts.txt").write_text("one\ntwo\nthree")
    model = with_texts(text_model([]), str(tmp_path / "my prompts.txt"), limit=2)
    assert len(model.conditioning.texts) == 2
    assert with_texts(model, None) is model
    with pytest.raises(UsageError, match="give --prompts"):
        with_texts(text_model([]), None)
    with pytest.raises(UsageError, match=r"--prompts none\.txt: no such file"):
        with_texts(text_model([]), "none.txt")
    with pytest.raises(UsageError, match="no such file"):
        with_texts(text_model([]), "my prompts.txt")


# --- fingerprints --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 2 * 2**20, 5 * 2**20])
def test_a_fingerprint_changes_with_a_weight(tmp_path, size):
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    weights = bytearray(size)
    places = [0, size - 1] + ([size // 2] if size <= 2 * 2**20 else [])
    found = []
    for place in [None, *places]:
        changed = weights.copy()
        if place is not None:
            changed[place] = 1
        (folder / "model.safetensors").write_bytes(changed)
        found.append(folder_fingerprint([folder]))
    (folder / "model.safetensors").write_bytes(weights)
    assert folder_fingerprint([folder]) == found[0]
    (folder / "model.safetensors").write_bytes(weights + b"\0")
    found.append(folder_fingerprint([folder]))
    assert len(set(found)) == len(found)


def test_a_fingerprint_changes_with_names_folders_and_what_encoders_are_told(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.json").write_text(name)
    one, two = tmp_path / "one", tmp_path / "two"
    asked = [([one],), ([one], "a"), ([one], "a", "b"), ([one], "ab"), ([one, two],), ([two, one],)]
    found = [folder_fingerprint(*arguments) for arguments in asked]
    (one / "vocab.json").rename(one / "merges.txt")
    found.append(folder_fingerprint([one]))
    for a, b in itertools.combinations(found, 2):
        assert a != b
