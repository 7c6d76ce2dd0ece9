"""Imported once, before processes are forked: the libraries, and what a tiny run would make anew each time."""

import functools

import evaluate  # noqa: F401
import lpips  # noqa: F401
import matplotlib.figure  # noqa: F401
import torchmetrics  # noqa: F401
import trigger  # noqa: F401

import modeling_dit  # noqa: F401
from rae_suite import lpips_vgg16, settings_rae

lpips_vgg16.random_vgg16_state = functools.cache(lpips_vgg16.random_vgg16_state)
lpips_vgg16.random_vgg16_state()  # 0.4 s
settings_rae.parse_config(["--config", str(settings_rae.DEFAULT_CONFIG)])  # makes the parser, 0.3 s, which is kept
