"""References from folders and files: what the tensors give, read in batches, and only once."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dkdm.cli import main
from dkdm.data import image_folder
from dkdm.data.array_files import array_images
from dkdm.data.named import chosen_extractor, load_reference
from dkdm.data.real_images import AT_ONCE
from dkdm.data.reference import FeatureExtractor, Features, FeatureStatistics, mismatch
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.circumstances import Circumstances, floors_of, measurement_of
from dkdm.evaluation.frechet import frechet_distance
from dkdm.evaluation.kernel import kernel_distance
from dkdm.evaluation.metrics import Sampled, measure
from dkdm.evaluation.neighbours import coverage
from ranks import launch

SIDE = 8
SEEN: list[int] = []  # how many images the network saw at once


def see(images):
    """Means over columns: four features of any image; as pixels the image itself."""
    SEEN.append(len(images))
    small = torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), (1, 4))
    return Features(small.flatten(1), spatial=small.flatten(1)[:, :2], pixels=images.flatten(1))


FIXED = FeatureExtractor(
    "columns",
    "means of columns",
    see,
    lambda shape: tuple(shape[1:]) == (SIDE, SIDE),
    "(C, 8, 8)",
    num_features=4,
    num_spatial=2,
    gives=frozenset({"spatial", "pixels"}),
)
RESIZING = replace(
    FIXED,
    name="any columns",
    fits=lambda shape: len(shape) == 3 and shape[0] in (1, 3),
    resizes=True,
    compute=lambda images: see(images)._replace(pixels=None),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    SEEN.clear()


def pixels(count, channels=3, side=SIDE, seed=0):
    """Random images, uint8 [N, H, W, C]."""
    shape = (count, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_samples(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def write(folder, images, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{i:04}{suffix}", lossless=True)
    return folder


def same(reference, samples, network=FIXED):
    """Whether a reference summarizes just these samples."""
    seen = network(samples)
    expected = FeatureStatistics.of(seen.features)
    torch.testing.assert_close(reference.features(), seen.features, rtol=0, atol=1e-6)
    torch.testing.assert_close(reference.statistics.mean, expected.mean)
    torch.testing.assert_close(reference.statistics.covariance, expected.covariance)
    torch.testing.assert_close(reference.spatial.mean, expected.mean[:2])
    return reference.statistics.count == len(samples)


def test_a_folder_of_class_folders_is_read_in_batches_with_its_labels(tmp_path):
    images = pixels(2 * AT_ONCE + 7)
    write(tmp_path / "birds" / "owl", images[:40])
    write(tmp_path / "birds" / "raven", images[40:], ".webp")
    found = load_reference(tmp_path / "birds", FIXED)
    assert max(SEEN) == AT_ONCE and sum(SEEN) == len(images)
    assert same(found, as_samples(images))
    assert (found.name, found.shape) == ("birds", (3, SIDE, SIDE))
    parts = as_samples(images).double().flatten(1).split([40, len(images) - 40])
    expected = torch.stack([part.var(dim=0).mean() for part in parts])
    torch.testing.assert_close(found.class_variance, expected)


def test_features_are_kept_for_as_long_as_the_images_are_the_same(tmp_path):
    folder = write(tmp_path / "birds", pixels(9, channels=1))
    first = load_reference(folder, FIXED)
    SEEN.clear()
    again = load_reference(folder.rename(tmp_path / "moved"), FIXED)
    assert not SEEN
    assert torch.equal(again.features(), first.features())
    assert torch.equal(again.statistics.covariance, first.statistics.covariance)
    assert (again.shape, again.statistics.count) == ((1, SIDE, SIDE), 9)
    load_reference(tmp_path / "moved", replace(FIXED, name="other columns"))
    assert sum(SEEN) == 9
    write(tmp_path / "moved", pixels(2, channels=1, seed=1))
    assert same(load_reference(tmp_path / "moved", FIXED), read_back(tmp_path / "moved"))
    SEEN.clear()
    load_reference(tmp_path / "moved", FIXED, cache=False)
    assert sum(SEEN) == 9


def read_back(folder):
    images = [np.array(Image.open(file))[..., None] for file in sorted(folder.iterdir())]
    return as_samples(np.stack(images))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file[:-9],
        lambda _: b"",
        lambda file: file[:-9] + b"123456789",
        lambda f: f[:40],
    ],
)
def test_damaged_features_are_made_again(damage, tmp_path):
    folder = write(tmp_path / "birds", pixels(9))
    first = load_reference(folder, FIXED).features().clone()
    (kept,) = (tmp_path / "cache" / "references").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    SEEN.clear()
    assert torch.equal(load_reference(folder, FIXED).features(), first)
    load_reference(folder, FIXED)
    assert sum(SEEN) == 9


def test_images_that_cannot_be_read_are_named_and_skipped_only_if_asked(tmp_path, capsys):
    folder = write(tmp_path / "birds", pixels(6))
    for name in "abcdefg":
        (folder / f"{name}.png").write_bytes((folder / "0000.png").read_bytes()[:60])
    with pytest.raises(
        DkdmError,
        match="7 of 13 images of .*'a.png', 'b.png', 'c.png', 'd.png', "
        "'e.png', and 2 more.*: remove them, or give --skip-bad",
    ) as refused:
        load_reference(folder, FIXED)
    assert "\n" not in str(refused.value) and not SEEN
    assert same(load_reference(folder, FIXED, skip_bad=True), as_samples(pixels(6)))
    assert "note: 7 of 13 images" in capsys.readouterr().err
    SEEN.clear()
    again = load_reference(folder, FIXED, skip_bad=True)
    said = "7 images of birds cannot be read and are left out"
    assert f"warning: {said}\n" in capsys.readouterr().err and again.warnings == (said,)
    assert said in measurement_of(again, 4).warnings
    with pytest.raises(DkdmError, match="7 of 13"):
        load_reference(folder, FIXED)
    assert not SEEN


def test_numbers_say_what_is_doubtful_about_their_reference(tmp_path, capsys):
    folder = write(tmp_path / "few", pixels(3))
    write(folder, pixels(4, side=SIDE + 1)[3:])
    Image.new("RGB", (9, 12)).save(folder / "high.png")
    for _ in range(2):  # from the cache too
        found = load_reference(folder, RESIZING)
        sizes, count = found.warnings
        assert "the images of few differ in size and are each resized" in sizes
        assert "few holds 4 images, which do not determine the covariance of 4" in count
        said = capsys.readouterr().err
        assert f"warning: {sizes}\n" in said and f"warning: {count}\n" in said
    known = measurement_of(found, 3)
    assert known.warnings[-2:] == found.warnings
    assert known.warnings[0].startswith("Frechet distance of 3 samples cannot be compared")
    (words,) = [text for name, text in _words_of(known) if name == "warning"]
    assert words == "; ".join(known.warnings)
    earlier = _words_of(replace(known, warnings=()))
    assert "warning" not in dict(earlier)


def _words_of(measurement):
    return Circumstances(3, 2, 0, {"": 1.0}, measurement=measurement, metrics=("fd",)).in_words()


def test_links_to_nothing_and_folders_are_images_that_cannot_be_read(tmp_path):
    write(tmp_path / "birds", pixels(3))
    (tmp_path / "birds" / "a.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(DkdmError, match=r"1 of 4 images .* \('a.png'\)"):
        load_reference(tmp_path / "birds", FIXED)
    assert same(load_reference(tmp_path / "birds", FIXED, skip_bad=True), as_samples(pixels(3)))


def stopping(after):
    """The network of a process that is killed when it has seen so many batches."""

    def compute(images):
        if len(SEEN) == after:
            raise KeyboardInterrupt
        return see(images)

    return replace(FIXED, compute=compute)


def test_what_a_killed_process_has_seen_is_not_seen_again(tmp_path, monkeypatch):
    monkeypatch.setattr("dkdm.data.real_images.SHARD", 2 * AT_ONCE)
    images = pixels(5 * AT_ONCE + 7)
    folder, cached = write(tmp_path / "birds", images), tmp_path / "cache" / "references"
    with pytest.raises(KeyboardInterrupt):
        load_reference(folder, stopping(after=5))
    shards = sorted(cached.glob("*/*.safetensors"))
    assert len(SEEN) == 5 and len(shards) == 2
    shards[0].write_bytes(shards[0].read_bytes()[:-1])  # a damaged one is made again
    SEEN.clear()
    found = load_reference(folder, FIXED)
    assert SEEN == [AT_ONCE, AT_ONCE, AT_ONCE, 7]
    assert same(found, as_samples(images))
    assert not any(each.is_dir() for each in cached.iterdir())
    SEEN.clear()
    load_reference(folder, FIXED)
    assert not SEEN


SHARED = """
import os, sys
from pathlib import Path
import torch
from dkdm.data import real_images
from dkdm.data.named import load_reference
os.environ["DKDM_CACHE"] = "shared"
torch.distributed.init_process_group("gloo")
real_images.SHARD = 2 * real_images.AT_ONCE
sys.path.insert(0, {tests!r})
from test_references import FIXED, RESIZING, SEEN
found = load_reference({images!r}, {network}, look=real_images.summarized_by_all)
torch.save([found.features(), found.class_variance, SEEN], f"{{rank}}.pt")
torch.distributed.barrier()  # the first process holds what the others ask
torch.distributed.destroy_process_group()
raise SystemExit(0)
"""


def test_processes_share_what_the_network_is_shown(tmp_path):
    """Whatever the images lie in; none is shown twice, and all processes know what one would."""
    images = pixels(5 * AT_ONCE + 7)
    folder = write(tmp_path / "birds" / "owl", images[:40]).parent
    write(folder / "raven", images[40:])
    mixed = write(tmp_path / "mixed", images[:])
    write(mixed, pixels(3, side=12))
    np.savez(tmp_path / "adm.npz", arr_0=images, arr_1=np.arange(len(images)) % 2)
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    save_file({"samples": as_samples(images).contiguous()}, tmp_path / "samples.safetensors")
    networks = {"birds": FIXED, "mixed": RESIZING, "adm.npz": FIXED, "small.npz": FIXED}
    networks |= {"samples.safetensors": FIXED}
    alone = {name: load_reference(tmp_path / name, each) for name, each in networks.items()}
    tests = str(Path(__file__).parent)
    for name, network in networks.items():
        called = "RESIZING" if network is RESIZING else "FIXED"
        order = SHARED.format(tests=tests, images=str(tmp_path / name), network=called)
        ((code, said),) = launch(tmp_path, (2, order, []))
        assert code == 0, said
        parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
        for features, variance, _ in parts:
            assert torch.equal(features, alone[name].features())
            assert (variance is None) == (alone[name].class_variance is None)
            assert variance is None or torch.equal(variance, alone[name].class_variance)
        assert [sum(seen) for *_, seen in parts] == [3 * AT_ONCE + 7, 2 * AT_ONCE], name
    assert not any(each.is_dir() for each in (tmp_path / "shared" / "references").iterdir())


def test_images_that_are_known_are_not_decoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr("dkdm.data.real_images.SHARD", 2 * AT_ONCE)
    folder = write(tmp_path / "birds", pixels(5 * AT_ONCE + 7))
    with pytest.raises(KeyboardInterrupt):
        load_reference(folder, stopping(after=4))
    decoded = []
    pixels_of = image_folder.pixels_of
    monkeypatch.setattr(image_folder, "pixels_of", lambda x: decoded.append(x) or pixels_of(x))
    load_reference(folder, FIXED)
    assert len(decoded) == AT_ONCE + 7


def test_a_damaged_array_is_found_by_a_process_that_skips_the_damage(tmp_path):
    np.savez(tmp_path / "adm.npz", arr_0=pixels(4 * AT_ONCE))
    content = bytearray((tmp_path / "adm.npz").read_bytes())
    content[300] ^= 1
    (tmp_path / "adm.npz").write_bytes(content)
    images = array_images(tmp_path / "adm.npz").open(FIXED)
    with pytest.raises(DkdmError, match="Bad CRC"):
        list(images.batches([3 * AT_ONCE]))


def test_features_that_are_not_finite_are_refused_at_once_and_not_kept(tmp_path, monkeypatch):
    """So that they are computed, once the network or its device is mended."""
    monkeypatch.setattr("dkdm.data.real_images.SHARD", AT_ONCE)
    folder, broken = write(tmp_path / "birds", pixels(3 * AT_ONCE)), [1.0, float("nan")]

    def compute(images):
        found = see(images)
        found.features[: len(SEEN) - 1] *= broken[-1]
        return found

    network = replace(FIXED, compute=compute)
    with pytest.raises(DkdmError, match="the features of 1 of 50 images are not finite: check"):
        load_reference(folder, network)
    broken.pop()
    SEEN.clear()
    assert same(load_reference(folder, network), as_samples(pixels(3 * AT_ONCE)))
    assert sum(SEEN) == 2 * AT_ONCE + 3 * AT_ONCE  # the second by `same`


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, capsys):
    (tmp_path / "cache").write_text("in the way")
    assert same(load_reference(write(tmp_path / "birds", pixels(3)), FIXED), as_samples(pixels(3)))
    assert "cannot be kept" in capsys.readouterr().err


def test_labels_stay_with_their_images_when_some_are_skipped(tmp_path):
    write(tmp_path / "birds" / "owl", pixels(5))
    write(tmp_path / "birds" / "raven", pixels(5, seed=1))
    (tmp_path / "birds" / "owl" / "0002.png").write_bytes(b"none")
    found = load_reference(tmp_path / "birds", FIXED, skip_bad=True)
    kept = [as_samples(pixels(5))[[0, 1, 3, 4]], as_samples(pixels(5, seed=1))]
    expected = torch.stack([each.double().flatten(1).var(dim=0).mean() for each in kept])
    torch.testing.assert_close(found.class_variance, expected)


def test_a_folder_without_one_good_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"none")
    with pytest.raises(DkdmError, match="1 of 1 images .* give other images"):
        load_reference(tmp_path, FIXED, skip_bad=True)


def test_images_of_several_sizes_need_a_network_that_resizes(tmp_path):
    folder = write(tmp_path / "birds", pixels(6))
    write(folder, pixels(2, side=12))
    with pytest.raises(DkdmError, match="2 of 6 images .* are not 8x8 .*'0000.png', '0001.png'"):
        load_reference(folder, FIXED)
    assert not SEEN
    found = load_reference(folder, RESIZING)
    assert (found.shape, found.statistics.count) == ((3,), 6)
    assert found.fits((3, 64, 64)) and not found.fits((1, 64, 64))


def test_grey_images_among_others_are_measured_as_rgb_and_it_is_said(tmp_path, capsys):
    grey = pixels(2, channels=1)
    folder = write(tmp_path / "birds", pixels(6))
    write(folder, grey)
    expected = torch.cat([as_samples(grey).expand(-1, 3, -1, -1), as_samples(pixels(6)[2:])])
    assert same(load_reference(folder, FIXED), expected)
    assert "2 of 6 images" in (said := capsys.readouterr().err) and "grey" in said


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, SIDE, SIDE), "holds RGB images, the samples are grey: convert the images to grey"),
        ((3, 16, 12), "holds images of 8x8, the samples are 16x12: resize the images to 16x12"),
        ((4, 8, 8), "is for samples of shape"),
    ],
)
def test_samples_of_another_kind_are_refused_before_the_network_sees_an_image(
    shape, said, tmp_path
):
    folder = write(tmp_path / "birds", pixels(5))
    with pytest.raises(DkdmError, match=said):
        load_reference(folder, RESIZING, shape=shape)
    assert not SEEN
    assert said in load_reference(folder, RESIZING).refusal(shape)


def test_files_of_arrays_give_what_the_folder_gives(tmp_path):
    images, labels = pixels(2 * AT_ONCE + 3), np.arange(2 * AT_ONCE + 3) % 3
    samples = as_samples(images)
    np.savez(tmp_path / "raw.npz", arr_0=images, arr_1=labels)
    np.savez_compressed(tmp_path / "small.npz", images)
    np.save(tmp_path / "array.npy", samples.numpy())
    save_file(
        {"samples": samples.contiguous(), "class_labels": torch.from_numpy(labels)},
        tmp_path / "tensors.safetensors",
    )
    found = {
        file.name: load_reference(file, FIXED) for file in tmp_path.iterdir() if file.is_file()
    }
    assert len(found) == 4 and max(SEEN) == AT_ONCE
    assert all(same(each, samples) for each in found.values())
    with_labels = found["raw.npz"].class_variance, found["tensors.safetensors"].class_variance
    assert torch.equal(*with_labels) and len(with_labels[0]) == 3
    assert found["array.npy"].class_variance is None


def statistics(**changed):
    factor = np.random.default_rng(0).normal(size=(4, 4))
    return {"mu": np.arange(4.0), "sigma": factor @ factor.T} | changed


def test_statistics_are_those_of_the_file(tmp_path):
    given = statistics()
    np.savez(tmp_path / "birds.npz", **given, num_images=np.int64(9))
    found = load_reference(tmp_path / "birds.npz", FIXED)
    assert found.statistics.mean.tolist() == given["mu"].tolist()
    assert np.array_equal(found.statistics.covariance, given["sigma"])
    assert (found.features, found.spatial, found.statistics.count) == (None, None, None)
    assert found.floor_features(2) is None
    seen = Sampled(see(as_samples(pixels(9))))
    assert measure(seen, found, ["fd"])["fd"] > 0
    with pytest.raises(UsageError, match="it holds statistics only"):
        measure(seen, found, ["kid"])
    assert measurement_of(found, 9).reference_images is None


def test_the_images_beside_statistics_are_seen_only_if_they_are_needed(tmp_path):
    images = pixels(9)
    np.savez(tmp_path / "birds.npz", **statistics(), arr_0=images)
    found = load_reference(tmp_path / "birds.npz", FIXED)
    assert not SEEN and found.shape == (3, SIDE, SIDE)
    torch.testing.assert_close(found.features(), see(as_samples(images)).features)
    assert found.statistics.mean.tolist() == [0, 1, 2, 3]


def test_spatial_statistics_are_those_of_the_file(tmp_path):
    spatial = {"mu_s": np.arange(2.0), "sigma_s": np.diag([1.0, 2.0])}
    np.savez(tmp_path / "birds.npz", **statistics(), **spatial)
    found = load_reference(tmp_path / "birds.npz", FIXED).spatial
    assert np.array_equal(found.mean, spatial["mu_s"])
    assert np.array_equal(found.covariance, spatial["sigma_s"])


def broken(name, values):
    return lambda path: np.savez(path, **statistics(**{name: np.array(values)}))


def cut(path):
    """An array that is shorter than its header says, in a whole archive."""
    whole = io.BytesIO()
    np.save(whole, pixels(9))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", whole.getvalue()[:-100])


REFUSED = {
    "mean of another network": (broken("mu", [1.0] * 5), r"mu has shape \[5\], not \[4\]"),
    "spatial features of another network": (
        lambda path: np.savez(path, **statistics(), mu_s=np.ones(3), sigma_s=np.eye(3)),
        r"mu_s has shape \[3\], not \[2\]",
    ),
    "rows missing": (broken("sigma", [[1.0] * 4] * 3), r"sigma has shape \[3, 4\]"),
    "not symmetric": (broken("sigma", np.triu(np.ones((4, 4)))), "sigma is not symmetric"),
    "negative": (broken("sigma", -np.eye(4)), "negative variances"),
    "not a number": (broken("mu", [0, 1, np.nan, 3]), "mu holds NaN"),
    "infinite": (broken("sigma", np.full((4, 4), np.inf)), "sigma holds NaN or infinity"),
    "text": (broken("mu", ["a"] * 4), "give mu as numbers"),
    "objects": (broken("mu", [{}] * 4), "give mu as numbers"),
    "neither": (
        lambda path: np.savez(path, other=np.ones(3)),
        "holds 'other': give images as arr_0, or statistics as mu and sigma",
    ),
    "floats": (lambda path: np.savez(path, np.ones((2, 8, 8, 3))), r"uint8 \[N, H, W, C\]"),
    "other sizes": (lambda path: np.savez(path, pixels(3, side=9)), r"shape \(3, 9, 9\)"),
    "none": (lambda path: np.savez(path, pixels(0)), "holds 0 images"),
    "labels": (lambda path: np.savez(path, pixels(3), np.ones(2, int)), r"arr_1 has shape \[2\]"),
    "endless classes": (lambda path: np.savez(path, pixels(2), np.array([0, 2**60])), "99,999"),
    "negative classes": (lambda path: np.savez(path, pixels(2), np.array([0, -1])), "99,999"),
    "cut off": (cut, "ends too early"),
    "no archive": (lambda path: path.write_bytes(b"PK\3\4 none"), "cannot be read"),
    "one image": (lambda path: np.savez(path, pixels(1)), "at least 2"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_files_that_are_no_reference_are_refused(make, said, tmp_path):
    make(tmp_path / "file.npz")
    with pytest.raises(DkdmError, match=said) as refused:
        load_reference(tmp_path / "file.npz", FIXED)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.full((3, 3, 8, 8), 200.0), r"values as large as 200: give samples in \[-1, 1\]"),
        (np.full((3, 3, 8, 8), np.nan), "holds NaN"),
        (np.ones((3, 3, 8, 8), np.uint8), "floating-point"),
        (np.ones((3, 64)), "floating-point"),
        (np.array([{}]), "cannot be read"),
    ],
)
def test_samples_that_are_none_are_refused(samples, said, tmp_path):
    np.save(tmp_path / "file.npy", samples)
    with pytest.raises(DkdmError, match=said):
        load_reference(tmp_path / "file.npy", FIXED)


def test_what_is_no_reference_is_refused_before_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ("--evaluation-reference", "absent", "--feature-network", "fashion")
    embedded = ("--teacher", "builtin:fashion", "--student", "dit-tiny", "--no-check")
    assert main(["distill", *embedded, "--output-dir", "run", *given]) == 2
    assert "there is no reference absent: use fashion-test or" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_floor_is_the_distance_of_as_many_real_images(tmp_path):
    found = load_reference(write(tmp_path / "birds", pixels(30)), FIXED)
    drawn = found.floor_features(12)
    rows = {tuple(row) for row in found.features().tolist()}
    assert len({tuple(row) for row in drawn.features.tolist()} & rows) == 12
    assert torch.equal(drawn.features, found.floor_features(12).features)
    assert found.floor_features(30) is None
    floor = measure(Sampled(drawn), found, ["fd", "kid", "sfid"])
    expected = frechet_distance(FeatureStatistics.of(drawn.features), found.statistics)
    assert floor["fd"] == pytest.approx(expected) and {"kid", "sfid"} <= floor.values.keys()
    about = measurement_of(found, 12)
    assert (about.reference, about.reference_images, about.real_images) == ("birds", 30, 12)
    assert about.real_distance == pytest.approx(expected)
    assert measurement_of(found, 40).real_distance is None


def test_known_statistics_are_the_floor_of_frechet_distances_and_images_that_of_all_else(tmp_path):
    found = load_reference(write(tmp_path / "birds", pixels(30)), FIXED)
    others = FeatureStatistics.of(see(as_samples(pixels(40, seed=1))).features)
    known = replace(found, floor=others)
    floors = floors_of(known, ["fd", "kid", "precision"], 12)
    assert floors["fd"] == (frechet_distance(others, found.statistics), 40)
    assert floors["kid"] == floors_of(found, ["kid"], 12)["kid"]
    assert floors["kid"].num_samples == floors["precision"].num_samples == 12
    assert floors_of(found, ["fd", "is"], 30) == {}  # it has no more images than that


def test_floors_of_single_images_compare_them_with_others(tmp_path):
    found = load_reference(write(tmp_path / "birds", pixels(30)), FIXED)
    seen = found.features()
    apart = found.floor_apart(12)
    rows, others = (
        {tuple(row) for row in x.tolist()} for x in (apart.features.features, apart.others)
    )
    assert len(rows) == 12 and rows | others == {tuple(row) for row in seen.tolist()}
    assert not rows & others
    assert torch.equal(apart.features.features, found.floor_features(12).features)
    names = ["kid", "precision", "recall", "density", "coverage"]
    floors = floors_of(found, names, 12)
    expected = coverage(apart.others, apart.features.features)
    assert {name: floors[name].value for name in names[1:]} == expected._asdict()
    assert floors["kid"].value == kernel_distance(apart.features.features, apart.others)
    assert floors["precision"].value < 1  # which an image beside itself would have
    half = floors_of(found, names, 40)
    assert {floor.num_samples for floor in half.values()} == {15}


def test_no_image_is_seen_for_a_floor_that_no_metric_has(tmp_path):
    found = load_reference(write(tmp_path / "birds", pixels(30)), FIXED)
    asked = []
    watched = replace(found, floor_features=asked.append, floor_apart=asked.append)
    assert floors_of(watched, ["lpips", "lpips_diversity", "clip"], 12) == {} and not asked


def test_few_images_have_no_floor_of_neighbours(tmp_path):
    few = load_reference(write(tmp_path / "few", pixels(11)), FIXED)
    assert floors_of(few, ["kid", "precision"], 40).keys() == {"kid"}
    assert floors_of(few, ["kid"], 40)["kid"].num_samples == 5
    single = replace(few, floor_apart=lambda count: None)
    assert floors_of(single, ["kid"], 4) == {}


def test_a_metric_of_neighbours_needs_some_real_images(tmp_path):
    found = load_reference(write(tmp_path / "birds", pixels(5)), FIXED)
    with pytest.raises(UsageError, match=r"precision .* birds: it holds 5 .* at least 6"):
        measure(Sampled(see(as_samples(pixels(9)))), found, ["precision"])


def test_another_network_sees_fashion_mnist_at_the_size_of_the_samples(tmp_path, monkeypatch):
    splits = {"test": pixels(7, channels=1, side=16), "train": pixels(9, channels=1, side=16)}

    def load(split, size):
        assert size == 16
        return as_samples(splits[split]), torch.arange(len(splits[split])) % 2

    monkeypatch.setattr("dkdm.data.fashion.reference.ROOT", tmp_path)
    monkeypatch.setattr("dkdm.data.fashion.reference.load_fashion_mnist", load)
    found = load_reference("fashion-test", RESIZING, shape=(1, 16, 16))
    torch.testing.assert_close(found.features(), see(as_samples(splits["test"])).features)
    others = {tuple(row) for row in see(as_samples(splits["train"])).features.tolist()}
    assert {tuple(row) for row in found.floor_features(9).features.tolist()} == others
    assert found.floor_features(10) is None and found.floor_apart(10) is None
    apart = found.floor_apart(8)
    assert len(apart.features.features) == 8
    assert torch.equal(apart.others, found.features())  # all of them are other images
    assert found.dataset["name"] == "Fashion-MNIST at 16x16"
    SEEN.clear()
    again = load_reference("fashion-test", RESIZING, shape=(1, 16, 16))
    assert torch.equal(again.floor_features(8).features, apart.features.features)
    assert not SEEN  # another start does not show them to the network
    assert not found.fits((1, 28, 28))


def test_the_packaged_network_sees_a_folder_of_grey_images(tmp_path):
    folder = write(tmp_path / "greys", pixels(8, channels=1, side=28))
    network = chosen_extractor("fashion")
    found = load_reference(folder, network)
    expected = network(as_samples(pixels(8, channels=1, side=28))).features
    torch.testing.assert_close(found.features(), expected, rtol=1e-5, atol=1e-6)
    assert found.fits((1, 16, 16)) and not found.fits((3, 28, 28))


def test_labels_that_are_no_numbers_are_refused(tmp_path):
    samples, labels = torch.zeros(3, 3, SIDE, SIDE), torch.zeros(3, dtype=torch.bfloat16)
    save_file({"samples": samples, "class_labels": labels}, tmp_path / "file.safetensors")
    with pytest.raises(DkdmError, match="file.safetensors cannot be read"):
        load_reference(tmp_path / "file.safetensors", FIXED)
    save_file({"samples": samples, "class_labels": labels.float()}, tmp_path / "file.safetensors")
    with pytest.raises(DkdmError, match="give labels as 3 whole numbers"):
        load_reference(tmp_path / "file.safetensors", FIXED)


def test_channels_without_a_name():
    every = replace(RESIZING, fits=lambda shape: True)
    assert mismatch(every, (2, 8, 8), (3, 8, 8)).startswith("holds 2-channel images, the samples")
