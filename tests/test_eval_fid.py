"""eval_fid.py and the metrics of generated images under it, with a small stand-in for the Inception network."""

import http.server
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cleanfid.fid import frechet_distance
from conftest import flags, run_command, tiny_rae
from inception_standin import Inception
from PIL import Image
from torch import nn
from torch.nn import functional as F

import eval_fid
from rae_suite import precision_recall
from rae_suite.downloads import fetched_file
from rae_suite.errors import ConfigError, DataError
from rae_suite.frechet import FrechetMetric
from rae_suite.generation_metrics import (
    FeatureSpace,
    GenerationReference,
    ImageStatistics,
    InceptionScore,
    generation_metrics,
)
from rae_suite.generation_reference import references_of
from rae_suite.image_sets import ArrayImages, natural_order, open_images
from rae_suite.inception import SPATIAL_WIDTH, InceptionParts, load_inception_parts
from rae_suite.launch import run_main, without_tf32
from rae_suite.precision_recall import precision_and_recall, squared_distances

SIZE = 32  # pixels
NAMES = ("fid", "sfid", "is", "precision", "recall")


def make_pictures(count: int, seed: int, strength: float = 60) -> np.ndarray:
    """Smooth images with noise, uint8 (count, SIZE, SIZE, 3), each unlike the others."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(count, 3, 3, 3, generator=generator), SIZE, mode="bilinear") * 200
    noisy = smooth + strength * torch.rand(count, 3, SIZE, SIZE, generator=generator)
    return noisy.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict:
    """{name: (.npz file, its images)} of 40 samples and 30 reference images, which overlap."""
    folder = tmp_path_factory.mktemp("sets")
    reference = make_pictures(30, seed=1)
    samples = np.concatenate([make_pictures(30, seed=2, strength=70), reference[:10] // 8 * 8])
    files = {"samples": (folder / "samples.npz", samples), "reference": (folder / "reference.npz", reference)}
    np.savez(files["samples"][0], arr_0=samples)
    np.savez_compressed(files["reference"][0], arr_0=reference)
    return files


@pytest.fixture(scope="module")
def rae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "run" / "final"
    tiny_rae().save_pretrained(folder)
    return folder


@pytest.fixture
def measure(sets, inception, tmp_path, monkeypatch):
    """Run main() in this process; gives results.json, or None if there are no samples."""

    def run(settings=(), output="out", without=()) -> dict:
        arguments = {"samples": sets["samples"][0], "reference": sets["reference"][0], "inception_path": inception}
        arguments.update({"output_dir": tmp_path / output, "num_workers": 0})
        arguments.update(settings)
        arguments = {key: value for key, value in arguments.items() if key not in without}
        monkeypatch.setattr("sys.argv", ["eval_fid.py", *flags(arguments)])
        run_main(eval_fid.main)
        if "samples" not in arguments:
            return None
        return json.loads((Path(arguments["output_dir"]) / "results.json").read_text())

    return run


@pytest.fixture(scope="module")
def parts(inception):
    return load_inception_parts(str(inception), "inception_path", torch.device("cpu"))


def features_of(parts, pictures: np.ndarray) -> tuple:
    """(pooled, spatial) as NumPy arrays."""
    pooled, spatial = parts.features(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    return pooled.numpy(), spatial.numpy()


# ------------------------------------------------------------------------------------------------------ plain formulas


def plain_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The Frechet distance of two sets of fewer rows than columns: tr sqrt(C1 C2) is the nuclear norm of X1 X2^T over
    sqrt((n1 - 1)(n2 - 1)), for centred rows."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    centred = [part - part.mean(0) for part in (x, y)]
    scale = [np.sqrt(len(part) - 1) for part in (x, y)]
    traces = [(part**2).sum() / (len(part) - 1) for part in centred]
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / np.prod(scale)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + sum(traces) - 2 * overlap


def plain_precision_and_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple:
    def squared(a, b):
        return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)

    radii = [np.sort(squared(part, part), axis=1)[:, k] for part in (reference, samples)]
    between = squared(reference, samples)
    return (between <= radii[0][:, None]).any(0).mean(), (between <= radii[1]).any(1).mean()


def plain_score(logits: np.ndarray, chunk: int = 5000) -> float:
    scores = []
    for start in range(0, len(logits), chunk):
        part = np.exp(logits[start : start + chunk].astype(np.float64))
        part /= part.sum(1, keepdims=True)
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def score_of(logits: torch.Tensor, batch_size: int = 7, **options) -> float:
    score = InceptionScore(len(logits), logits.shape[1], **options)
    for index in torch.arange(len(logits)).flip(0).split(batch_size):  # in any order
        score.update(logits[index], index)
    return score.score()


def test_recorded_numbers(monkeypatch):
    """Numbers that were recorded from ADM's formulas, for small sets that are written down here."""
    reference = np.sin(0.7 * np.arange(60)).reshape(30, 2)
    samples = 0.9 * np.sin(1.3 * np.arange(80) + 0.5).reshape(40, 2)
    tensors = [torch.from_numpy(part).float() for part in (reference, samples)]
    for block in (7, 10_000):
        monkeypatch.setattr(precision_recall, "BLOCK", block)
        monkeypatch.setattr(precision_recall, "FLOAT16_BLOCK", block)
        for float16 in (False, True):
            found = precision_and_recall(*tensors, Accelerator(), float16)
            assert found == pytest.approx((0.775, 0.466667), abs=1e-6)
    statistics = [(part.mean(0), np.cov(part, rowvar=False)) for part in (reference, samples)]
    assert frechet_distance(*statistics[0], *statistics[1]) == pytest.approx(0.0906952, abs=1e-7)
    logits = torch.from_numpy(2 * np.sin(0.9 * np.arange(400) + 0.2).reshape(40, 10))
    assert score_of(logits) == pytest.approx(1.7499129, abs=1e-7)
    assert score_of(logits, chunk=10) == pytest.approx(1.7367455, abs=1e-7)


