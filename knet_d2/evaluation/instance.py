"""Average precision of instances."""

from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from ..data import ClassTable
from ..data.coco_json import check_for_evaluation, read_coco_json
from ..tasks import TASKS


class InstanceEvaluator(COCOEvaluator):
    """Detectron2's evaluator, for panoptic data sets too, whose list of "thing_classes" has the stuff as well.

    A data set that is a part of a JSON's images is evaluated on these alone.
    """

    def __init__(self, dataset_name: str, **options: Any) -> None:
        """See COCOEvaluator; the JSON of the data set is checked before."""
        json_file = MetadataCatalog.get(dataset_name).get("json_file")
        if json_file:
            check_for_evaluation(read_coco_json(json_file), json_file)
        super().__init__(dataset_name, **options)

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, dict[str, float]] | None:
        """Returns {"segm": {"AP", "AP50", ...}, "bbox": ...} in percent, on the main process."""
        return super().evaluate(self._metadata.get("image_ids") if img_ids is None else img_ids)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if class_names is not None:
            class_names = ClassTable.from_metadata(self._metadata, TASKS["instance"]).names
        return super()._derive_coco_results(coco_eval, iou_type, class_names=class_names)
