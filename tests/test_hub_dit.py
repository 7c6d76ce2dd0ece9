"""Stage-2 pipelines on a small Hub on loopback: published, loaded by a stranger with empty caches, sampled by id."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import run_command, same, tiny_dit, tiny_rae
from hub_server import Repository
from huggingface_hub import ModelCard
from PIL import Image
from test_hub import error_line, push, server  # noqa: F401
from transformers import AutoModel, ViTImageProcessor

from modeling_dit import RAEDiTPipeline
from modeling_rae import RAEModel
from rae_suite.digests import weights_digest
from rae_suite.dit_card import CardFacts, GenerationFigures, figures_of_card, pipeline_card
from rae_suite.dit_folders import load_pipeline_parts, save_pipeline

NAMES = ["tench, Tinca tinca", 'gold"fish', *(f"class {i}" for i in range(2, 10))]
SAMPLING = {"shift": 2.5, "num_inference_steps": 6, "guidance_scale": 1.5, "guidance_interval": (0.1, 1.0)}
FIGURES = GenerationFigures({"fid": 12.34567, "is": 7.5}, 50, "at step 8 of training")
FILES = {
    "model_index.json", "modeling_dit.py", "README.md", "scheduler/scheduler_config.json",
    "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "transformer/modeling_dit.py",
    "guide/config.json", "guide/diffusion_pytorch_model.safetensors", "guide/modeling_dit.py",
    "rae/config.json", "rae/model.safetensors", "rae/modeling_rae.py", "rae/preprocessor_config.json", "samples.png",
}  # fmt: skip


def write_run(run_dir: Path, rae: RAEModel) -> Path:
    """final/ of a run of stage 2, as training writes it: with a card that has its figures, and a picture."""
    run_dir.mkdir(parents=True)
    settings = {"data": {"path": "user/flowers"}, "model": {"rae": "user/rae"}}
    (run_dir / "config.yaml").write_text(yaml.dump(settings))
    picture = run_dir / "grid.png"
    Image.fromarray(np.full((8, 8, 3), 70, np.uint8)).save(picture)
    transformer, names = tiny_dit(), dict(enumerate(NAMES))
    facts = CardFacts(str(run_dir / "final"), "mit", FIGURES, picture=True, trained_on="user/flowers")
    sampling = {**SAMPLING, "end": "published", "guide": True}
    card = pipeline_card(facts, transformer.config, rae.config.image_size, sampling, names)
    save_pipeline(
        run_dir / "final",
        transformer,
        rae,
        guide=tiny_dit(1, num_layers=1),
        class_names=NAMES,
        sampling=SAMPLING,
        card=card,
        picture=picture,
    )
    return run_dir / "final"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "dit", tiny_rae(use_latent_stats=True).eval())


def images_here(folder: Path) -> np.ndarray:
    """What the card's snippet draws."""
    pipe = RAEDiTPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe([0, 1], generator=torch.Generator().manual_seed(0)).images
    return np.stack([np.asarray(image) for image in images]).astype(int)


