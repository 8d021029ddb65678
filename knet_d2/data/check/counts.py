"""Counts the objects of a data set by class, image and size."""

from collections import Counter
from collections.abc import Collection
from typing import Any

from .faults import ERROR, Fault, counted
from .report import Use

# COCO's limits between small, medium and large objects: areas in pixels of the original image.
_SMALL, _MEDIUM = 32**2, 96**2


def find_absent_classes(
    classes: dict[str, str], occurring: Collection[str], unit: str, path: str, use: Use, faults: list[Fault]
) -> list[Fault]:
    """Find classes that do not occur in a data set, or that nothing is labelled, or only one class of label maps.

    Args:
        classes: name of each class by its place in the file, such as "category 3".
        occurring: places of the classes that occur.
        unit: what the classes occur in, see knet_d2.data.class_coverage.unit_of.
        path: path of the file or folder.
        use: what the data set is for.
        faults: other faults of the data set; an error explains why nothing is labelled.
    """
    if not occurring:
        if any(fault.level == ERROR for fault in faults):
            return []
        return [Fault("no annotations", path, "", f"has no {unit} of any class")]
    if unit == "pixel" and len(occurring) == 1:
        return [Fault("only one class", path, "", f"all labelled pixels are {classes[next(iter(occurring))]!r}")]
    kind = "unused class" if use.is_training else "class that is not evaluated"
    return [
        Fault(kind, path, place, f"{name!r} has no {unit}") for place, name in classes.items() if place not in occurring
    ]


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

    def find_absent_classes(self, use: Use, faults: list[Fault]) -> list[Fault]:
        """Find classes without an object, see the function of this name."""
        names = {f"category {i}": category.get("name") for i, category in self.categories.items()}
        occurring = {f"category {i}" for i, counts in self._counts.items() if counts["objects"]}
        return find_absent_classes(names, occurring, self._unit, self._path, use, faults)

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
        return f"at most {counted(max(self.per_image.values(), default=0), 'instance')} in an image"
