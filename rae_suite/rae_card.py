"""The model card of an RAE: what it is, how to use it, what was measured, how it was trained."""

import json
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Optional

from huggingface_hub import ModelCard, ModelCardData

from modeling_rae import RAEConfig
from rae_suite.errors import ConfigError, scrub
from rae_suite.hub import data_name, hub_id
from rae_suite.metric_names import METRICS, metric_of
from rae_suite.metrics_file import MetricsFile
from rae_suite.model_cards import CardFacts, eval_results, figures_table, training_part
from rae_suite.run_models import name_of_run
from rae_suite.splits import held_out_in_words
from rae_suite.values import dump

PICTURE = "reconstructions.png"


# --------------------------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What was measured: metrics and values, on which images, how, and the picture that goes with it."""

    values: dict
    data: str  # path or Hub id
    split: Optional[str]  # its name, or in words which images they were; None: unknown
    num_samples: int
    how: str
    picture: Path


def measured(row: dict, vgg_weights: str) -> dict:
    """The metrics in a line of results, without an LPIPS that comes from an untrained VGG16."""
    names = [name for name in METRICS if name != "lpips" or vgg_weights == "pretrained"]
    return {name: float(row[name]) for name in names if row.get(name) is not None}


def figures_of_results(file: Path, model: Path) -> Figures:
    """The model's figures in a results.json of eval_rfid.py, without noise on the latents. Raises ConfigError where
    there are none."""
    try:
        results = json.loads(file.read_text())
        # evaluated on another machine, the path may differ: the names of the run and of the folder have to agree
        same = [row for row in results["rows"] if name_of_run(str(Path(row["model"]).resolve())) == name_of_run(model)]
        found = [
            Figures(
                values=measured(row, results["config"]["vgg_weights"]),
                data=results["config"]["data"]["path"],
                split=results.get("split") or split_in_words(results["config"]["data"], results["config"]["seed"]),
                num_samples=row["num_samples"],
                how=f"{results['crop']} to {results['image_size']} pixels, 8 bit by {results['quantize']}",
                picture=file.parent / Path(row["comparison"]).name,
            )
            for row in same
            if row["latent_noise"] == 0
        ]
        models = ", ".join(sorted({row["model"] for row in results["rows"]}))
    except OSError as error:
        raise ConfigError(f"results: {file} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"results: {file} is no results.json of eval_rfid.py ({error!r})") from error
    if not found:
        raise ConfigError(f"results: {file} has no row of {model} without latent noise, it is about {models}")
    return found[0]


def split_in_words(data: dict, seed: int) -> Optional[str]:
    """Which images an evaluation with the settings `data` was of, as far as they tell: a local `eval_path` may have
    splits or not."""
    if data.get("eval_path") is not None and hub_id(data["eval_path"]) is None:
        return None
    fraction = data.get("holdout_fraction", 0)
    return held_out_in_words(fraction, data["train_split"], seed) if fraction > 0 else data["eval_split"]


def figures_of_run(run_dir: Path, settings: dict, model: Path, weights: str) -> Optional[Figures]:
    """The figures of a run's own evaluation: of the step that `model` is of, and of its averaged ("ema") or "raw"
    `weights`. None where that was not evaluated.

    best/ is the best since eval.best_metric or the number of images last changed: a line before that has another
    number of images, or does not have the metric.
    """
    lines = MetricsFile(run_dir / "metrics.jsonl", enabled=False).read()
    lines = [line for line in lines if line["kind"] == "eval" and line["model"] == weights]
    if model.parent.name in ("hub", "checkpoints"):
        lines = [line for line in lines if model.name == f"step-{line['step']:08d}"]
    if not lines:
        return None
    line, metric = lines[-1], settings["eval"]["best_metric"]
    if model.name == "best":
        sign = 1 if metric_of(metric).higher_is_better else -1
        count = "/".join([*metric.split("/")[:-1], "num_samples"])  # of the metric's own set: faces/num_samples
        same = takewhile(lambda row: metric in row and row[count] == line[count], reversed(lines))
        comparable = [row for row in reversed([*same]) if row[metric] is not None]
        if not comparable:
            return None
        line = max(comparable, key=lambda row: sign * row[metric])  # the first of equal ones
    return Figures(
        values=measured(line, settings["perceptual"]["weights"]),
        data=settings["data"].get("eval_path") or settings["data"]["path"],
        split=split_in_words(settings["data"], settings["train"]["seed"]),
        num_samples=line["num_samples"],
        how=f"at step {line['step']} of training",
        picture=run_dir / "samples" / f"step-{line['step']:08d}.png",
    )


def model_index(figures: Figures) -> list:
    """The figures as the Hub's model-index has them."""
    modes = {name: METRICS[name].fid_mode for name in figures.values}
    task, data = ("image-to-image", "Reconstruction"), data_name(figures.data)
    return eval_results(task, data, figures.num_samples, figures.values, METRICS, modes, figures.split)


def results_file(figures: Figures) -> Optional[bytes]:
    """The figures as the Hub's .eval_results/*.yaml has them, which are shown beside the card and on the data set's
    page; None where the data is not on the Hub. See https://huggingface.co/docs/hub/eval-results."""
    dataset = hub_id(figures.data)
    if dataset is None:
        return None
    notes = f"{figures.num_samples} images; split: {figures.split}; {figures.how}"
    return dump(
        [
            {"dataset": {"id": dataset, "task_id": f"reconstruction_{name}"}, "value": round(value, 4), "notes": notes}
            for name, value in figures.values.items()
        ]
    ).encode()


# --------------------------------------------------------------------------------------------------------------------
# The card
# --------------------------------------------------------------------------------------------------------------------


def usage(repo_id: str, config: RAEConfig) -> str:
    """Code that reconstructs one image."""
    size, grid, channels = config.image_size, config.latent_size, config.latent_channels
    return f'''import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

rae = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("{repo_id}")

image = Image.open("image.png").convert("RGB")
pixels = processor(image, return_tensors="pt").pixel_values  # (1, 3, {size}, {size}) in [0, 1]
with torch.no_grad():
    latent = rae.encode(pixels).latent  # (1, {channels}, {grid}, {grid})
    sample = rae.decode(latent).sample  # (1, 3, {size}, {size}), about [0, 1], not clamped

array = (sample[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
Image.fromarray(array).save("reconstruction.png")'''


def encoder_words(config: RAEConfig) -> tuple[str, str]:
    """(the encoder in a sentence, where its weights are and what license they are under)."""
    name, kind = hub_id(config.encoder_id), config.encoder_config.model_type
    if config.encoder_id is None:
        return f"a frozen {kind} encoder that was never published", "The encoder's weights are in the same file."
    link = f"[{name}](https://huggingface.co/{name})" if name else f"`{Path(config.encoder_id).name}`"
    place = "are in the same file" if config.encoder_bundled else "are fetched from there on loading"
    return f"the frozen encoder {link}", f"The weights of {link} {place} and stay under their own license."


def rae_card(facts: CardFacts, config: RAEConfig) -> str:
    """Text of README.md. The figures of `facts` are Figures."""
    name, figures = facts.repo_id.split("/")[-1], facts.figures
    data = ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["rae", "representation-autoencoder"],
        base_model=hub_id(config.encoder_id),
        datasets=hub_id(facts.trained_on),
        model_name=name if figures else None,  # with it, the card has a model-index
        eval_results=model_index(figures) if figures else None,
    )
    encoder, encoder_license = encoder_words(config)
    size, grid, channels = config.image_size, config.latent_size, config.latent_channels
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        "A [Representation Autoencoder](https://arxiv.org/abs/2510.11690) (RAE): "
        f"{encoder}, and a ViT decoder ({config.decoder_num_hidden_layers} blocks of width "
        f"{config.decoder_hidden_size}) that was trained to invert it. Images of {size} x {size} pixels become latents "
        f"of {channels} x {grid} x {grid}, for diffusion models to be trained on.",
    ]
    if facts.picture:
        parts.append(f"![Images over their reconstructions]({PICTURE})")
    parts.append(f"## Usage\n\n```python\n{usage(facts.repo_id, config)}\n```")
    if figures:
        split = f"; split: {figures.split}" if figures.split else ""
        parts.append(
            f"## Reconstruction\n\n{figures.num_samples} images of `{data_name(figures.data)}`{split}; {figures.how}."
            f"\n\n{figures_table(figures.values, METRICS)}"
        )
    if facts.run_settings:
        parts.append(training_part(facts))
    parts.append(f"## License\n\nThe decoder is under {facts.license}. {encoder_license}")
    return scrub(str(ModelCard("\n\n".join(parts) + "\n")))
