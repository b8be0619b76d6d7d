"""Tests on a simulated accelerator, where this PyTorch can simulate one."""

from __future__ import annotations

from torch.utils import backend_registration

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    collect_ignore_glob = ["*"]