def snippet_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def stranger(code: str, server, folder: Path) -> subprocess.CompletedProcess:  # noqa: F811
    """Python in an empty directory, with empty caches and without a token."""
    folder.mkdir()
    hub = server.environment(folder / "home", token="")
    environment = {**os.environ, **hub, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    line = [sys.executable, "-c", f"import torch\ntorch.set_num_threads(1)\n{code}"]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_published_and_loaded_back(server, pipeline, push, tmp_path):  # noqa: F811
    """In one commit; the snippet of the card, run as it stands, draws the images that are drawn here, and so do the
    pipelines without RAE and without encoder. The commands take the id. No other file of the folder goes up."""
    put_encoder(server, tmp_path)
    folder = Path(shutil.copytree(pipeline.parent, tmp_path / "run")) / "final"
    change_rae_config(folder / "rae", encoder_id="user/encoder")
    (folder / "secrets.txt").write_text("not for the Hub")
    AutoModel.from_pretrained(folder / "rae", trust_remote_code=True).save_pretrained(tmp_path / "rae")
    assert push(tmp_path / "rae", repo_id="user/rae")[0] == 0
    assert push(folder, repo_id="user/dit")[0] == 0
    assert push(folder, "--no_encoder", repo_id="user/slim")[0] == 0
    assert push(folder, "--rae_id", "user/rae", repo_id="user/bare")[0] == 0
    published = server.repositories["user/dit"]
    assert published.files.keys() == FILES | {".gitattributes"} and len(published.commits) == 1
    for name in FILES - {"README.md", "model_index.json"}:
        assert published.files[name] == (folder / name).read_bytes(), name
    assert server.repositories["user/slim"].files.keys() == published.files.keys()
    slim = server.repositories["user/slim"].files["rae/model.safetensors"]
    assert len(slim) < len(published.files["rae/model.safetensors"])
    bare = server.repositories["user/bare"].files
    assert bare.keys() == {name for name in published.files if not name.startswith("rae/")}
    index = json.loads(bare["model_index.json"])
    assert index["rae"] == [None, None] and index["rae_id"] == "user/rae"

    cards = {name: server.repositories[f"user/{name}"].files["README.md"].decode() for name in ("dit", "slim", "bare")}
    code = ""
    for name, card in cards.items():
        assert f'"user/{name}"' in snippet_of(card)
        code += f"{snippet_of(card)}\nimages[1].save('{name}.png')\nprint(type(pipe).__module__)\n"
    done = stranger(code, server, tmp_path / "empty")
    modules = done.stdout.split()
    assert modules == ["diffusers_modules.local.modeling_dit"] * 3  # the Hub's code, not this repository's
    expected = images_here(folder)
    assert (tmp_path / "empty" / "sample.png").exists()
    for name in cards:
        found = np.asarray(Image.open(tmp_path / "empty" / f"{name}.png")).astype(int)
        assert np.abs(found - expected[1]).max() <= 1 and (found != expected[1]).mean() < 1e-2  # sums of another order

    output = tmp_path / "samples"
    line = ["--num_samples", 3, "--output_dir", output, "--num_inference_steps", 3]
    home = server.environment(tmp_path / "home", token="")
    run_command("sample_dit.py", "--model", "user/bare", *line, **home)
    results = json.loads((output / "results.json").read_text())
    assert results["loaded"] == "pipeline user/bare" and results["shift"] == 2.5
    assert results["networks"]["transformer"] == weights_digest(tiny_dit())


def put_encoder(server, folder: Path) -> None:  # noqa: F811
    """user/encoder, the one of tiny_rae."""
    torch.manual_seed(0)
    rae = tiny_rae(use_latent_stats=True)
    encoder = AutoModel.from_config(rae.config.encoder_config)
    encoder.load_state_dict(rae.encoder.state_dict(), strict=False)  # its final norm's affine part is not used
    encoder.save_pretrained(folder / "encoder")
    ViTImageProcessor().save_pretrained(folder / "encoder")
    files = {path.name: path.read_bytes() for path in (folder / "encoder").iterdir()}
    server.repositories["user/encoder"] = Repository(False, files)


def change_rae_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_card(server, pipeline, push):  # noqa: F811
    """Figures of the run, its settings and data, the model's sizes, the defaults, the license; written by a dry run,
    which asks nobody."""
    code, out, _ = push(pipeline, "--dry_run", "--license", "mit", repo_id="user/dit")
    folder = pipeline.with_name("final-upload")
    assert code == 0 and server.requests == []
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == FILES
    assert all(f"{name:<36}" in out for name in FILES)
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.datasets) == ("mit", "diffusers", "user/flowers")
    assert data.pipeline_tag == "unconditional-image-generation" and data.model_name == "dit"
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"fid": 12.3457, "is": 7.5}
    assert results["fid"].dataset_args == {"num_samples": 50} and results["fid"].dataset_type == "user/flowers"
    for words in (
        "(DiT-DH) on the latents of",
        "2 blocks of width 32, and a head of 1 of width 48, for 10 classes and latents of 16 x 4 x 4",
        "It draws images of 32 x 32 pixels.",
        "](samples.png)",
        "By default: 6 points in time, 5 euler steps, autoguidance 1.5 at times 0.1 to 1.",
        "50 images, at step 8 of training.",
        "| FID | 12.3457 |\n| Inception Score | 7.5000 |",
        "Trained on `user/flowers`.",
        "rae: user/rae",
        "pipe(class_labels=['tench, Tinca tinca', 'gold\"fish']",
    ):
        assert words in card.text, words
    assert figures_of_card(folder) == GenerationFigures({"fid": 12.3457, "is": 7.5}, 50, FIGURES.how)
    plain = pipeline_card(CardFacts("user/x"), tiny_dit(head_hidden_size=None, head_num_layers=None,
                          head_num_attention_heads=None).config, None, {"num_inference_steps": 50, "end": "zero",
                          "guidance_scale": 1.0}, rae_id="user/rae")  # fmt: skip
    assert "A diffusion transformer (DiT) on" in plain and "50 euler steps, no guidance" in plain
    assert 'rae = AutoModel.from_pretrained("user/rae"' in plain and "class_labels=[0, 1]" in plain
    assert "## Figures" not in plain and "samples.png" not in plain and "model-index" not in plain


