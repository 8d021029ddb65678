"""Trained models that come with the package: the files of knet_d2/weights, each by its name without the ending."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "weights"


def packaged_names() -> list[str]:
    """The names, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def packaged_file(name: str) -> str | None:
    """The weights file of a name; None if no model that comes with the package has it."""
    return str(FOLDER / f"{name}.safetensors") if name in packaged_names() else None
