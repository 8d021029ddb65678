"""Producers of static kernels: Detectron2 SEM_SEG heads that return a :class:`~knet_d2.structures.KernelState`."""

from .decode_heads import AuxiliaryHead, DecodeKernelHead, FCNKernelHead, build_auxiliary_head
from .semantic_fpn import SemanticFPN, SemanticFPNKernelHead

__all__ = [
    "AuxiliaryHead",
    "DecodeKernelHead",
    "FCNKernelHead",
    "SemanticFPN",
    "SemanticFPNKernelHead",
    "build_auxiliary_head",
]