def results_of(folder: Path, digest: str, **changes) -> Path:
    """results.json of eval_fid.py on images of sample_dit.py."""
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(samples / "grid.png")
    results = {
        "fid": 3.2,
        "precision": 0.7,
        "recall": None,
        "num_samples": 50_000,
        "samples": str(samples / "samples.npz"),
        "sampling": {"how": "50 points in time", "loaded": "pipeline x", "networks": {"transformer": digest}},
        "comparability": {"reference": {"path": "/data/VIRTUAL.npz"}},
        **changes,
    }
    file = folder / "results.json"
    file.write_text(json.dumps(results))
    return file


def test_card_with_results_of_eval_fid(server, pipeline, push, tmp_path):  # noqa: F811
    """Those of the weights that are published, with the picture of the samples."""
    file = results_of(tmp_path, weights_digest(tiny_dit()))
    assert push(pipeline, "--dry_run", "--results", file)[0] == 0
    folder = pipeline.with_name("final-upload")
    figures = figures_of_card(folder)
    assert figures == GenerationFigures(
        {"fid": 3.2, "precision": 0.7}, 50_000, "50 points in time; reference VIRTUAL.npz"
    )
    assert (folder / "samples.png").read_bytes() == (tmp_path / "samples" / "grid.png").read_bytes()
    file = results_of(tmp_path, weights_digest(tiny_dit()), comparability={"reference": "none"})
    assert push(pipeline, "--dry_run", "--results", file)[0] == 0
    assert figures_of_card(folder).how == "50 points in time; reference none"
    others = {"how": "", "loaded": "pipeline x", "networks": {"transformer": "0"}}
    for changes, words in (
        ({"sampling": "unknown"}, "is no results.json of eval_fid.py on images of sample_dit.py"),
        ({"comparability": {}}, "is no results.json of eval_fid.py"),
        ({"sampling": others}, "is about pipeline x, whose weights are others than"),
    ):
        file = results_of(tmp_path, "", **changes)
        message = error_line(push(pipeline, "--dry_run", "--results", file))
        assert message.startswith("error: results: ") and words in message
    assert "cannot be read" in error_line(push(pipeline, "--dry_run", "--results", tmp_path / "none.json"))


def test_what_an_earlier_upload_left(server, pipeline, push):  # noqa: F811
    """Weights under names that are not used any more go, of a guide that is no more too; other files stay."""
    there = Repository(private=False)
    old = {
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "model.safetensors", "rae/model.safetensors",
        "guide/diffusion_pytorch_model.safetensors.index.json",
    }  # fmt: skip
    own = {"notes.md", "transformer/notes.safetensors", "other/model.safetensors"}
    there.files |= dict.fromkeys(old | own, b"")
    server.repositories["user/dit"] = there
    assert push(pipeline, "--rae_id", "user/rae", repo_id="user/dit")[0] == 0
    kept = {name for name in FILES if not name.startswith("rae/")}
    assert there.files.keys() == {*kept, *own, ".gitattributes"}


