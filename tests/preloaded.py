"""Imported once, before processes are forked: the libraries, and what a tiny run would make anew each time."""

import functools

import lpips  # noqa: F401
import matplotlib.figure  # noqa: F401
import torchmetrics  # noqa: F401
import trigger  # noqa: F401

from rae_suite import config, losses

losses.random_vgg16_state = functools.cache(losses.random_vgg16_state)
losses.random_vgg16_state()  # 0.4 s
config.parse_config(["--config", str(config.DEFAULT_CONFIG)])  # makes the parser, 0.3 s, which is kept
