"""Counts the objects of a data set by class, image and size."""

from collections import Counter
from typing import Any

from .faults import Fault

# COCO's limits between small, medium and large objects: areas in pixels of the original image.
_SMALL, _MEDIUM = 32**2, 96**2


class ObjectCounts:
    """Counts the instances or segments of a JSON, and finds faults in their numbers.

    Attributes:
        categories: categories of the JSON by id.
        per_image: number of instances in each image, without crowds and stuff.
    """

    def __init__(self, categories: dict[Any, dict], path: str, unit: str) -> None:
        """
        Args:
            categories: categories by id; a category without "isthing" is a thing class.
            path: path of the JSON.
            unit: what is counted, "instance" or "segment".
        """
        self.categories = categories
        self.per_image: Counter = Counter()
        self._path, self._unit = path, unit
        self._counts: dict[Any, Counter] = {category: Counter() for category in categories}
        self._images: dict[Any, set] = {category: set() for category in categories}

    def is_thing(self, category: Any) -> bool:
        return bool(self.categories[category].get("isthing", True))

    def add(self, image: Any, category: Any, is_crowd: bool, area: int) -> None:
        """Count one object of ``area`` pixels; 0 if the area is not known."""
        counts = self._counts[category]
        counts["pixels"] += area
        if is_crowd:
            counts["crowds"] += 1
            return
        counts["objects"] += 1
        self._images[category].add(image)
        if self.is_thing(category):
            self.per_image[image] += 1
            if area:
                counts["small" if area < _SMALL else "medium" if area < _MEDIUM else "large"] += 1

    def find_crowded_images(self, num_kernels: int, names: dict[Any, str]) -> list[Fault]:
        """Find images with more instances than the model has kernels; ``names`` maps an image id to a file name."""
        return [
            Fault(
                "more instances than kernels",
                self._path,
                f"image {i}",
                f"{names.get(i, i)} has {count} instances, but the model has {num_kernels} kernels for them",
            )
            for i, count in self.per_image.items()
            if count > num_kernels
        ]

    def find_crowds(self) -> list[Fault]:
        crowds, objects = (sum(x[key] for x in self._counts.values()) for key in ("crowds", "objects"))
        if crowds <= objects:
            return []
        return [Fault("mostly crowds", self._path, "", f"has {crowds} crowds and {objects} instances")]

    def find_unused_classes(self) -> list[Fault]:
        if not any(self._counts.values()):
            return []  # no object could be read; other faults say why
        return [
            Fault("unused class", self._path, f"category {i}", f"{category.get('name')!r} has no {self._unit}")
            for i, category in self.categories.items()
            if not self._counts[i]["objects"]
        ]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per class: things first, then stuff, each sorted by id."""
        total = sum(counts["pixels"] for counts in self._counts.values()) or 1
        rows = []
        for i in sorted(self.categories, key=lambda i: (not self.is_thing(i), str(i))):
            counts = self._counts[i]
            row: dict[str, Any] = {"class": self.categories[i].get("name")}
            if self._unit == "segment":
                row["thing"] = "yes" if self.is_thing(i) else ""
            row |= {"images": len(self._images[i]), f"{self._unit}s": counts["objects"]}
            row |= {column: counts[column] for column in ("small", "medium", "large", "crowds")}
            if self._unit == "segment":
                row["% of pixels"] = 100 * counts["pixels"] / total
            rows.append(row)
        return rows

    def summary(self) -> str:
        return f"at most {max(self.per_image.values(), default=0)} instances in an image"
