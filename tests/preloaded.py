"""Imported once, before processes are forked: the libraries, and what a tiny run would make anew each time."""

import functools

import evaluate  # noqa: F401
import lpips  # noqa: F401
import matplotlib.figure  # noqa: F401
import torchmetrics  # noqa: F401
import trigger  # noqa: F401

import modeling_dit  # noqa: F401
from rae_suite import lpips_vgg16

lpips_vgg16.random_vgg16_state = functools.cache(lpips_vgg16.random_vgg16_state)
lpips_vgg16.random_vgg16_state()  # 0.4 s
