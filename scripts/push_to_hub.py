"""Publish a trained model on the Hugging Face Hub.

    hf auth login
    python scripts/push_to_hub.py --model runs/dinov2_b/final --repo_id user/my-rae
    python scripts/push_to_hub.py --model runs/dinov2_b/final --repo_id user/my-rae --results evaluations/x/results.json
    python scripts/push_to_hub.py --model runs/dinov2_b/final --repo_id user/my-rae --dry_run

    python scripts/push_to_hub.py --model runs/ditdh_xl/final --repo_id user/my-dit --results evaluations/x/results.json
    python scripts/push_to_hub.py --model runs/ditdh_xl/final --repo_id user/my-dit --rae_id user/my-rae

An RAE: in one commit go up the weights, config.json and modeling_rae.py as they lie in the folder;
preprocessor_config.json, so that AutoImageProcessor makes the model's pixels; reconstructions.png; and README.md, a
model card with a usage snippet, the figures that were measured, and the settings of the run. What an earlier upload
left under these names is replaced, weight files that are no longer needed are deleted. The weights are loaded for
--no_encoder only.

A stage-2 pipeline: the same with all its parts, code and samples.png. --rae_id leaves its RAE out: whoever loads the
pipeline then passes it, as the card shows.

Figures and picture are those of eval_rfid.py, of a pipeline those of eval_fid.py (--results). Without it, best/, final/
and hub/step-* of a run folder have those of the run's own evaluation, other folders none. The card shows the run's
config.yaml as it is, paths included.

--dry_run writes what would go up into <model>-upload and lists it; it needs no token and no network. `hub.push: true`
does the same at the end of training. Exit code 2: a bad setting, or the Hub refuses; nothing was uploaded. Exit code 1:
the upload failed on the way, and the same command may succeed later.
"""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_NAME

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the repository root
from modeling_rae import RAEConfig, RAEModel
from rae_suite.cli import AT_LEAST_0, change_texts, parse, read_yaml, require, setting
from rae_suite.digests import weights_digest
from rae_suite.dit_card import GenerationFigures, figures_of_card, pipeline_card
from rae_suite.dit_folders import CARD, CODE, INDEX, WEIGHTS, is_whole_pipeline, load_pipeline_parts, read_defaults
from rae_suite.dit_folders import PICTURE as PIPELINE_PICTURE
from rae_suite.errors import ConfigError, error_names_setting, scrub
from rae_suite.files import check_links, write_folder
from rae_suite.hub import (
    check_access,
    check_encoder_left_out,
    check_target,
    hub_id,
    open_repository,
    upload,
)
from rae_suite.launch import quiet_transformers, run_main
from rae_suite.metric_names import GENERATION_METRICS
from rae_suite.model_cards import CardFacts
from rae_suite.model_loading import CODE as RAE_CODE
from rae_suite.model_loading import find_model, rae_of
from rae_suite.published_rae import PublishedOptions, check_options_used
from rae_suite.rae_card import PICTURE, figures_of_results, figures_of_run, rae_card, results_file
from rae_suite.rae_networks import image_processor_json, save_rae
from rae_suite.run_models import is_checkpoint, is_run_folder
from rae_suite.sample_files import GRID
from rae_suite.values import PathText, dump

