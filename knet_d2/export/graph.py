"""A K-Net as one function of tensors, from the image to the final result, without Python that depends on values.

Shapes: B images of one size, H x W in the network's input and h x w in the result; n rows of a table of results.
"""

import copy

import torch
from torch import nn

from ..errors import ConfigError
from ..modeling.backbone.swin import SwinTransformer
from ..modeling.backbone.timm import TimmBackbone
from ..modeling.cascade import select_stage
from ..modeling.meta_arch import KNet
from ..modeling.postprocessing import ImageGeometry, dense
from ..modeling.structures import KernelMemory

INPUT_NAMES = ("image", "image_size", "output_size")
# A model's main output -> names of the tensors that stand for it
OUTPUT_NAMES = {
    "instances": ("scores", "labels", "boxes", "masks", "embeddings"),
    "panoptic_seg": ("segment_map", "scores", "labels", "areas", "embeddings"),
    "sem_seg": ("label_map",),
}
# More inputs and outputs of a model whose frames depend on the frame before, see ExportableKNet
MEMORY_INPUT_NAMES = ("memory_kernels", "has_memory")
MEMORY_OUTPUT_NAMES = ("kernels",)


class ExportableKNet(nn.Module):
    """A K-Net in evaluation mode with tensors in and out.

    The result is the model's first output (MODEL.KNET.TEST.OUTPUTS); a row of a table is a candidate:

    * "instances": scores [B, n], falling; labels int64 [B, n]; boxes [B, n, 4] (x1, y1, x2, y2); masks bool
      [B, n, h, w]. n is TEST.DETECTIONS_PER_IMAGE at most; TEST.SCORE_THRESHOLD is left to the reader. Rows that mask
      NMS suppressed have the score -1.
    * "panoptic_seg": segment_map int32 [B, h, w], 1 + the row of each pixel's segment, 0 is void; scores, labels and
      areas (pixels), [B, N] by falling score. The segments that were kept come first, the area of other rows is 0.
    * "sem_seg": label_map int32 [B, h, w], the best class.

    The first two also have embeddings [B, n or N, E], by which a tracker follows objects: those of the network, else
    the kernel of each row.

    A model with kernel linking or fusing takes the memory as tensors, and gives kernels [B, N, C], which are the memory
    of the next frame.
    """

    def __init__(self, model: KNet):
        """
        Args:
            model: in evaluation mode. Its backbone and sem_seg_head may be of half precision.

        Raises:
            ConfigError: it can't be exported.
        """
        super().__init__()
        self.main_output = model.postprocessor.options.outputs[0]
        if self.main_output == "sem_seg" and model.bank.num_matched:
            raise ConfigError(
                "MODEL.KNET.TEST.OUTPUTS begins with 'sem_seg', which can't be exported for kernels that are matched "
                "to instances. Put 'panoptic_seg' or 'instances' first."
            )
        if self.main_output == "instances" and model.postprocessor.options.max_instances == 0:
            raise ConfigError("TEST.DETECTIONS_PER_IMAGE = 0: there would be no result. Use 1 or more.")
        self.model = _without_training_parts(model)

    def forward(
        self,
        image: torch.Tensor,
        image_size: torch.Tensor,
        output_size: torch.Tensor,
        memory_kernels: torch.Tensor | None = None,
        has_memory: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            image: uint8 or float32 [B, C, H, W] from 0 to 255, in the order of INPUT.FORMAT, H and W multiples of
                ``model.size_divisibility``; the images at the top left, anything in the rest.
            image_size: int64 [2], height and width of the images in it.
            output_size: int64 [2], height and width of the result: those of the original images.
            memory_kernels: float32 [B, N, C], the kernels of the previous frames.
            has_memory: bool [B], False where there is no previous frame; the kernels are not read then.

        Returns:
            The tensors in OUTPUT_NAMES, with a memory also those in MEMORY_OUTPUT_NAMES.
        """
        model, results = self.model, self.model.postprocessor
        options = results.options._replace(score_threshold=None)
        geometry = _checked_geometry(image, image_size, output_size)
        memory = None
        if memory_kernels is not None and has_memory is not None:
            memory = KernelMemory(memory_kernels, has_memory)
        output = model.network(self._normalise(image, geometry), image_size[None], memory)
        embeddings, mask_logits, class_logits = select_stage(output, options.stage)
        if output.embeddings is not None:
            embeddings = output.embeddings
        found = results.tensors(self.main_output, class_logits, mask_logits, geometry, options, dense)
        if self.main_output == "sem_seg":
            return (found[0].argmax(dim=1).int(),)
        *columns, rows = found
        embeddings = embeddings.gather(1, rows[..., None].expand(-1, -1, embeddings.shape[-1]))
        return (*columns, embeddings) if memory is None else (*columns, embeddings, output.stages[-1].kernels)

    def _normalise(self, image: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
        """Normalised pixels, and 0 around the image."""
        pixels = self.model.preprocessor.normalise(image)
        lengths = zip(geometry.padded, geometry.image)
        rows, columns = (torch.arange(padded, device=image.device) < inside for padded, inside in lengths)
        pixels = torch.where(rows[:, None] & columns, pixels, 0.0)
        return pixels.to(next(self.model.backbone.parameters()).dtype)


def memory_shape(model: KNet) -> tuple[int, int] | None:
    """(N, C) of "memory_kernels", if a frame's result depends on the kernels of the frame before."""
    if model.video is None or not model.video.uses_memory:
        return None
    return model.bank.num_kernels, model.video.dim


def _without_training_parts(model: KNet) -> KNet:
    """A copy that shares the weights, without the modules that an evaluated model never calls."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    exported = copy.deepcopy(model, shared)
    exported.auxiliary_head = None
    exported.training_kernels = None
    return exported


def has_windows(model: KNet) -> bool:
    """Whether the backbone's attention is in windows, which torch.export follows at one size only."""
    return any(
        isinstance(module, SwinTransformer) or (isinstance(module, TimmBackbone) and module.has_windows)
        for module in model.modules()
    )


def example_inputs(
    model: KNet, image_type: torch.dtype, size: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """Inputs to trace :class:`ExportableKNet` with; two images, so that their number is not taken for a constant.

    Args:
        size: height and width of the padded images; None: any.
    """
    step = max(model.size_divisibility, 1)
    height, width = size or (-(-length // step) * step for length in (96, 128))
    image = torch.randint(0, 256, (2, len(model.preprocessor.pixel_mean), height, width), device=model.device).to(
        image_type
    )
    image_size = torch.tensor([height - height // 16, width - width // 16])
    inputs = {"image": image, "image_size": image_size, "output_size": torch.tensor([150, 200])}
    memory = memory_shape(model)
    if memory is not None:
        kernels = torch.randn(2, *memory, device=model.device)
        inputs |= dict(zip(MEMORY_INPUT_NAMES, (kernels, torch.tensor([True, False], device=model.device))))
    return inputs


def _checked_geometry(image: torch.Tensor, image_size: torch.Tensor, output_size: torch.Tensor) -> ImageGeometry:
    """The sizes as numbers that the tracer knows the bounds of."""
    padded, inside, output = tuple(image.shape[-2:]), tuple(image_size.tolist()), tuple(output_size.tolist())
    for length, most in zip(inside, padded):
        torch._check(length >= 1)
        torch._check(length <= most)
    for length in output:
        torch._check(length >= 1)
    return ImageGeometry(padded, inside, output)  # type: ignore[arg-type]  # tuples of two
