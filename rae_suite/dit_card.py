"""The model card of a stage-2 pipeline: what it is, how to use it, what was measured, how it was trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

from huggingface_hub import ModelCard, ModelCardData

from modeling_rae import RAEConfig
from rae_suite.cli import config_yaml
from rae_suite.dit_folders import CARD, PICTURE
from rae_suite.errors import scrub
from rae_suite.flow import guidance_kind
from rae_suite.hub import data_name, hub_id
from rae_suite.metric_names import DRAWN_METRICS, GENERATION_METRICS
from rae_suite.metrics_file import MetricsFile
from rae_suite.model_cards import CardFacts, eval_results, figures_table, training_part
from rae_suite.settings_dit import Config

TASK = "unconditional-image-generation"  # the Hub has no name for images of classes


@dataclass
class GenerationFigures:
    """What was measured on generated images: values by the names of GENERATION_METRICS, of how many images, and how
    they were drawn and compared, in words."""

    values: dict
    num_samples: int
    how: str


def sampling_words(sampling: dict, has_base_head: bool) -> str:
    """How images are drawn by a model with or without a base head, from settings by their names in SamplingConfig;
    `guide`: "off", or whether there is one."""
    points = sampling["num_inference_steps"]
    steps = points - 1 if sampling.get("end") == "published" else points
    words = f"{points} points in time, {steps} {sampling.get('solver', 'euler')} steps"
    return f"{words}, {guidance_words(sampling, has_base_head)}"


def guidance_words(sampling: dict, has_base_head: bool) -> str:
    """The guidance in the same settings."""
    scale, guide = sampling["guidance_scale"], sampling.get("guide")
    if scale == 1:
        return "no guidance"
    low, high = sampling.get("guidance_interval", (0.0, 1.0))
    kind = guidance_kind(has_base_head, bool(guide) and guide != "off", guide != "off")
    return f"{kind} {scale:g} at times {low:g} to {high:g}"


def usage(repo_id: str, class_names: dict, rae_id: Optional[str]) -> str:
    """Code that draws two images. `rae_id`: the RAE's id where it is not in the repository."""
    labels = [class_names[index] for index in sorted(class_names)[:2]] or [0, 1]
    load = f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)'
    imports = "import torch\nfrom diffusers import DiffusionPipeline\n"
    if rae_id is not None:
        imports += "from transformers import AutoModel\n"
        load = (
            f'rae = AutoModel.from_pretrained("{rae_id}", trust_remote_code=True)\n'
            f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", rae=rae, trust_remote_code=True)'
        )
    return f"""{imports}
{load}
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
images = pipe(class_labels={labels!r}, generator=torch.Generator().manual_seed(0)).images
images[0].save("sample.png")"""


def describe(transformer: Mapping, image_size: Optional[int]) -> str:
    """The model in two sentences."""
    backbone = f"{transformer['num_layers']} blocks of width {transformer['hidden_size']}"
    kind = "A diffusion transformer (DiT)"
    if transformer["head_hidden_size"] is not None:
        head = f"{transformer['head_num_layers']} of width {transformer['head_hidden_size']}"
        kind, backbone = "A diffusion transformer with a wide head (DiT-DH)", f"{backbone}, and a head of {head}"
    size, channels = transformer["sample_size"], transformer["in_channels"]
    images = "" if image_size is None else f" It draws images of {image_size} x {image_size} pixels."
    return (
        f"{kind} on the latents of a [Representation Autoencoder](https://arxiv.org/abs/2510.11690): {backbone}, for "
        f"{transformer['num_classes']} classes and latents of {channels} x {size} x {size}.{images}"
    )


def model_index(figures: GenerationFigures, trained_on: Optional[str]) -> list:
    """The figures as the Hub's model-index has them."""
    task, data = (TASK, "Image generation"), data_name(trained_on) if trained_on else "unknown"
    how = dict.fromkeys(figures.values, figures.how)
    return eval_results(task, data, figures.num_samples, figures.values, GENERATION_METRICS, how)