# what save_pretrained writes weights to: an earlier upload's are deleted, all other files are somebody's own
WEIGHT_FILES = re.compile(
    r"((transformer|guide|rae)/)?(diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)
EVAL_RESULTS = ".eval_results/reconstruction.yaml"


@dataclass
class PushConfig:
    """Settings of push_to_hub.py."""

    model: PathText
    """Model folder of an RAE or of a stage-2 pipeline: best/ or final/ of a run, or what save_pretrained wrote; a run
    folder, for its final/. What else an RAE can be read from, such as a checkpoint, goes up as an RAE's folder."""
    repo_id: str
    """user/name of the model on the Hub; made where there is none."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights of a run's checkpoint: the moving average, or those that are trained."""
    published: PublishedOptions = field(default_factory=PublishedOptions)
    """What a decoder file of the published code, as a model, does not hold."""
    private: bool = False
    """Whether only its owners see the model."""
    no_encoder: bool = False
    """Leave out the encoder's weights: they are then fetched from the encoder's own id on loading."""
    rae_id: Optional[str] = None
    """Hub id of a pipeline's RAE, which is then left out; none: the RAE goes up with the pipeline."""
    results: Optional[PathText] = None
    """results.json of eval_rfid.py, or eval_fid.py for a pipeline, with the model's figures; none: those of its run."""
    license: str = "apache-2.0"
    """License of the decoder or transformer, as the Hub names it."""
    retries: int = setting(5, AT_LEAST_0)
    """Repetitions of what failed on the way, after 1, 4, 16, then 60 seconds."""
    dry_run: bool = False
    """Write everything into the folder <model>-upload instead."""


def check(config: PushConfig) -> None:
    """Raise ConfigError for what can be seen without opening anything."""
    check_target(config.repo_id, "repo_id")
    check_options_used(config.published, [config.model])
    if config.rae_id is not None:
        require(hub_id(config.rae_id) is not None, "rae_id", "user/name of an RAE on the Hub", config.rae_id)
        require(not config.no_encoder, "no_encoder", "false where rae_id leaves the whole RAE out", config.no_encoder)


# --------------------------------------------------------------------------------------------------------------------
# The model folder
# --------------------------------------------------------------------------------------------------------------------


def read_model_folder(folder: Path) -> tuple[RAEConfig, list]:
    """(config, names of the weight files) of an RAE's folder. Raises ConfigError for anything else, and where the
    weights are not whole."""
    expected = "expected an RAE's folder, such as runs/<name>/final"
    for name in (CONFIG_NAME, RAE_CODE):
        if not (folder / name).is_file():
            raise ConfigError(f"model: {folder} has no {name}, {expected}")
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text())
        kind, has_code = settings.get("model_type"), "auto_map" in settings
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"model: {folder / CONFIG_NAME} is no model config: {error}") from error
    if kind != RAEConfig.model_type or not has_code:
        raise ConfigError(f"model: {folder} has model_type {kind}{'' if has_code else ' and no auto_map'}, {expected}")
    with error_names_setting("model", str(folder)):
        config = RAEConfig.from_pretrained(folder)
    names, keys = weight_files(folder)
    for part in ("decoder.", *(["encoder."] if config.encoder_bundled else [])):
        if not any(key.startswith(part) for key in keys):
            raise ConfigError(f"model: the weights in {folder} have no '{part}*', {expected}")
    return config, names


def weight_files(folder: Path, single: str = SAFE_WEIGHTS_NAME) -> tuple[list, set]:
    """(names of the weight files, the index of several among them; names of the tensors in them). `single`: the name of
    one file of all weights. Raises ConfigError where one is missing or damaged."""
    names, keys, index = [single], set(), folder / f"{single}.index.json"
    try:
        if index.exists() and not (folder / single).exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError(f"{index.name} names files of other folders")
        for name in names:
            with safe_open(folder / name, "pt") as file:  # reads the header alone
                keys |= set(file.keys())
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"model: the weights in {folder} ({', '.join(map(str, names))}) cannot be read: {error}"
        ) from error
    return names if names == [single] else [*names, index.name], keys


def without_encoder(folder: Path, config: RAEConfig, target: Path) -> Path:
    """Write the model in `folder` to `target` without the encoder's weights; returns `target`. Raises ConfigError where
    the encoder could not be fetched by others, or the weights do not fit the config."""
    check_encoder_left_out(config.encoder_id, "no_encoder")
    with error_names_setting("model", str(folder)):
        model = RAEModel.from_pretrained(folder)
        model.save_pretrained(target, include_encoder=False)
    return target


@contextmanager
def damage_named(what: str) -> Iterator[None]:
    """Turn an error of what a damaged file holds into a ConfigError that names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"model: {what} is damaged ({error!r})") from error


def model_folder(settings: PushConfig, temporary: Path) -> tuple[Path, Path]:
    """(what the model is, by which its run and its figures are known; the folder of its files, below `temporary` for
    what is none yet). Raises ConfigError for what no model can be read from."""
    given = Path(settings.model).resolve()
    if is_run_folder(given) and is_whole_pipeline(given / "final") and settings.weights == "ema":
        given = given / "final"
    if (given / INDEX).is_file() and settings.weights == "ema":
        return given, given
    found = find_model(settings.model, "model", settings.weights)
    if found.side == "rae" and Path(found.place).is_dir():
        return (Path(found.place).resolve(),) * 2
    rae = rae_of(found, "model", settings.published)
    save_rae(rae, rae.state_dict(), temporary / "exported")
    return Path(found.place).resolve(), temporary / "exported"


def run_folder(model: Path) -> Optional[Path]:
    """The run folder that `model` (best, final, hub/step-* or a checkpoint) is in, or None."""
    of_a_step = model.parent.name == "hub" or is_checkpoint(model)
    run_dir = model.parent.parent if of_a_step else model.parent
    exported = model.name in ("best", "final") or of_a_step
    return run_dir if exported and (run_dir / "config.yaml").is_file() else None


def read_run(run_dir: Path) -> tuple[dict, str]:
    """A run's settings without credentials, which earlier versions wrote down, and the same as YAML text."""
    run = change_texts(read_yaml(run_dir / "config.yaml"), scrub)
    return run, dump(run)


