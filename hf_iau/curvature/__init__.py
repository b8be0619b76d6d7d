"""Curvature of the mean row loss, by which forgetting steps are preconditioned."""

from hf_iau.curvature.blocks import Block, DiagonalBlock, IdentityBlock, KroneckerBlock
from hf_iau.curvature.curvature import Curvature, CurvatureKind
from hf_iau.curvature.estimators import fit_curvature

__all__ = [
    "Block",
    "Curvature",
    "CurvatureKind",
    "DiagonalBlock",
    "IdentityBlock",
    "KroneckerBlock",
    "fit_curvature",
]
