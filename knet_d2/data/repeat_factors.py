"""How often each image is drawn in an epoch, so that images of rare classes are drawn more often.

Gupta et al., LVIS, 2019, Appendix B.2, computed by Detectron2's RepeatFactorTrainingSampler.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm

from ..errors import ConfigError
from .mapper import KNetDatasetMapper, build_mapper

logger = logging.getLogger(__name__)

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")


def repeat_factors(records: list[dict[str, Any]], cfg: CfgNode) -> np.ndarray | None:
    """Compute the repeat factors that DATALOADER.SAMPLER_TRAIN asks for; None if each image is drawn once.

    The factor of a class that occurs in the share f of the images is max(1, sqrt(REPEAT_THRESHOLD / f)). The factor of
    an image is the largest one of its classes.

    Args:
        records: the training images; their label maps, if the task learns from these, are all read.
        cfg: the config, with its classes resolved.

    Returns:
        float64 [images], at least 1.

    Raises:
        ConfigError: SAMPLER_TRAIN is unknown, or REPEAT_THRESHOLD does not fit it.
        DataError: a label map can't be read, or a category_id is not among the model's.
    """
    name, threshold = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD
    if name not in SAMPLERS:
        raise ConfigError(f"DATALOADER.SAMPLER_TRAIN = {name!r}: use one of {', '.join(SAMPLERS)}.")
    if name == "TrainingSampler":
        if threshold:
            logger.warning(
                "DATALOADER.REPEAT_THRESHOLD = %s has no influence. Set DATALOADER.SAMPLER_TRAIN to %s.",
                *(threshold, SAMPLERS[1]),
            )
        return None
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"DATALOADER.REPEAT_THRESHOLD = {threshold}: use a share of the images, above 0 and at most 1, such as "
            "0.001. Images of classes that occur in fewer images are repeated."
        )
    classes = _classes_of_images(records, build_mapper(cfg, is_train=True))
    annotated = [{"annotations": [{"category_id": k} for k in of_image]} for of_image in classes]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(annotated, threshold).double().numpy()
    logger.info(
        "Repeat factors: an epoch has about %.0f images of %d; the largest factor is %.2f.",
        *(factors.sum(), len(records), factors.max()),
    )
    return factors


def _classes_of_images(records: list[dict[str, Any]], mapper: KNetDatasetMapper) -> list[set[int]]:
    """Return the classes of each image; the processes divide the label maps."""
    classes = [mapper.annotated_classes(record) for record in records]
    with_label_maps = [i for i, record in enumerate(records) if mapper.reads_label_map(record)]
    if not with_label_maps:
        return classes
    share = with_label_maps[comm.get_rank() :: comm.get_world_size()]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda i: mapper.label_map_classes(records[i]), share))
    for indices_and_classes in comm.all_gather(list(zip(share, found, strict=True))):
        for i, of_image in indices_and_classes:
            classes[i] = classes[i] | of_image
    return classes
