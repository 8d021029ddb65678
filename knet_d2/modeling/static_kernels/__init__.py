"""Producers of static kernels: Detectron2 SEM_SEG heads that return a :class:`~..structures.KernelState`."""

from .build import build_auxiliary_head, build_static_kernels
from .decode_heads import ASPPKernelHead, AuxiliaryHead, DecodeKernelHead, FCNKernelHead, PSPKernelHead, UPerKernelHead
from .image_kernels import ImageKernelHead
from .semantic_fpn import SemanticFPN, SemanticFPNKernelHead

__all__ = [
    "ASPPKernelHead",
    "AuxiliaryHead",
    "DecodeKernelHead",
    "FCNKernelHead",
    "ImageKernelHead",
    "PSPKernelHead",
    "SemanticFPN",
    "SemanticFPNKernelHead",
    "UPerKernelHead",
    "build_auxiliary_head",
    "build_static_kernels",
]
