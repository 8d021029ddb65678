"""K-Net as a Detectron2 meta architecture."""

from __future__ import annotations

import functools
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from torch import nn

from ..data.classes import with_classes
from ..data.ground_truth import GroundTruth, ground_truth_of
from ..data.pixels import PixelFormat
from ..errors import ConfigError, DataError, NonFiniteError
from ..tasks import build_bank, get_task
from .association import VideoKernels, build_video_kernels, group_embeddings, network_of_pairs, with_references
from .backbone import add_neck
from .cascade import KernelUpdateCascade, select_stage
from .compilation import CompiledNetwork
from .criterion import KNetCriterion
from .layers import channels_last, upsampled_size, use_folded_convolutions
from .postprocessing import ImageGeometry, ImageLogits, PostProcessor
from .recomputation import checkpoint_activations
from .static_kernels import build_auxiliary_head, build_static_kernels
from .structures import KernelMemory, KernelState, NetworkOutput, Targets
from .targets import build_targets
from .training_kernels import TrainingKernels, build_training_kernels


class Preprocessor(nn.Module):
    """Makes the network's input from the images of a batch: normalised, and padded to one size.

    Attributes:
        pixel_mean, pixel_std: float [C, 1, 1], in the order of INPUT.FORMAT.
        pads_images: whether images of several sizes may share a padded batch in evaluation.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, cfg):
        super().__init__()
        PixelFormat.from_config(cfg)  # refuses a mean or deviation for another number of channels
        self.pads_images = get_task(cfg).pads_images
        mean, std = torch.tensor(cfg.MODEL.PIXEL_MEAN).float(), torch.tensor(cfg.MODEL.PIXEL_STD).float()
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(-1, 1, 1), persistent=False)

    def forward(self, batched_inputs: list[dict[str, Any]], divisibility: int) -> ImageList:
        """Normalise, then pad with 0 at the right and bottom.

        Args:
            batched_inputs: see :meth:`KNet.forward`.
            divisibility: the padded height and width are multiples of it.
        """
        images = [x["image"].to(self.pixel_mean.device, non_blocking=True) for x in batched_inputs]
        for image, x in zip(images, batched_inputs):
            if image.dim() != 3 or image.shape[0] != len(self.pixel_mean):
                raise DataError(
                    f"{x.get('file_name', 'image')}: shape {tuple(image.shape)}, expected ({len(self.pixel_mean)}, "
                    "height, width), the channels in the order of INPUT.FORMAT."
                )
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        least = [x["padded_size"] for x in batched_inputs if "padded_size" in x]
        # Computed with numbers, while ImageList.from_tensors would compute it with tensors
        height, width = (-(-max(sides) // divisibility) * divisibility for sides in zip(*sizes, *least))
        batch = self.pixel_mean.new_zeros(len(images), len(self.pixel_mean), height, width)
        for image, padded in zip(images, batch):
            padded[:, : image.shape[1], : image.shape[2]].copy_(self.normalise(image))
        return ImageList(batch, sizes)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """[..., C, H, W] -> float32, also in a float64 model, so that models of all precisions see the same image."""
        return (images.float() - self.pixel_mean.float()) / self.pixel_std.float()


@META_ARCH_REGISTRY.register()
class KNet(nn.Module):
    """Unified segmentation with learned kernels (arXiv:2106.14855): backbone, static kernels, cascade, outputs."""

    # What the training step advises where no loss depends on some parameters
    gradient_advice = "Set one of MODEL.KNET.LOSS.MASK_WEIGHT, DICE_WEIGHT and RANK_WEIGHT above 0"

    @configurable
    def __init__(
        self,
        *,
        preprocessor: Preprocessor,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        cascade: KernelUpdateCascade,
        criterion: KNetCriterion,
        auxiliary_head: nn.Module | None,
        training_kernels: TrainingKernels | None,
        postprocessor: PostProcessor,
        compile_network: bool,
        checkpoint: bool = False,
        video: VideoKernels | None = None,
    ):
        """
        Args:
            sem_seg_head: producer of the static kernels.
            auxiliary_head: a second semantic head for training only, or None.
            training_kernels: more groups of kernels, for training only, or None.
            postprocessor: makes the results of an image from its logits.
            compile_network: whether torch.compile compiles backbone, static kernels and cascade.
            checkpoint: whether static kernels and cascade compute their activations again in the backward pass.
            video: what the model learns to follow objects by; None: an image model.
        """
        super().__init__()
        self.preprocessor = preprocessor
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.cascade = cascade
        self.criterion = criterion
        self.auxiliary_head = auxiliary_head
        self.video = video
        self.training_kernels = training_kernels
        self.postprocessor = postprocessor
        self.bank = criterion.bank
        self.compiled = CompiledNetwork() if compile_network else None
        use_folded_convolutions(self)
        if checkpoint:  # afterwards, so that it finds the folded convolutions
            checkpoint_activations(self.sem_seg_head, self.cascade.stages)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        task = get_task(cfg)
        cfg = with_classes(cfg)
        knet = cfg.MODEL.KNET
        if "instances" in task.annotations and knet.NUM_KERNELS < 1:
            raise ConfigError(f"MODEL.KNET.NUM_KERNELS = {knet.NUM_KERNELS}: use at least 1.")
        preprocessor = Preprocessor(cfg)
        bank = build_bank(cfg)
        postprocessor = PostProcessor(cfg, bank)
        backbone = add_neck(cfg, build_backbone(cfg))
        shape = backbone.output_shape()
        return {
            "preprocessor": preprocessor,
            "backbone": backbone,
            "sem_seg_head": build_static_kernels(cfg, shape, bank),
            "cascade": KernelUpdateCascade(cfg, bank.num_classes, shape),
            "criterion": KNetCriterion(cfg, bank),
            "auxiliary_head": build_auxiliary_head(cfg, shape, bank),
            # The last one with weights, so that the others' initial values do not depend on it
            "training_kernels": build_training_kernels(cfg, bank),
            "postprocessor": postprocessor,
            "compile_network": cfg.MODEL.COMPILE,
            "checkpoint": knet.CHECKPOINT,
            "video": build_video_kernels(cfg, bank),
        }

    @property
    def device(self) -> torch.device:
        """Where images are moved to."""
        return self.preprocessor.pixel_mean.device

    @property
    def failure(self) -> NonFiniteError | None:
        """Why the last batch's losses are NaN, see :class:`KNetCriterion`; the training step reports it."""
        return self.criterion.failure

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this; 0 or 1: to the largest of the batch only."""
        return max(self.backbone.size_divisibility, self.sem_seg_head.size_divisibility)

    def forward(
        self, batched_inputs: list[dict[str, Any]], do_postprocess: bool = True
    ) -> dict[str, torch.Tensor] | list[dict[str, Any]] | list[ImageLogits]:
        """
        Args:
            batched_inputs: per image a dict with "image", [channels, height, width] in the order of INPUT.FORMAT,
                values 0 .. 255; for training "ground_truth" as the loaders give it, or "instances" (gt_classes,
                gt_masks) and / or "sem_seg" [height, width], the class of every pixel; for the training of a video
                model also "reference", such a dict of another frame; for inference optionally
                "height" and "width" of the result, and "padded_size", the least (height, width) of the padded batch.
            do_postprocess: False gives the :class:`ImageLogits` of each image in evaluation.

        Returns:
            In training a dict of weighted losses. In evaluation per image a dict with some of

            * "instances": Instances with pred_boxes, scores, pred_classes, pred_masks;
            * "panoptic_seg": int32 [H, W] map of segment ids and list of segment infos;
            * "sem_seg": [K, H, W] scores.
        """
        if not self.training:
            logits = self.predict_logits(batched_inputs)
            return [self.postprocessor(image_logits) for image_logits in logits] if do_postprocess else logits
        frames = batched_inputs if self.video is None else with_references(batched_inputs)
        is_paired = len(frames) > len(batched_inputs)
        images = self.preprocess_image(frames)
        truths = self.send_ground_truth(frames)  # before the network, so that the copies run beside it
        network = functools.partial(network_of_pairs, self) if is_paired else self.network
        output = network(images.tensor, torch.tensor(images.image_sizes))
        auxiliary_logits = None if self.auxiliary_head is None else self.auxiliary_head(output.features)
        targets = self.prepare_targets(truths, images, output.state)
        association = None
        if is_paired and output.embeddings is not None:
            association = functools.partial(self.video.losses, output.embeddings)
        groups = () if self.training_kernels is None else self.training_kernels(self.cascade, output.state, targets)
        return self.criterion(output.state, output.stages, targets, auxiliary_logits, association, groups)

    def network(
        self, images: torch.Tensor, image_sizes: torch.Tensor | None = None, memory: KernelMemory | None = None
    ) -> NetworkOutput:
        """The one way through the network: backbone -> static kernels -> cascade.

        Args:
            images: normalised and padded, [B, C, H, W]; H and W multiples of ``size_divisibility``.
            image_sizes: int64 [B, 2], height and width of the images without padding (one may stand for all), on any
                device; None: there is no padding.
            memory: the previous frames' kernels, which a video model may use; None: there are none.
        """
        if self.compiled is None or torch.compiler.is_compiling():
            return self.static_network(images, image_sizes, memory)
        return self.compiled(self, images, image_sizes, memory)

    def static_network(
        self, images: torch.Tensor, image_sizes: torch.Tensor | None, memory: KernelMemory | None = None
    ) -> NetworkOutput:
        """What MODEL.COMPILE compiles: the part whose shapes depend on the batch's size alone. See :meth:`network`."""
        features = self.backbone(channels_last(images))
        state = self.sem_seg_head(features, image_sizes)
        if self.video is None:
            stages, embeddings = self.cascade(state), None
        else:
            stages, embeddings = self.video(self.cascade, state, memory)
        # By what objects are followed in a video; an exported model gives it, so it is computed for every image
        if embeddings is None and not self.training and self.bank.num_matched and self.cascade.corrects_masks:
            embeddings = group_embeddings(state.feature, stages[-1].mask_logits, self.bank.num_matched)
        return NetworkOutput(features, state, stages, embeddings)

    def predict_logits(
        self, batched_inputs: list[dict[str, Any]], memory: KernelMemory | None = None
    ) -> list[ImageLogits]:
        """The logits of each image from the stage that MODEL.KNET.TEST.STAGE names, before post-processing.

        Args:
            memory: see :meth:`network`.
        """
        if not self.preprocessor.pads_images and len({x["image"].shape for x in batched_inputs}) > 1:
            # An image's result must not depend on the sizes of its neighbours
            return [logits for x in batched_inputs for logits in self.predict_logits([x])]
        images = self.preprocess_image(batched_inputs)
        output = self.network(images.tensor, torch.tensor(images.image_sizes), memory)
        return self.image_logits(output, batched_inputs, images)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise, then pad with 0 at the right and bottom."""
        return self.preprocessor(batched_inputs, max(self.size_divisibility, 1))

    def send_ground_truth(self, batched_inputs: list[dict[str, Any]]) -> list[GroundTruth]:
        """Ground truth of every image on the model's device; checked here where the loader has not done it."""
        return [ground_truth_of(x, self.bank, self.criterion.ignore_value).to(self.device) for x in batched_inputs]

    def prepare_targets(self, truths: list[GroundTruth], images: ImageList, state: KernelState) -> list[Targets]:
        """Targets of every image at the sizes that the losses need."""
        mask_size = None if self.criterion.num_points else upsampled_size(state.mask_logits)
        needs_cells = state.center_logits is not None or self.training_kernels is not None
        cell_size = tuple(state.feature.shape[-2:]) if needs_cells else None
        ignore_value = self.criterion.ignore_value
        return [build_targets(truth, images.tensor, mask_size, ignore_value, cell_size) for truth in truths]

    def image_logits(
        self, output: NetworkOutput, batched_inputs: list[dict[str, Any]], images: ImageList, stage: int | None = None
    ) -> list[ImageLogits]:
        """The logits of one stage, image by image.

        Args:
            stage: see :func:`select_stage`; None: the one that MODEL.KNET.TEST.STAGE names.
        """
        shown = select_stage(output, self.postprocessor.options.stage if stage is None else stage)
        logits = []
        for i, x in enumerate(batched_inputs):
            image_size = tuple(images.image_sizes[i])
            output_size = (x.get("height", image_size[0]), x.get("width", image_size[1]))
            geometry = ImageGeometry(tuple(images.tensor.shape[-2:]), image_size, output_size)
            class_logits = None if shown.class_logits is None else shown.class_logits[i]
            last = (output.stages[-1] if output.stages else shown).kernels[i]
            embeddings = shown.kernels[i] if output.embeddings is None else output.embeddings[i]
            logits.append(ImageLogits(class_logits, shown.mask_logits[i], geometry, embeddings, last))
        return logits
