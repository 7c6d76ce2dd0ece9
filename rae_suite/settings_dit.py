"""Settings of stage 2 that its scripts share."""

from dataclasses import dataclass
from typing import Literal, Optional

from rae_suite.cli import POSITIVE, Limit, require, setting
from rae_suite.settings import check_used

TIMES = Limit(
    lambda interval: 0 <= interval[0] <= interval[1] <= 1, "two times in [0, 1], the least and the greatest, 1 is noise"
)


@dataclass
class SamplingConfig:
    """How a stage-2 model draws images from noise."""

    num_inference_steps: int = setting(50, POSITIVE)
    """Points in time as published: with `end` published there is one step fewer, 50 are 49 passes of the model."""
    end: Literal["published", "zero"] = "published"
    """Where the last step ends: published at the shifted time 0.001, as RAE's figures were measured; zero takes as many
    steps as there are points, the last one to time 0 (RAEv2)."""
    solver: Literal["euler", "heun2"] = "euler"
    """euler has one pass of the model for each step, heun2 two."""
    guidance_scale: float = 1.0
    """Factor of the guidance; 1 is off. With a `guide` autoguidance's, else that of classifier-free guidance."""
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), TIMES)
    """Least and greatest shifted time at which guidance is on, both included; 1 is noise."""
    guide: Optional[str] = None
    """A weaker model for autoguidance, given as the model itself is; none: the model's own guide if it is saved with
    one. "none" leaves that out: the scale is then classifier-free guidance's."""


def check_sampling(sampling: SamplingConfig, prefix: str = "sampling.") -> None:
    """Raise ConfigError for settings that cannot be used together."""
    points, scale, name = sampling.num_inference_steps, sampling.guidance_scale, f"{prefix}num_inference_steps"
    require(points > 1 or sampling.end == "zero", name, f"at least 2 unless {prefix}end is zero", points)
    interval = None if sampling.guidance_interval == (0.0, 1.0) else list(sampling.guidance_interval)
    for name, value in (("guide", sampling.guide), ("guidance_interval", interval)):
        check_used(f"{prefix}{name}", value, scale != 1, f"{prefix}guidance_scale is another than 1")
