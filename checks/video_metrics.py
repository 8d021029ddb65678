"""Compare STQ and VPQ with their public programs on random label videos.

    python -m checks.video_metrics --stq segmentation_and_tracking_quality.py --vpq eval_vpq.py

The files are those of google-research/deeplab2 (evaluation/numpy) and mcahny/vps (tools); they are executed. This
prints the largest difference of each metric. The videos are those of ``tests/test_video_quality.py``. The counts of
deeplab2's program are made float64; as published, they are float32. The exit code is 1 if a difference is above 1e-9.
"""

import argparse
import copy
import math
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from knet_d2.video.quality import VOID, LabelMaps

MAX_DIFFERENCE = 1e-9
WINDOWS = (1, 2, 3, 4, 6)
Video = Sequence[tuple[LabelMaps, LabelMaps]]


def load_program(path: str, **replaced: str) -> Any:
    """Execute a file as a module, with words in it replaced."""
    text = Path(path).read_text()
    for old, new in replaced.items():
        text = text.replace(old, new)
    module = types.ModuleType(Path(path).stem)
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def stq_of(program: Any, videos: Sequence[Video], num_classes: int, things: Sequence[int]) -> dict[str, float]:
    """STQ, AQ and SQ by deeplab2's program."""
    quality = program.STQuality(num_classes, list(things), 255, 16, 256**3)
    for number, video in enumerate(videos):
        for frame in video:
            quality.update_state(*map(_deeplab_labels, frame), number)
    with np.errstate(invalid="ignore"):
        result = quality.result()
    return {"STQ": result["STQ"], "AQ": result["AQ"], "SQ": result["IoU"]}


def _deeplab_labels(maps: LabelMaps) -> np.ndarray:
    void = maps.classes == VOID
    return (np.where(void, 255, maps.classes).astype(np.int64) << 16) + np.where(void, 0, maps.ids)


def vpq_of(program: Any, videos: Sequence[Video], num_classes: int, things: Sequence[int]) -> dict[str, float]:
    """VPQ, VSQ and VRQ of each window, of all classes, things and stuff, by the program of Cityscapes-VPS."""
    categories = {c: {"isthing": int(c in things)} for c in range(num_classes)}
    results = {}
    for k in WINDOWS:
        total = program.PQStat()
        for video in videos:
            frames = [_vps_frame(*frame, things) for frame in video]
            total += program.vpq_compute_single_core(copy.deepcopy(frames), categories, nframes=k)
        for suffix, isthing in (("", None), ("_th", True), ("_st", False)):
            try:
                average = total.pq_average(categories, isthing)[0]
            except ZeroDivisionError:  # no class occurs
                average = dict.fromkeys(("pq", "sq", "rq"), math.nan)
            results |= {f"V{key.upper()}@{k}{suffix}": average[key] for key in ("pq", "sq", "rq")}
    return results


def _vps_frame(true: LabelMaps, predicted: LabelMaps, things: Sequence[int]) -> tuple[Any, ...]:
    found = []
    for maps, crowds in ((true, things), (predicted, ())):
        is_crowd = np.isin(maps.classes, crowds) & (maps.ids == 0)
        ids = np.where(is_crowd, 10000 + maps.classes, maps.ids)
        ids = np.where(maps.classes == VOID, 0, ids).astype(np.int64)
        segments = [
            {
                "id": int(i),
                "category_id": int(maps.classes[ids == i][0]),
                "iscrowd": int(is_crowd[ids == i][0]),
                "area": int((ids == i).sum()),
            }
            for i in np.unique(ids[ids > 0])
        ]
        pixels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1)
        found.append(({"segments_info": segments}, pixels.astype(np.uint8)))
    (true_json, true_pixels), (json, pixels) = found
    return true_json, json, true_pixels, pixels, {}


def random_sets(module: Any, count: int, seed: int) -> Iterator[list[Video]]:
    """``count`` random videos, in sets of 1 to 7."""
    rng = np.random.default_rng(seed)
    while count > 0:
        number = min(int(rng.integers(1, 8)), count)
        yield [module.random_video(rng) for _ in range(number)]
        count -= number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stq", required=True, metavar="FILE")
    parser.add_argument("--vpq", required=True, metavar="FILE")
    parser.add_argument("--count", type=int, default=200, help="number of videos")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import test_video_quality as tests

    programs = (
        (load_program(args.stq, float32="float64"), stq_of, tests.tracking, {}),
        (load_program(args.vpq), vpq_of, tests.panoptic, {"windows": WINDOWS}),
    )
    worst: dict[str, float] = {}
    for videos in random_sets(tests, args.count, args.seed):
        for program, theirs, ours, options in programs:
            expected, found = theirs(program, videos, tests.NUM_CLASSES, tests.THINGS), ours(*videos, **options)
            for key, value in expected.items():
                same = math.isnan(value) and math.isnan(found[key])
                name = key.split("@")[0]
                worst[name] = max(worst.get(name, 0.0), 0.0 if same else abs(found[key] - value))
    for name, difference in worst.items():
        print(f"{name}: {difference:.1e}")
    return int(not all(x <= MAX_DIFFERENCE for x in worst.values()))


if __name__ == "__main__":
    sys.exit(main())
