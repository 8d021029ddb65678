"""Pictures of kernels: average masks over images, and masks from stage to stage."""

import numpy as np
import pytest
import torch
from helpers import spread_scores, tiny_config, tiny_model
from PIL import Image

from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data import resolve_classes
from knet_d2.data.classes import ClassTable
from knet_d2.errors import ConfigError, DataError
from knet_d2.inference.insight import (
    SIDE,
    AverageMasks,
    KernelMasks,
    average_masks,
    draw_average_masks,
    draw_stages,
    stage_masks,
)
from knet_d2.programs import visualize_kernels

# Places in a sheet: margins and the title's line of picture_sheet, and the captions
LEFT, TOP, CAPTION, GAP = 8, 24, 14, 8


def sample(seed, size=(50, 75)):
    return {"image": torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("stage", [0, 2, -1])
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_masks_and_scores_are_the_model_s(task, stage):
    options = {"MODEL.KNET.TEST.STAGE": stage, "MODEL.KNET.TEST.OUTPUTS": ["instances"]}
    model = spread_scores(tiny_model(task, options)).eval()
    found = stage_masks(model, sample(0), (61, 40))
    assert len(found) == 4 and found[0].masks.shape == (6 if task == "instance" else 8, 61, 40)
    with torch.no_grad():
        instances = model([{**sample(0), "height": 61, "width": 40}])[0]["instances"]
    shown = found[stage]
    for kernel in range(6):
        row = int((instances.scores - shown.scores[kernel]).abs().argmin())
        assert instances.scores[row].item() == pytest.approx(shown.scores[kernel], abs=1e-6)
        assert instances.pred_classes[row] == shown.labels[kernel]
        assert (instances.pred_masks[row].numpy() == (shown.masks[kernel] > 0.5)).mean() > 0.999
    if task == "panoptic":  # a stuff kernel has one class
        assert shown.labels[6:].tolist() == [3, 4]


def test_average_over_images_of_any_size():
    model = spread_scores(tiny_model("panoptic")).eval()
    samples = [sample(0), sample(1, (96, 40)), sample(2)]
    single = [stage_masks(model, x, (SIDE, SIDE))[-1] for x in samples]
    threshold = float(np.median([x.scores[:6] for x in single]))
    average = average_masks(model, iter(samples), threshold)
    assert average.masks == pytest.approx(sum(x.masks[:6].astype(float) for x in single) / 3, abs=1e-6)
    assert average.num_objects.tolist() == [sum(x.scores[k] >= threshold for x in single) for k in range(6)]
    assert 0 < average.num_objects.sum() < 18 and average.num_images == 3
    with pytest.raises(DataError, match="no image"):
        average_masks(model, [], 0.5)


def test_sheet_of_averages_is_sorted_by_size():
    masks = np.zeros((3, SIDE, SIDE))
    masks[0, :, :20] = 0.5  # 5 %, at the left
    masks[1, :100] = 0.2  # 10 %, at the top
    masks[2, 180:] = 0.1  # 1 %, at the bottom
    sheet = draw_average_masks(AverageMasks(masks, np.array([4, 0, 9]), 10)).astype(int)
    assert sheet.shape == (20 + 8 + 2 * (SIDE + CAPTION + GAP), LEFT + 2 * (SIDE + GAP), 3)

    def cell(row, column):
        y, x = TOP + row * (SIDE + CAPTION + GAP) + CAPTION, LEFT + column * (SIDE + GAP)
        return sheet[y : y + SIDE, x : x + SIDE]

    for place, kernel in (((0, 0), 1), ((0, 1), 0), ((1, 0), 2)):
        assert ((cell(*place)[..., 0] > 200) == (masks[kernel] > 0)).all()  # yellow, not violet


def test_sheet_of_stages_lights_masks():
    classes = ClassTable(["cup", "table"], [1, 2], [(255, 0, 0), (0, 255, 0)], 1)
    image = np.full((40, 80, 3), 200, np.uint8)
    masks = np.zeros((3, 40, 80))
    masks[1, :, 40:] = 1
    stages = [KernelMasks(masks, np.array([0.9, 0.1, 0.2]), np.array([0, 0, 1]))]
    stages += [KernelMasks(1 - masks, np.array([0.1, 0.8, 0.2]), np.array([0, 0, 1]))]
    sheet = draw_stages(image, stages, classes, 2)
    height = SIDE // 2
    assert sheet.shape == (20 + 8 + 2 * (height + CAPTION + GAP), LEFT + 2 * (SIDE + GAP), 3)
    # The first row is of the kernel with the best score in the end
    best = sheet[TOP + CAPTION + height // 2, LEFT : LEFT + 2 * (SIDE + GAP)]
    values = best[[SIDE // 4, SIDE * 3 // 4, SIDE + GAP + SIDE // 4, SIDE + GAP + SIDE * 3 // 4], 0]
    assert values.tolist() == [40, 200, 200, 40]


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_tool(task, tmp_path):
    cfg = tiny_config(task, {"INPUT.MIN_SIZE_TEST": 64})
    resolve_classes(cfg)
    weights = str(tmp_path / "model.pth")
    save_weights(weights, tiny_model(task, {"INPUT.MIN_SIZE_TEST": 64}).state_dict(), describe_model(cfg))
    (tmp_path / "images").mkdir()
    for i in range(2):
        pixels = np.random.RandomState(i).randint(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    average, stages = tmp_path / "new" / "average.png", tmp_path / "stages.png"
    arguments = [weights, "--images", str(tmp_path / "images"), "--average", str(average), "--stages", str(stages)]
    args = visualize_kernels.get_parser().parse_args([*arguments, "--kernels", "3", "--opts", "MODEL.DEVICE", "cpu"])
    if task == "semantic":
        with pytest.raises(ConfigError, match="TASK = 'semantic'.*TEST.STAGE"):
            visualize_kernels.main(args)
        return
    visualize_kernels.main(args)
    assert Image.open(average).size == (LEFT + 3 * (SIDE + GAP), 28 + 2 * (SIDE + CAPTION + GAP))
    assert Image.open(stages).size == (LEFT + 4 * (SIDE + GAP), 28 + 3 * (SIDE * 3 // 4 + CAPTION + GAP))