def pipeline_card(
    facts: CardFacts,
    transformer: Mapping,
    image_size: Optional[int],
    sampling: dict,
    class_names: Optional[dict] = None,
    rae_id: Optional[str] = None,
) -> str:
    """Text of README.md.

    Args:
        facts: their figures are GenerationFigures.
        transformer: config of the RAEDiTModel.
        image_size: of the RAE, in pixels; None: it is left out, and `rae_id` says where it is.
        sampling: the pipeline's defaults, as save_pipeline takes them; `guide`: "off", or whether it has one.
        class_names: {index: name}.
    """
    name, figures = facts.repo_id.rstrip("/").split("/")[-1], facts.figures
    data = ModelCardData(
        license=facts.license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["rae", "representation-autoencoder", "class-conditional"],
        base_model=hub_id(rae_id),
        datasets=hub_id(facts.trained_on),
        model_name=name if figures else None,  # with it, the card has a model-index
        eval_results=model_index(figures, facts.trained_on) if figures else None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {name}", describe(transformer, image_size)]
    if facts.picture:
        parts.append(f"![Images that it drew, sorted by class]({PICTURE})")
    words = sampling_words(sampling, transformer.get("base_num_layers") is not None)
    code = usage(facts.repo_id, class_names or {}, None if image_size is not None else rae_id)
    parts.append(f"## Usage\n\n```python\n{code}\n```\n\nBy default: {words}.")
    if figures:
        table = figures_table(figures.values, GENERATION_METRICS)
        parts.append(f"## Figures\n\n{figures.num_samples} images, {figures.how}.\n\n{table}")
    if facts.run_settings:
        parts.append(training_part(facts))
    where = "The RAE is in `rae/`" if image_size is not None else f"The RAE is `{rae_id}`"
    parts.append(f"## License\n\nThe transformer is under {facts.license}. {where}, under its own license.")
    return scrub(str(ModelCard("\n\n".join(parts) + "\n")))


def card_of_run(
    config: Config, folder: Path, run_dir: Path, step: int, transformer: Mapping, rae: RAEConfig
) -> tuple[str, Optional[Path]]:
    """The card of a model that a run writes into `folder` at `step`, with what was measured then, and the picture that
    was drawn then, if there is one. `transformer`, `rae`: configs of the networks."""
    lines = MetricsFile(run_dir / "metrics.jsonl", enabled=False).read()
    lines = [line for line in lines if (line["kind"], line["step"], line.get("model")) == ("eval", step, "ema")]
    values = {name: lines[-1][name] for name in DRAWN_METRICS if lines and lines[-1].get(name) is not None}
    sampling, figures = asdict(config.sampling), None
    if values:
        compared = "the held-out images" if config.eval.reference is None else Path(config.eval.reference).name
        words = sampling_words(sampling, transformer.get("base_num_layers") is not None)
        how = f"at step {step} of training; {words}; 8 bit by round; reference {compared}"
        figures = GenerationFigures(values, lines[-1]["num_generated"], how)
    picture = run_dir / "samples" / f"step-{step:08d}.png"
    facts = CardFacts(
        config.hub.repo_id or str(folder),
        config.hub.license,
        figures,
        picture.is_file(),
        config.data.path,
        config_yaml(config),
    )
    names = dict(enumerate(config.model.class_names or []))
    card = pipeline_card(facts, transformer, rae.image_size, sampling, names)
    return card, picture if picture.is_file() else None


def figures_of_card(folder: Path) -> Optional[GenerationFigures]:
    """The figures in the card of a pipeline folder, as `pipeline_card` wrote it; None: it has none."""
    if not (folder / CARD).is_file():
        return None
    results = [r for r in ModelCard.load(folder / CARD).data.eval_results or [] if r.metric_type in GENERATION_METRICS]
    if not results:
        return None
    values = {result.metric_type: float(result.metric_value) for result in results}
    return GenerationFigures(values, results[0].dataset_args["num_samples"], results[0].metric_config)