def test_inception_score_is_the_formula():
    """A last chunk that is not full, probabilities that are 0 in float32, and torch-fidelity's permutation."""
    logits = 30 * torch.randn(23, 12, generator=torch.Generator().manual_seed(0))
    for chunk in (5, 23, 100):
        assert score_of(logits, chunk=chunk) == pytest.approx(plain_score(logits.numpy(), chunk), rel=1e-12)
    shuffled = logits[np.random.RandomState(2020).permutation(23)].numpy()
    assert score_of(logits, chunk=5, shuffled=True) == pytest.approx(plain_score(shuffled, 5), rel=1e-12)
    by_class = 9.0 * torch.eye(10).repeat_interleave(5, 0)
    assert score_of(by_class, chunk=5) == pytest.approx(1) and score_of(by_class, chunk=5, shuffled=True) > 3


def test_precision_and_recall_are_the_formula(monkeypatch):
    """Blocks that end anywhere, several dimensions, and images that stand in a set twice."""
    monkeypatch.setattr(precision_recall, "BLOCK", 16)
    for seed in range(3):
        random = np.random.default_rng(seed)
        reference, samples = random.standard_normal((50, 8)), 0.8 * random.standard_normal((70, 8)) + 0.3
        reference[:6] = reference[6:12]
        reference, samples = reference.astype(np.float32), samples.astype(np.float32)
        found = precision_and_recall(torch.from_numpy(reference), torch.from_numpy(samples), Accelerator())
        assert found == pytest.approx(plain_precision_and_recall(reference, samples), abs=1e-12)
        assert 0.1 < min(found) and max(found) < 1


def test_ties_are_within_the_radius():
    """Whole numbers, whose distances are exact: an image at the radius counts, one beyond it does not."""
    reference = torch.tensor([[0.0], [1], [2], [3], [4]])  # whose radii are 3, 2, 2, 2, 3
    for samples, expected in (
        ([-3, 7, 7, 7], (1, 1)),  # the samples' radii are 10
        ([-4, 8, 8, 8], (0, 1)),
        ([4, 4, 4, 4], (1, 0.2)),  # radius 0
        ([8, 8, 8, 8], (0, 0)),
    ):
        column = torch.tensor(samples).float()[:, None]
        assert precision_and_recall(reference, column, Accelerator()) == pytest.approx(expected), samples
        assert plain_precision_and_recall(reference.numpy(), column.numpy()) == pytest.approx(expected)