# --------------------------------------------------------------------------------------------------------------------
# What goes up
# --------------------------------------------------------------------------------------------------------------------


def files_to_upload(settings: PushConfig, model: Path, folder: Path, temporary: Path) -> dict:
    """{name in the repository: path or bytes} of an RAE. `model`: what it is, `folder`: where its files are,
    `temporary`: a folder for one without encoder."""
    config, weights = read_model_folder(folder)
    weights_from = folder
    if settings.no_encoder and config.encoder_bundled:
        weights_from = without_encoder(folder, config, temporary / "model")
        config, weights = read_model_folder(weights_from)
    run_dir = run_folder(model)
    figures = trained_on = run_settings = None
    if run_dir:
        with damage_named(f"config.yaml or metrics.jsonl of {run_dir}"):
            run, run_settings = read_run(run_dir)
            trained_on, figures = run["data"]["path"], figures_of_run(run_dir, run, model, settings.weights)
    if settings.results is not None:
        figures = figures_of_results(Path(settings.results), model)
    files: dict[str, Any] = {name: weights_from / name for name in (CONFIG_NAME, RAE_CODE, *weights)}
    files[IMAGE_PROCESSOR_NAME] = image_processor_json(config.image_size).encode()
    has_picture = figures is not None and figures.picture.is_file()
    facts = CardFacts(settings.repo_id, settings.license, figures, has_picture, trained_on, run_settings)
    files[CARD] = rae_card(facts, config).encode()
    results = results_file(figures) if figures else None
    if results is not None:
        files[EVAL_RESULTS] = results
    check_links(weights_from, [path for path in files.values() if isinstance(path, Path)], "model")
    if has_picture:
        check_links(figures.picture.parent, [figures.picture], "results")
        files[PICTURE] = figures.picture
    return files


# --------------------------------------------------------------------------------------------------------------------
# Pipelines of stage 2
# --------------------------------------------------------------------------------------------------------------------


def pipeline_to_upload(settings: PushConfig, model: Path, temporary: Path) -> dict:
    """{name in the repository: path or bytes} of a pipeline. `temporary`: a folder for an RAE without encoder."""
    index = read_index(model)
    scheduler = "scheduler/scheduler_config.json"
    files: dict[str, Any] = {CODE: model / CODE, scheduler: model / scheduler}
    for part in ("transformer", *(["guide"] if index["guide"][0] else [])):
        names = [CONFIG_NAME, CODE, *weight_files(model / part, WEIGHTS)[0]]
        files.update({f"{part}/{name}": model / part / name for name in names})
    image_size = None
    if settings.rae_id is not None:
        index = {**index, "rae": [None, None], "rae_id": settings.rae_id}
    elif index["rae"][0] is not None:
        image_size, rae_files = rae_to_upload(settings, model / "rae", temporary)
        files.update(rae_files)
    for name, content in files.items():
        require(isinstance(content, bytes) or content.is_file(), "model", f"a pipeline folder with {name}", str(model))
    files[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    figures, picture = pipeline_figures(settings, model)
    if picture.is_file():
        files[PIPELINE_PICTURE] = picture
    check_links(model, [content for content in files.values() if isinstance(content, Path)], "model")
    files[CARD] = card_of_pipeline(settings, model, index, image_size, figures, picture.is_file()).encode()
    return files


def read_index(model: Path) -> dict:
    """What model_index.json says. Raises ConfigError for another pipeline's."""
    try:
        index = json.loads((model / INDEX).read_text())
        kind = index["_class_name"][1]
        index = {"guide": [None, None], "rae": [None, None], **index}
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"model: {model / INDEX} is no pipeline's of this suite ({error!r})") from error
    require(kind == "RAEDiTPipeline", "model", "a pipeline of stage 2, or an RAE", f"{model}, a {kind}")
    if index["rae"][0] is None and index.get("rae_id") is None:
        raise ConfigError(f"model: {model} has no RAE and does not say which it needs")
    return index


def rae_to_upload(settings: PushConfig, folder: Path, temporary: Path) -> tuple[int, dict]:
    """(side of its images in pixels, files) of the RAE in a pipeline."""
    config, weights = read_model_folder(folder)
    if settings.no_encoder and config.encoder_bundled:
        folder = without_encoder(folder, config, temporary / "rae")
        config, weights = read_model_folder(folder)
    files: dict[str, Any] = {f"rae/{name}": folder / name for name in (CONFIG_NAME, RAE_CODE, *weights)}
    files[f"rae/{IMAGE_PROCESSOR_NAME}"] = image_processor_json(config.image_size).encode()
    return config.image_size, files


