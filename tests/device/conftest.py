"""Tests on a simulated accelerator, where this PyTorch can simulate one."""

from __future__ import annotations

import torch
from torch.utils import backend_registration

if not (hasattr(backend_registration, "_setup_privateuseone_for_python_backend") and hasattr(torch._C, "_acc")):
    collect_ignore_glob = ["*"]
