"""What the model cards of both stages have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from huggingface_hub import EvalResult

from rae_suite.hub import data_name


@dataclass
class CardFacts:
    """What a card says beside the models' settings. `repo_id`: user/name, or the folder that a run wrote; `figures`:
    what was measured, by the stage's own class; `picture`: whether the card's picture is there; `trained_on`: data.path
    of the run; `run_settings`: text of the run's config.yaml."""

    repo_id: str
    license: str = "apache-2.0"
    figures: Any = None
    picture: bool = False
    trained_on: Optional[str] = None
    run_settings: Optional[str] = None


def eval_results(
    task: tuple[str, str],
    data: str,
    num_samples: int,
    values: dict,
    metrics: Mapping,
    how: Mapping,
    split: Optional[str] = None,
) -> list:
    """Figures as the Hub's model-index has them.

    Args:
        task: its id on the Hub, and its name.
        data: name of the data set; `split` of it, where that is known.
        values: by the names of the table `metrics`.
        how: metric_config of each value, by the same names.
    """
    return [
        EvalResult(
            task_type=task[0],
            task_name=task[1],
            dataset_type=data,
            dataset_name=data,
            dataset_split=split,
            dataset_args={"num_samples": num_samples},
            metric_type=name,
            metric_name=metrics[name].title,
            metric_value=round(value, 4),
            metric_config=how[name],
        )
        for name, value in values.items()
    ]


def figures_table(values: dict, metrics: Mapping) -> str:
    """Values by the names of the table `metrics`, in Markdown."""
    rows = "\n".join(f"| {metrics[name].title} | {value:.4f} |" for name, value in values.items())
    return f"| metric | value |\n|---|---|\n{rows}"


def training_part(facts: CardFacts) -> str:
    """What the model was trained on, and the run's settings."""
    on = f"Trained on `{data_name(facts.trained_on)}`.\n\n" if facts.trained_on else ""
    return (
        f"## Training\n\n{on}<details><summary>All settings</summary>\n\n```yaml\n{facts.run_settings.strip()}\n```\n\n"
        "</details>"
    )