def test_folders_that_are_no_pipeline(server, pipeline, push, tmp_path):  # noqa: F811
    """Each with its reason, before the Hub is asked."""
    weights = "transformer/diffusion_pytorch_model.safetensors"

    def no_rae(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "rae": [None, None], "rae_id": None}))

    damages = {
        "is no pipeline's of this suite": lambda folder: (folder / "model_index.json").write_text('{"a": 1}'),
        "a pipeline of stage 2, or an RAE": lambda folder: (folder / "model_index.json").write_text(
            '{"_class_name": ["pipeline", "OtherPipeline"]}'
        ),
        "a pipeline folder with modeling_dit.py": lambda folder: (folder / "modeling_dit.py").unlink(),
        "a pipeline folder with guide/config.json": lambda folder: (folder / "guide" / "config.json").unlink(),
        "(diffusion_pytorch_model.safetensors) cannot be read": lambda folder: os.truncate(folder / weights, 3000),
        "has no config.json": lambda folder: (folder / "rae" / "config.json").unlink(),
        "has no RAE and does not say which it needs": no_rae,
        "README.md is damaged": lambda folder: (folder / "README.md").write_text("---\nmodel-index: 3\n---\n"),
        "config.yaml of": lambda folder: (folder.parent / "config.yaml").write_text("a: 3\n"),
    }
    for i, (words, damage) in enumerate(damages.items()):
        folder = Path(shutil.copytree(pipeline.parent, tmp_path / f"run-{i}")) / "final"
        damage(folder)
        message = error_line(push(folder))
        assert message.startswith("error: model: ") and words in message, (words, message)
    assert "rae_id: expected user/name of an RAE on the Hub, got 'x'" in error_line(push(pipeline, "--rae_id", "x"))
    assert "no_encoder: expected false" in error_line(push(pipeline, "--rae_id", "user/rae", "--no_encoder"))
    assert "rae_id: expected nothing for" in error_line(push(pipeline / "rae", "--rae_id", "user/rae"))
    assert "no_encoder: the encoder can only be left out" in error_line(push(pipeline, "--no_encoder"))
    assert server.requests == []


def test_ids_that_are_no_stage_2_model(server, pipeline, tmp_path, monkeypatch):  # noqa: F811
    """Refused by their settings, before their weights are fetched; a transformer alone is taken."""

    def put(name: str, folder: Path) -> None:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        server.repositories[f"user/{name}"] = Repository(False, files)

    put("transformer", pipeline / "transformer")
    put("rae", pipeline / "rae")
    put("other", pipeline)
    server.repositories["user/other"].files["model_index.json"] = b'{"_class_name": "DiTPipeline"}'
    code = """
import sys
from rae_suite.dit_folders import load_pipeline_parts
for name in ("user/transformer", "user/rae", "user/other", "user/none", "user/transformer/x"):
    try:
        transformer, rae, settings = load_pipeline_parts(name, "model")
        print(settings.found, rae)
    except ValueError as error:
        print(error)
"""
    environment = {**os.environ, **server.environment(tmp_path / "home", token="")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert lines[0] == "transformer user/transformer None", done.stderr
    assert lines[1].startswith("model: user/rae is a rae, expected a pipeline folder")
    assert lines[2].startswith("model: user/other is a DiTPipeline, expected a pipeline folder")
    assert lines[3].startswith("model: user/none is no folder and no model on the Hub")
    assert lines[4].startswith("model: user/transformer/x does not exist, expected a pipeline folder")
    fetched = {path for method, path in server.requests if path.endswith(".safetensors")}
    assert fetched == {next(path for path in fetched if "user/transformer" in path)}


def test_parts_are_those_that_were_published(pipeline):
    transformer, rae, settings = load_pipeline_parts(str(pipeline), "model")
    assert same(dict(transformer.state_dict()), dict(tiny_dit().state_dict())) and rae.config.use_latent_stats
    index = json.loads((pipeline / "model_index.json").read_text())
    assert (index["guidance_start"], index["guidance_end"]) == (0.1, 1.0) and settings.class_names[0] == NAMES[0]
