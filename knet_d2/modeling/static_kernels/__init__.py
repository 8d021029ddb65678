"""Producers of static kernels: Detectron2 SEM_SEG heads that return a :class:`~..structures.KernelState`.

Importing this package registers them.
"""

from . import decode_heads, image_kernels, semantic_fpn
from .build import build_auxiliary_head, build_static_kernels

__all__ = ["build_auxiliary_head", "build_static_kernels", "decode_heads", "image_kernels", "semantic_fpn"]