def test_float16_distances_are_adms():
    """Each step rounded; where a value overflows, the whole block is of float32."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((5, 300)).astype(np.float32), random.standard_normal((4, 300)).astype(np.float32)
    small, other = (part.astype(np.float16) for part in (a, b))
    product = (small.astype(np.float64) @ other.astype(np.float64).T).astype(np.float16)
    norms = [np.square(part).astype(np.float64).sum(1).astype(np.float16) for part in (small, other)]
    expected = np.maximum(norms[0][:, None] - 2 * product + norms[1], 0)
    rounded = squared_distances(torch.from_numpy(a), torch.from_numpy(b), float16=True)
    assert rounded.dtype == torch.float32 and expected.dtype == np.float16
    np.testing.assert_allclose(rounded.numpy(), expected.astype(np.float32), atol=1)  # a step of float16 at 512
    exact = squared_distances(torch.from_numpy(a), torch.from_numpy(b))
    assert not torch.equal(rounded, exact) and set((rounded % 0.25).unique().tolist()) == {0.0}
    a[0, 0] = 300  # 90,000 is more than float16 has
    with_outlier = squared_distances(torch.from_numpy(a), torch.from_numpy(b), float16=True)
    assert torch.equal(with_outlier, squared_distances(torch.from_numpy(a), torch.from_numpy(b)))


# --------------------------------------------------------------------------------------------------------- the network


def test_the_networks_parts(parts):
    """Pooled features are the network's own; spatial ones are mixed_6's first 7 channels by row, column, channel;
    logits lack the bias."""
    images = torch.from_numpy(make_pictures(3, seed=5)).permute(0, 3, 1, 2)
    pooled, spatial = parts.features(images)
    torch.testing.assert_close(pooled, parts.network(images, return_features=True), rtol=1e-5, atol=1e-6)
    children, x = dict(parts.network.layers.named_children()), None
    network = Inception()
    network.load_state_dict(parts.network.state_dict())
    network.layers = nn.Sequential(
        *[network.layers.get_submodule(n) for n in ("conv", "relu", "pool0", "mixed_6.conv")]
    )
    x = network(images, return_features=True).view(3, 12, 17, 17)
    assert "mixed_6" in children and spatial.shape == (3, SPATIAL_WIDTH)
    for row, column, channel in ((0, 0, 0), (3, 5, 6), (16, 16, 2)):
        place = (row * 17 + column) * 7 + channel
        torch.testing.assert_close(spatial[:, place], x[:, channel, row, column], rtol=1e-5, atol=1e-6)
    probabilities = parts.network(images, no_output_bias=True)
    torch.testing.assert_close(parts.logits(pooled).softmax(1), probabilities, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(probabilities, parts.network(images), atol=1e-3)


class HalfPixels(Inception):
    """Resizes as torch does, shifted by half a pixel."""

    def forward(self, x: torch.Tensor, return_features: bool = False, use_fp16: bool = False,
                no_output_bias: bool = False) -> torch.Tensor:  # fmt: skip
        x = F.interpolate(x, size=[299, 299], mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128).flatten(1)
        return features if return_features else F.linear(features, self.output.weight).softmax(1)


class Nearest(Inception):
    """Resizes without interpolation."""

    def forward(self, x: torch.Tensor, return_features: bool = False, use_fp16: bool = False,
                no_output_bias: bool = False) -> torch.Tensor:  # fmt: skip
        rows = (torch.arange(299) * (x.shape[2] / 299)).long()
        columns = (torch.arange(299) * (x.shape[3] / 299)).long()
        features = self.layers((x[:, :, rows][:, :, :, columns] - 128) / 128).flatten(1)
        return features if return_features else self.output(features).softmax(1)


def other_network(name: str) -> nn.Module:
    network = {"half pixels": HalfPixels, "nearest": Nearest}.get(name, Inception)()
    if name == "narrow":
        network.layers.mixed_6.conv, network.layers.mixed_6.tower = nn.Conv2d(32, 5, 1), nn.Conv2d(32, 27, 1)
    elif name == "nameless":
        network.layers = nn.Sequential(*network.layers)
    return network.eval()


@pytest.mark.parametrize(
    "name, words",
    [
        ("half pixels", "give other features than the whole network"),
        ("nearest", "give other features than the whole network"),
        ("narrow", "expected 2023 values of the network's mixed_6.conv, got 1445"),
        ("nameless", "expected 2023 values of the network's mixed_6.conv, got None"),
        ("biased", "give other probabilities than the whole network"),
        ("without classes", "the network's parts are not where they should be"),
    ],
)
def test_networks_whose_parts_differ(tmp_path, monkeypatch, name, words):
    """No silent difference: such a file is refused when it is loaded."""
    if name == "without classes":
        monkeypatch.setattr(InceptionParts, "logits", lambda self, pooled: pooled @ self.network.logits.weight.T)
    if name == "biased":
        monkeypatch.setattr(InceptionParts, "logits", lambda self, pooled: self.network.output(pooled))
    torch.jit.script(other_network(name)).save(str(tmp_path / "other.pt"))
    with pytest.raises(ConfigError, match=f"^inception_path: .*{words}.*expected the TorchScript network"):
        load_inception_parts(str(tmp_path / "other.pt"), "inception_path", torch.device("cpu"))


def test_measuring_is_without_tf32():
    """Also in a training run that allows it."""
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    try:
        for allowed in (True, False):
            for part in parts:
                part.allow_tf32 = allowed
            with without_tf32():
                assert not any(part.allow_tf32 for part in parts)
            assert all(part.allow_tf32 == allowed for part in parts)
    finally:
        for part, allowed in zip(parts, before, strict=True):
            part.allow_tf32 = allowed


def test_the_real_network():
    """Where its file is present: loading compares its parts with its own answers."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / "inception-2015-12-05.pt"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    parts = load_inception_parts(None, "inception_path", torch.device("cpu"))
    images = torch.from_numpy(make_pictures(3, seed=5)).permute(0, 3, 1, 2)
    pooled, spatial = parts.features(images)
    torch.testing.assert_close(pooled, parts.network(images, return_features=True), rtol=1e-4, atol=1e-4)
    assert spatial.shape == (3, SPATIAL_WIDTH) and (spatial >= 0).all() and spatial.std() > 0
    probabilities = parts.network(images, no_output_bias=True)
    torch.testing.assert_close(parts.logits(pooled).softmax(1), probabilities, rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- the command


def test_all_five_are_the_formulas(measure, sets, parts):
    results = measure()
    (reference, spatial_reference), (pooled, spatial) = (
        features_of(parts, sets[name][1]) for name in ("reference", "samples")
    )
    assert results["fid"] == pytest.approx(plain_distance(pooled, reference), rel=1e-4)
    assert results["sfid"] == pytest.approx(plain_distance(spatial, spatial_reference), rel=1e-4)
    assert results["is"] == pytest.approx(plain_score(parts.logits(torch.from_numpy(pooled)).numpy()), rel=1e-5)
    found = results["precision"], results["recall"]
    assert found == plain_precision_and_recall(reference, pooled) and 0 < min(found) and max(found) < 1
    assert results["fid"] > 0.01 and results["sfid"] > 0.01 and results["is"] > 1.01


def test_distances_of_many_images_are_adms():
    """More images than features, through the functions that training scripts call: scipy's matrix root of covariances
    with ddof 1, as in ADM's evaluator."""

    def features(images: torch.Tensor) -> dict:
        pixels = images.float()
        return {"fid": pixels.mean((2, 3)).repeat(1, 2) ** 0.5, "sfid": pixels[:, :, 0, :2].flatten(1)}

    distances = {name: FrechetMetric(name, None, 6, "few") for name in ("fid", "sfid")}
    space, accelerator = FeatureSpace("inception", distances, features, "few"), Accelerator()
    sides = []
    for seed in (0, 1):
        images = torch.from_numpy(make_pictures(25, seed, 90)).permute(0, 3, 1, 2)
        statistics = ImageStatistics(["fid", "sfid", "fdd"], space, 25, accelerator.device)
        for index in torch.arange(25).split(9):
            statistics.update(images[index], index)
        statistics.merge_processes(accelerator)
        sides.append((statistics, {name: x.double().numpy() for name, x in features(images).items()}))
    reference = GenerationReference(references_of([sides[1][0]])[0], {}, {})
    found = generation_metrics(sides[0][0], reference, accelerator)
    assert found.keys() == {"fid", "sfid"}
    for name in found:
        expected = [(x[name].mean(0), np.cov(x[name], rowvar=False)) for _, x in sides]
        assert found[name] == pytest.approx(frechet_distance(*expected[0], *expected[1]), rel=1e-6)


def test_batches_and_processes_change_nothing(measure, sets, inception, rae, tmp_path):
    """1, 2 and 3 processes and batches of 1, 7 and 64: every image counts once, on both features."""
    np.savez(tmp_path / "reference.npz", arr_0=sets["reference"][1][:12])
    both = {"features": "[inception,encoder]", "encoder": rae, "reference": tmp_path / "reference.npz"}
    both.update(num_samples=17)  # of 40
    results = [measure({**both, "batch_size": size}, f"batch-{size}") for size in (1, 64)]
    for processes, size in ((2, 7), (3, 64)):
        settings = {**both, "samples": sets["samples"][0], "batch_size": size}
        settings.update(inception_path=inception, output_dir=tmp_path / f"{processes}")
        done = run_command("eval_fid.py", *flags(settings), processes=processes)
        assert done.stdout.count("what decides whether") == 1  # one report
        results.append(json.loads((tmp_path / f"{processes}" / "results.json").read_text()))
        assert results[-1]["num_processes"] == processes
    assert len({result["fid"] for result in results}) > 1  # rounding: they were computed anew
    for result in results[1:]:
        assert result["num_samples"] == 17
        for name in ("fid", "sfid", "is", "fdd"):
            assert result[name] == pytest.approx(results[0][name], rel=1e-5), name
        for name in ("precision", "recall", "precision_encoder", "recall_encoder"):
            assert result[name] == results[0][name], name


def test_encoder_features_need_no_inception(measure, sets, rae, monkeypatch):
    """Distance, precision and recall of the mean patch tokens, under names of their own."""
    monkeypatch.setattr("rae_suite.downloads.urlopen", None)
    results = measure({"features": "encoder", "encoder": rae}, without=("inception_path",))
    assert not set(NAMES) & set(results)
    model, tokens = tiny_rae().eval(), []
    for name in ("reference", "samples"):
        pixels = torch.from_numpy(sets[name][1]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            tokens.append(model.encode(pixels, normalize=False).latent.mean((2, 3)).double().numpy())
    statistics = [(x.mean(0), np.cov(x, rowvar=False)) for x in tokens]
    assert results["fdd"] == pytest.approx(frechet_distance(*statistics[1], *statistics[0]), rel=1e-4)
    assert (results["precision_encoder"], results["recall_encoder"]) == plain_precision_and_recall(*tokens)
    assert results["comparability"]["network"].keys() == {"encoder"} and results["comparability"]["resize"] == "none"


def test_conventions_are_named(measure, monkeypatch):
    """What the flags choose is what is computed, and stands in the results."""
    rounded, shuffled = [], []

    def distances(a: torch.Tensor, b: torch.Tensor, float16: bool = False) -> torch.Tensor:
        rounded.append(float16)
        return squared_distances(a, b, float16)

    class Score(InceptionScore):
        def __init__(self, count: int, classes: int, shuffle: bool):
            super().__init__(count, classes, shuffle)
            shuffled.append(shuffle)

    monkeypatch.setattr(precision_recall, "squared_distances", distances)
    monkeypatch.setattr("rae_suite.generation_metrics.InceptionScore", Score)
    for precision, order in (("float32", "file"), ("float16", "shuffled")):
        rounded.clear(), shuffled.clear()
        results = measure({"metrics": "[is,precision,recall]", "distances": precision, "is_order": order}, order)
        decides = results["comparability"]
        assert decides["precision_recall"] == {"neighbours": 3, "distances": precision}
        assert decides["inception_score"] == {"order": order, "chunk": 5000}
        assert set(rounded) == {precision == "float16"} and shuffled == [order == "shuffled"]
        assert results.keys() & set(NAMES) == {"is", "precision", "recall"}


# ---------------------------------------------------------------------------------------------------------- references


def adm_file(path: Path, parts, statistics_of: np.ndarray, pictures: np.ndarray, without=()) -> Path:
    """A reference as ADM writes it: the mean in float32, arr_0 compressed."""
    pooled, spatial = features_of(parts, statistics_of)
    arrays = {"mu": pooled.mean(0), "sigma": np.cov(pooled, rowvar=False)}
    arrays.update({"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False), "arr_0": pictures})
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if name not in without})
    return path


def test_adms_reference(measure, sets, parts, tmp_path, capsys):
    """FID and sFID are measured to the file's statistics, precision and recall to its images: never mixed. What the
    file lacks is left out and named, or computed where it has no statistics at all."""
    training, reference = make_pictures(50, seed=7), sets["reference"][1]
    base = measure()
    file = adm_file(tmp_path / "adm.npz", parts, training, reference)
    results = measure({"reference": file}, "adm")
    pooled, spatial = features_of(parts, sets["samples"][1])
    pooled_training, spatial_training = features_of(parts, training)
    assert results["fid"] == pytest.approx(plain_distance(pooled, pooled_training), rel=1e-4)
    assert results["sfid"] == pytest.approx(plain_distance(spatial, spatial_training), rel=1e-4)
    assert [results[name] for name in NAMES[2:]] == pytest.approx([base[name] for name in NAMES[2:]], rel=1e-9)
    described = results["comparability"]["reference"]["statistics"]
    assert described["sfid"]["from"] == "mu_s and sigma_s" and described["fid"]["num_images"] is None
    assert not [line for line in results["not_as_published"] if "statistics" in line]
    assert base["comparability"]["reference"]["statistics"]["fid"]["from"] == "the images"
    assert [line for line in base["not_as_published"] if line.startswith("fid: the reference's statistics are of 30")]

    without = adm_file(tmp_path / "without.npz", parts, training, reference, without=("mu_s", "sigma_s"))
    capsys.readouterr()
    results = measure({"reference": without}, "without")
    assert "sfid" not in results and "`mu` and no `mu_s`" in results["left_out"]["sfid"]
    assert "left out: sfid, because of the reference" in capsys.readouterr().out
    bare = adm_file(tmp_path / "bare.npz", parts, training, reference, without=("mu_s", "sigma_s", "arr_0"))
    results = measure({"reference": bare}, "bare")
    assert results["left_out"].keys() == {"sfid", "precision", "recall"} and {"fid", "is"} <= results.keys()
    assert results["comparability"]["reference"]["image_size"] == "unknown"


def test_a_reference_is_made_from_data(measure, images, sets, inception, rae, tmp_path):
    """From any images, through ADM's crop; the file gives what the data gave, in ADM's names, and is of its networks
    alone. By two processes it is the same file."""
    data = {"reference_data.path": images, "reference_data.eval_split": "train", "reference_data.num_workers": 0}
    both = {"features": "[inception,encoder]", "encoder": rae}
    from_data = measure({**data, **both, "save_reference": tmp_path / "made.npz"}, "data", without=("reference",))
    again = measure({**both, "reference": tmp_path / "made.npz"}, "file")
    for name in (*NAMES, "fdd", "precision_encoder", "recall_encoder"):
        assert again[name] == pytest.approx(from_data[name], rel=1e-6), name
    with np.load(tmp_path / "made.npz") as arrays:
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0", "mu_fdd", "count"} <= set(arrays.files)
        assert arrays["arr_0"].shape == (24, SIZE, SIZE, 3) and int(arrays["count"]) == 24
        assert arrays["mu"].shape == (2048,) and arrays["sigma_s"].shape == (2023, 2023)
        first = dict(arrays)
    facts = again["comparability"]["reference"]
    assert facts["made_from"] == f"24 images of {images}, centre crop 32"
    assert facts["statistics"]["fid"]["num_images"] == 24
    same = from_data["comparability"]["reference"]["statistics"]["fid"]["sha256"]
    assert facts["statistics"]["fid"]["sha256"] == same

    settings = {**data, **both, "save_reference": tmp_path / "two.npz", "image_size": SIZE, "inception_path": inception}
    run_command("eval_fid.py", *flags(settings), processes=2)
    with np.load(tmp_path / "two.npz") as arrays:
        assert set(arrays.files) == set(first) and np.array_equal(arrays["arr_0"], first["arr_0"])
        np.testing.assert_allclose(arrays["sigma_s"], first["sigma_s"], rtol=1e-3, atol=1e-6)
    assert not list(tmp_path.glob(".*"))  # nothing is left beside the files
    tiny_rae(encoder_layers=(0,)).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        measure({**both, "encoder": tmp_path / "other", "reference": tmp_path / "made.npz"})


def test_a_reference_of_part_of_the_data(measure, images, tmp_path, monkeypatch):
    """Statistics are of all images, arr_0 of some that are spread evenly; unreadable ones are in neither."""
    monkeypatch.setattr("rae_suite.generation_reference.NUM_IMAGES", 6)
    data = shutil.copytree(images / "train", tmp_path / "data")
    files = sorted(data.rglob("*.png"))
    files[4].write_bytes(files[4].read_bytes()[:50])
    settings = {"reference_data.path": data, "reference_data.num_workers": 0, "image_size": 16}
    measure({**settings, "save_reference": tmp_path / "made.npz"}, without=("samples", "reference", "output_dir"))
    with np.load(tmp_path / "made.npz") as arrays:
        assert int(arrays["count"]) == 23 and len(arrays["arr_0"]) == 5
        for row, i in enumerate((0, 8, 12, 16, 20)):
            with Image.open(files[i]) as image:
                expected = np.asarray(image.convert("RGB").resize((SIZE // 2, SIZE // 2), Image.Resampling.BICUBIC))
            difference = arrays["arr_0"][row].astype(int) - expected
            assert np.abs(difference).mean() < 8  # ADM's crop halves with a box filter first


# ------------------------------------------------------------------------------------------------------------- samples


def write_files(folder: Path, pictures: np.ndarray, ending: str = "png") -> Path:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.{ending}")
    return folder


def test_folders(measure, sets, tmp_path, monkeypatch):
    """Files are taken in natural order, which the Inception Score sees, and give what the same array gives."""
    monkeypatch.setattr("rae_suite.generation_metrics.InceptionScore.__init__.__defaults__", (False, 7))
    folders = {name: write_files(tmp_path / name, sets[name][1]) for name in sets}
    names = sorted((f"{i}.png" for i in range(12)), key=natural_order)
    assert names == [f"{i}.png" for i in range(12)] and sorted(["b2", "b10", "a"], key=natural_order)[1:] == [
        "b2",
        "b10",
    ]
    arrays = measure()
    assert arrays["is"] != pytest.approx(measure(output="whole", settings={"is_order": "shuffled"})["is"], rel=1e-6)
    results = measure({**folders, "num_workers": 1, "batch_size": 9}, "folders")
    for name in NAMES:
        assert results[name] == pytest.approx(arrays[name], rel=1e-5), name
    assert results["comparability"]["file_format"] == "png" and results["not_as_published"] == [
        line.replace(str(sets["reference"][0]), str(folders["reference"])) for line in arrays["not_as_published"]
    ]
    part = measure(
        {"samples": folders["samples"], "num_samples": 31, "metrics": "[is]"}, "part", without=("reference",)
    )
    assert part["num_samples"] == 31 and part["comparability"]["reference"] == "none"


def test_what_is_not_as_published(measure, sets, tmp_path):
    """JPEG, another size than the reference's, and what sample_dit.py says of how the samples were drawn."""
    folder = tmp_path / "run"
    write_files(folder / "images", np.repeat(np.repeat(sets["samples"][1], 2, 1), 2, 2), "jpg")
    said = {"sampler": "euler", "points": 50, "end": 0.0069, "guidance": {"kind": "none", "scale": 1.0},
            "weights": "raw", "labels": "random", "quantize": "round", "precision": "bf16", "seed": 3, "decoder": "x",
            "seconds": 7.5, "_timestamp": "now"}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(said))
    results = measure({"samples": folder})
    decides, lines = results["comparability"], results["not_as_published"]
    assert {key: decides[key] for key in said if key in decides} == {k: said[k] for k in said if k in decides}
    assert decides["guidance"] == said["guidance"] and decides["epochs"] == "unknown"
    assert results["sampling"]["seconds"] == 7.5 and "_timestamp" not in results["sampling"]
    for words in ("40 samples", "samples in jpg", "quantize round", "labels random", "precision bf16", "weights raw",
                  "samples are 64 x 64 pixels, the reference's images 32 x 32", "30 reference images"):  # fmt: skip
        assert len([line for line in lines if words in line]) == 1, words
    other = measure({"samples": folder / "images", "output_dir": tmp_path / "direct"})
    assert other["comparability"] == decides and other["fid"] == results["fid"]


def test_arrays_are_read_in_shares(sets):
    """Stored and compressed: the batches of all processes are the images, each once, with their numbers."""
    for name in sets:
        file, pictures = sets[name]
        images = ArrayImages(file, "samples")
        for world_size in (1, 3):
            seen = [part for rank in range(world_size) for part in images.batches(4, rank, world_size)]
            index = torch.cat([numbers for _, numbers in seen])
            pixels = torch.cat([batch for batch, _ in seen])[index.argsort()]
            assert index.sort().values.tolist() == list(range(len(pictures)))
            assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), pictures)
    assert open_images(str(sets["samples"][0]), "samples", 5).count == 5


# ----------------------------------------------------------------------------------------------------------- downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Gives b"content" 1,000 times, or less than it announces."""

    def do_GET(self):
        self.send_response(200 if "missing" not in self.path else 404)
        self.send_header("Content-Length", "7000")
        self.end_headers()
        self.wfile.write(b"content" * (500 if "cut" in self.path else 1000))

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloads(address, tmp_path, monkeypatch):
    """A file appears when it is whole and is what it should be; else one line says what came instead."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    digest = "cddbe0fcb1b5d2f8b0c5a3d6"
    for name, prefix, words in (
        ("cut.pt", None, "the download was cut after 3500 of 7000 bytes"),
        ("other.pt", digest, f"its SHA-256 begins with .*, expected {digest}"),
        ("missing.pt", None, "HTTP Error 404"),
    ):
        with pytest.raises(
            ConfigError, match=f"^a_path: FID needs {name}, .*{name} does not exist.*{words}.*local copy"
        ):
            fetched_file(f"{address}/{name}", "a_path", "FID", hash_prefix=prefix)
        assert not list(folder.iterdir())
    file = fetched_file(f"{address}/good.pt", "a_path", "FID")
    assert file == folder / "good.pt" and file.read_bytes() == b"content" * 1000
    file.write_bytes(b"as it is")  # not fetched again
    assert fetched_file(f"{address}/good.pt", "a_path", "FID", hash_prefix=digest).read_bytes() == b"as it is"
    assert fetched_file("nowhere", "a_path", "FID", path=str(file)) == file
    with pytest.raises(ConfigError, match="^a_path: file none.pt does not exist, expected a copy of good.pt"):
        fetched_file(f"{address}/good.pt", "a_path", "FID", path="none.pt")


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"samples": "none.npz"}, ["samples: none.npz does not exist"]),
        ({"samples": "TEXT"}, ["samples", "cannot be read as .npz"]),
        ({"samples": "EMPTY"}, ["samples", "holds no image files"]),
        ({"samples": "GRAY"}, ["samples", "expected uint8 (N, H, W, 3)"]),
        ({"samples": "NAMES"}, ["samples", "holds other", "arr_0"]),
        ({"samples": "THREE"}, ["samples", "holds 3 images", "at least 4"]),
        ({"samples": "SIZES"}, ["samples", "1.png is 8 x 8 pixels", "0.png 9 x 9", "of one size"]),
        ({"samples": "BROKEN"}, ["samples", "7.png"]),
        ({"samples": "CUT"}, ["samples", "arr_0", "is damaged"]),
        ({"samples": "JSON"}, ["samples", "results.json cannot be read"]),
        ({"num_samples": 41}, ["samples", "holds 40 images, expected at least 41"]),
        ({"reference": "none.npz"}, ["reference: none.npz does not exist"]),
        ({"reference": "NARROW"}, ["reference", "mu_s", "shape (3,)", "(2023,)"]),
        ({"reference": "NAMES"}, ["reference", "holds other", "mu_s"]),
        ({"reference": "ONLY_MU", "metrics": "[sfid]"}, ["reference", "does not do for sfid", "`mu_s`"]),
        ({"reference": "ONLY_MU", "metrics": "[recall]"}, ["reference", "does not do for recall", "no images"]),
        ({"reference": "THREE"}, ["reference", "holds 3 images", "at least 4"]),
        ({"reference": "OTHER"}, ["reference", "of another network", "inception 123"]),
        ({"metrics": "[psnr]"}, ["metrics", "psnr"]),
        ({"metrics": "[fdd]"}, ["metrics", "fdd"]),
        ({"features": "encoder", "encoder": "RAE"}, ["inception_path", "nothing unless features has inception"]),
        ({"features": "[inception,encoder]"}, ["encoder", "an RAE's folder"]),
        ({"features": "[inception,encoder]", "encoder": "EMPTY"}, ["encoder", "no config.json"]),
        ({"features": "[inception,encoder]", "encoder": "RAE", "samples": "LARGE"}, ["samples", "32 px", "got 40"]),
        ({"inception_path": "TEXT"}, ["inception_path", "cannot be used"]),
        ({"reference_data.path": "EMPTY"}, ["reference_data.path", "nothing beside reference"]),
        ({"reference": None}, ["reference", "to compare with"]),
        ({"reference": None, "reference_data.path": "EMPTY"}, ["reference_data.path", "holds no image files"]),
        ({"samples": None}, ["samples", "an .npz file or a folder"]),
        ({"save_reference": "x.npz"}, ["save_reference", "nothing unless"]),
        ({"output_dir": "TEXT"}, ["output_dir", "text"]),
        ({"output_dir": "SAMPLED", "samples": "SAMPLED"}, ["output_dir", "would be lost"]),
        ({"distances": "float64"}, ["distances", "float64"]),
        ({"distances": "float16", "metrics": "[fid,is]"}, ["distances: expected float32 unless precision or recall"]),
        ({"is_order": "shuffled", "metrics": "[fid]"}, ["is_order: expected file unless the Inception Score"]),
        ({"is_order": "shuffled", "features": "encoder", "encoder": "RAE", "inception_path": None}, ["is_order"]),
        ({"seed": 3}, ["seed: expected nothing unless reference_data.path is given, got 3"]),
        ({"reference_data.num_workers": 0}, ["reference_data.num_workers: expected nothing unless", "got 0"]),
        ({"reference_data.eval_split": "train"}, ["reference_data.eval_split: expected nothing unless"]),
    ],
)
def test_bad_input_is_one_line(measure, sets, rae, tmp_path, capsys, settings, words):
    places = {"RAE": rae}
    pictures = sets["samples"][1]
    for name, arrays in {
        "GRAY": {"arr_0": pictures[..., 0]},
        "NAMES": {"other": np.zeros(1)},
        "THREE": {"arr_0": pictures[:3]},
        "LARGE": {"arr_0": make_pictures(5, 0).repeat(2, 1).repeat(2, 2)[:, :40, :40]},
        "NARROW": {"mu_s": np.zeros(3), "sigma_s": np.zeros((3, 3)), "mu": np.zeros(2048), "sigma": np.eye(2048)},
        "ONLY_MU": {"mu": np.zeros(2048), "sigma": np.eye(2048)},
        "OTHER": {"mu": np.zeros(2048), "sigma": np.eye(2048), "inception": np.str_("1234")},
    }.items():
        places[name] = tmp_path / f"{name.lower()}.npz"
        if name in map(str, settings.values()):
            np.savez(places[name], **arrays)
    (tmp_path / "text").write_text("no images")
    (tmp_path / "empty").mkdir()
    places.update(TEXT=tmp_path / "text", EMPTY=tmp_path / "empty", CUT=tmp_path / "cut.npz")
    places["CUT"].write_bytes(damaged(sets["reference"][0].read_bytes()))
    places["SIZES"] = write_files(tmp_path / "sizes", [np.zeros((9 - i % 2, 9 - i % 2, 3), np.uint8) for i in range(8)])
    for name in ("broken", "json", "sampled"):
        places[name.upper()] = write_files(tmp_path / name, pictures[:8])
    (tmp_path / "broken" / "7.png").write_bytes(b"no PNG")
    (tmp_path / "json" / "results.json").write_text("{")
    (tmp_path / "sampled" / "results.json").write_text('{"sampler": "euler"}')
    without = [key for key, value in settings.items() if value is None]
    settings = {key: places.get(value, value) for key, value in settings.items() if value is not None}
    with pytest.raises(SystemExit) as exit_info:
        measure(settings, without=without)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit_info.value.code == 2
    for word in words:
        assert word in line, line
    assert not (tmp_path / "out" / "results.json").exists()
    assert json.loads((tmp_path / "sampled" / "results.json").read_text()) == {"sampler": "euler"}


def damaged(npz: bytes) -> bytes:
    """The same file with other bytes in the middle of its data."""
    middle = len(npz) // 2
    return npz[:middle] + bytes(64) + npz[middle + 64 :]


def test_an_image_that_one_process_cannot_read(sets, inception, tmp_path):
    """Its process says so and ends; the others do not wait for it."""
    folder = write_files(tmp_path / "samples", sets["samples"][1][:8])
    (folder / "5.png").write_bytes(b"no PNG")
    settings = {"samples": folder, "reference": sets["reference"][0], "inception_path": inception, "batch_size": 4}
    done = run_command("eval_fid.py", *flags(settings), "--output_dir", tmp_path / "out", processes=2, check=False)
    assert done.returncode != 0 and "error: process 1: samples: " in done.stderr and "5.png" in done.stderr
    with pytest.raises(DataError, match="5.png"):
        list(open_images(str(folder), "samples").batches(4, 1, 2))
