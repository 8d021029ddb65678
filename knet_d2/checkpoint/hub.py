"""Folders of models for Hugging Face's hub: weights, config, classes and a card; and their way back."""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import yaml

from ..data.classes import markdown_text
from ..errors import CheckpointError, ConfigError
from .description import read_metadata
from .saving import save_weights, write_atomically

PREFIX = "hf://"
WEIGHTS_FILE, CONFIG_FILE, CLASSES_FILE, CARD_FILE = "model.safetensors", "config.yaml", "classes.json", "README.md"
HUB_COMMAND = "install it with: python -m pip install huggingface_hub"


class CardFacts(NamedTuple):
    """What a model's card says beside what is in its weights file.

    Attributes:
        name: of the model.
        license: of the weights, as the hub writes it ("apache-2.0").
        data: what the model was trained on, and what it was evaluated on.
        metrics: name -> value, on that data.
        notes: anything else, in Markdown.
    """

    name: str
    license: str
    data: str
    metrics: dict[str, float]
    notes: str = ""


def read_card_facts(path: str) -> CardFacts:
    """Read the facts for a card from a YAML file with the attributes as keys.

    Raises:
        ConfigError: a key is missing, unknown or of another type.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"--model-card {path}: there is no such file. Write the facts of the model there.")
    with open(path, encoding="utf-8") as f:
        try:
            content = yaml.safe_load(f)
        except yaml.YAMLError as error:
            raise ConfigError(f"--model-card {path}: not a YAML file ({error}).") from error
    content = content if isinstance(content, dict) else {}
    unknown = [key for key in content if key not in CardFacts._fields]
    if unknown:
        raise ConfigError(f"--model-card {path}: {unknown[0]} = ...: use the keys {', '.join(CardFacts._fields)}.")
    for key, kind in CardFacts.__annotations__.items():
        wanted = dict if key == "metrics" else str
        if key not in CardFacts._field_defaults and not isinstance(content.get(key), wanted):
            raise ConfigError(f"--model-card {path}: {key} = {content.get(key)!r}: give it as {kind}.")
    wrong = next((x for x in content["metrics"].items() if type(x[1]) not in (int, float)), None)
    if wrong is not None or not content["metrics"]:
        raise ConfigError(f"--model-card {path}: metrics = {wrong}: name at least one, each with a number.")
    return CardFacts(**content)


def write_hub_folder(
    folder: str, state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str], facts: CardFacts
) -> None:
    """Write a folder that can be uploaded to the hub as it is, and from which :func:`knet_d2.load` makes a predictor.

    Args:
        state_dict, metadata: see :func:`save_weights`; the weights file holds config and classes, too, so that the
            other files are for readers.

    Raises:
        CheckpointError: a file can't be written.
    """
    os.makedirs(folder, exist_ok=True)
    save_weights(os.path.join(folder, WEIGHTS_FILE), state_dict, dict(metadata))
    classes = json.loads(metadata["classes"])
    size = sum(x.numel() for x in state_dict.values())
    texts = {
        CONFIG_FILE: metadata["config"],
        CLASSES_FILE: json.dumps(classes, indent=1, ensure_ascii=False),
        CARD_FILE: model_card(facts, metadata, classes, size),
    }
    for name, text in texts.items():
        write_atomically(os.path.join(folder, name), functools.partial(_write_text, text))


def _write_text(text: str, file: Any) -> None:
    file.write(text.encode())


def model_card(
    facts: CardFacts, metadata: Mapping[str, str], classes: list[dict[str, Any]], num_parameters: int
) -> str:
    """The card, in Markdown with the hub's head of YAML."""
    task = read_metadata(metadata, facts.name).cfg.MODEL.KNET.TASK
    head = {
        "license": facts.license,
        "library_name": "knet_d2",
        "pipeline_tag": "image-segmentation",
        "tags": ["k-net", f"{task}-segmentation", "detectron2"],
    }
    names = [f"{markdown_text(x['name'])} ({'thing' if x['isthing'] else 'stuff'})" for x in classes]
    figures = "\n".join(f"| {_cell(name)} | {value:g} |" for name, value in facts.metrics.items())
    notes = f"\n{facts.notes.strip()}\n" if facts.notes else ""
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {facts.name}

A [K-Net](https://arxiv.org/abs/2106.14855) for {task} segmentation with {num_parameters:,} parameters, of knet_d2
{metadata["knet_d2_version"]}.
{notes}
## Use

```python
import knet_d2

predictor = knet_d2.load("hf://USER/NAME")  # or the path of {WEIGHTS_FILE}
prediction = predictor("photo.jpg")
```

The file holds weights, config and classes, and loading it runs no code from it. {CONFIG_FILE} and {CLASSES_FILE} are
copies for readers.

## Data

{facts.data.strip()}

## Metrics

| metric | value |
|---|---|
{figures}

## Classes

{", ".join(names)}

## Licence

{facts.license}
"""


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|")


def fetch_from_hub(address: str) -> str:
    """Return the path of the weights at ``hf://user/name`` or ``hf://user/name@revision``, downloaded once.

    Raises:
        CheckpointError: the package is missing, the address is none, or the file can't be downloaded.
    """
    name, _, revision = address.removeprefix(PREFIX).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise CheckpointError(f"{address}: write it as {PREFIX}user/name, or {PREFIX}user/name@revision.")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise CheckpointError(f"{address}: needs the package huggingface_hub; {HUB_COMMAND}.") from None
    try:
        return hf_hub_download(name, WEIGHTS_FILE, revision=revision or None)
    except Exception as error:  # its errors have no common type
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{address}: {WEIGHTS_FILE} can't be downloaded ({reason}). Check the name and the network, or copy the "
            "file and load it by its path."
        ) from error