def pipeline_figures(settings: PushConfig, model: Path) -> tuple[Optional[GenerationFigures], Path]:
    """Figures of the pipeline and the picture that goes with them: of --results, else what its folder's card has."""
    if settings.results is None:
        with damage_named(str(model / CARD)):
            return figures_of_card(model), model / PIPELINE_PICTURE
    file = Path(settings.results)
    try:
        results = json.loads(file.read_text())
        values = {name: float(results[name]) for name in GENERATION_METRICS if results.get(name) is not None}
        sampling, count, reference = results["sampling"], results["num_samples"], results["comparability"]["reference"]
        digest, where = sampling["networks"]["transformer"], Path(results["samples"])
        compared = reference if isinstance(reference, str) else Path(reference["path"]).name  # IS alone needs none
        how = f"{sampling['how']}; reference {compared}"
    except OSError as error:
        raise ConfigError(f"results: {file} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"results: {file} is no results.json of eval_fid.py on images of sample_dit.py ({error!r})"
        ) from error
    transformer, _, _ = load_pipeline_parts(str(model), "model")
    if weights_digest(transformer) != digest:
        raise ConfigError(f"results: {file} is about {sampling.get('loaded')}, whose weights are others than {model}'s")
    pictures = [folder / GRID for folder in (where, where.parent) if (folder / GRID).is_file()]
    return GenerationFigures(values, count, how), (pictures or [model / PIPELINE_PICTURE])[0]


def card_of_pipeline(
    settings: PushConfig,
    model: Path,
    index: dict,
    image_size: Optional[int],
    figures: Optional[GenerationFigures],
    picture: bool,
) -> str:
    """Text of README.md. `image_size`: None where the RAE is left out."""
    run_dir, facts = run_folder(model), CardFacts(settings.repo_id, settings.license, figures, picture)
    if run_dir:
        with damage_named(f"config.yaml of {run_dir}"):
            run, facts.run_settings = read_run(run_dir)
            facts.trained_on = run["data"]["path"]
    with damage_named(str(model)):
        transformer = json.loads((model / "transformer" / CONFIG_NAME).read_text())
        sampling, class_names = read_defaults(index)
        sampling["guide"] = index["guide"][0] is not None or sampling.get("guide")
        return pipeline_card(facts, transformer, image_size, sampling, class_names, index.get("rae_id"))


def write_files(files: dict, target: Path) -> None:
    """Write what would go up into the folder `target`."""

    def write(folder: Path) -> None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content) if isinstance(content, bytes) else shutil.copy(content, folder / name)

    write_folder(target, write, main_process=True, wait=lambda: None)


def table(files: dict) -> str:
    """Names and sizes."""
    sizes = {name: len(item) if isinstance(item, bytes) else item.stat().st_size for name, item in files.items()}
    return "\n".join(f"{name:<36}{size:>16,} bytes" for name, size in sizes.items())


def push(settings: PushConfig, temporary: Path) -> None:
    """Upload the model, or write what would go up."""
    model, folder = model_folder(settings, temporary)
    if (folder / INDEX).is_file():
        files = pipeline_to_upload(settings, model, temporary)
    else:
        require(settings.rae_id is None, "rae_id", f"nothing for {model}, which is no pipeline", settings.rae_id)
        files = files_to_upload(settings, model, folder, temporary)
    if settings.dry_run:
        target = model.with_name(f"{model.name}-upload")
        write_files(files, target)
        print(f"{table(files)}\nnot uploaded: {target} has what would go to {settings.repo_id}")
        return
    there = open_repository(settings.repo_id, settings.private, "private", settings.retries)
    stale = [name for name in there if WEIGHT_FILES.fullmatch(name) and name not in files]
    address = upload(settings.repo_id, files, stale, f"Upload {'/'.join(model.parts[-2:])}", settings.retries)
    print(f"{table(files)}\nuploaded to {settings.repo_id}: {address}")


def main() -> None:
    settings = parse(PushConfig, "push_to_hub.py", "Publish a trained model on the Hugging Face Hub.", check=check)
    quiet_transformers()
    if not settings.dry_run:
        check_access(settings.repo_id, "repo_id")
    with tempfile.TemporaryDirectory(prefix="push-to-hub-", ignore_cleanup_errors=True) as temporary:
        push(settings, Path(temporary))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # no temporary files stay behind
    run_main(main)
