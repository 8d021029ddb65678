"""Count the parameters and multiply-adds of a K-Net by module, without post-processing.

%(prog)s coco/panoptic/knet_r50_fpn_1x.yaml --size 800x1216 --depth 3
%(prog)s coco/instance/knet_r50_fpn_1x.yaml MODEL.KNET.NUM_KERNELS 256
"""

import argparse
import logging
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import flop_count_table
from fvcore.nn.jit_handles import get_shape
from torch import nn

from ..config.files import get_config_file
from ..engine import load_config
from .arguments import size


def count_matmul(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the multiply-adds of x @ y; fvcore's own function fails if y is a vector."""
    return torch.Size(get_shape(outputs[0])).numel() * get_shape(inputs[0])[-1]


def count_baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the multiply-adds of b + x @ y for batches of matrices; fvcore does not support this operator."""
    batch, rows, inner = get_shape(inputs[1])
    return batch * rows * inner * get_shape(inputs[2])[2]


def count_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the multiply-adds of q @ k.T and weights @ v; fvcore does not support PyTorch's fused attention."""
    *batch, queries, dim = get_shape(inputs[0])
    keys, value_dim = get_shape(inputs[2])[-2:]
    return int(torch.Size(batch).numel()) * queries * keys * (dim + value_dim)


class NetworkAlone(nn.Module):
    """A K-Net without pre- and post-processing, whose modules keep their names. All tensors of a stage are outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.__dict__["_model"] = model  # not registered as a child, so that the modules keep their names
        for name, child in model.named_children():
            self.add_module(name, child)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        # Return all tensors, because the tracer drops operations that no output depends on.
        return [x for stage in self.__dict__["_model"].network(images).stages for x in stage if x is not None]


def analyze(config: str, opts: list[str], size: tuple[int, int]) -> FlopCountAnalysis:
    """Count the multiply-adds of one prediction, without post-processing, for an image of size (height, width)."""
    cfg = load_config(get_config_file(config), ["MODEL.WEIGHTS", "", *opts, "MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    flops = FlopCountAnalysis(NetworkAlone(model), torch.zeros(1, 3, *size))
    flops.set_op_handle("aten::matmul", count_matmul)
    flops.set_op_handle("aten::baddbmm", count_baddbmm)
    flops.set_op_handle("aten::scaled_dot_product_attention", count_attention)
    return flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="path below configs/")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs that change the config")
    parser.add_argument("--size", type=size, default=(800, 1216), help="size of the network's input, HxW")
    parser.add_argument("--depth", type=int, default=3, help="depth of the modules in the table")
    return parser


def main(args: argparse.Namespace) -> None:
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    print(flop_count_table(analyze(args.config, args.opts, args.size), max_depth=args.depth))
