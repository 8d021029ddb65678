"""The two formats of a shard's file: JSON lines, and Parquet with the same rows."""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError

Rows = Sequence[dict[str, Any]]


def json_lines(rows: Rows) -> bytes:
    """One row a line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: Rows) -> bytes:
    """A Parquet file, compressed; what a row lacks (an error, an output) is null. All shards have the same columns.

    Raises:
        ConfigError: pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("--format parquet: it needs a package; pip install pyarrow.") from None
    file, texts = io.BytesIO(), ("file_name", "error")
    # Names of files may have bytes that are no UTF-8
    encodable = [
        {k: x.encode(errors="backslashreplace").decode() if k in texts else x for k, x in row.items()} for row in rows
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(encodable, _schema(pyarrow)), file)
    return file.getvalue()


def _schema(arrow: Any) -> Any:
    """The columns of the rows of :func:`.writers.image_record`."""
    whole, text, real = arrow.int64(), arrow.string(), arrow.float64()
    mask = arrow.struct({"size": arrow.list_(whole), "counts": text})
    instance = {"category_id": whole, "score": real, "bbox": arrow.list_(whole), "segmentation": mask}
    segment = {"id": whole, "category_id": whole, "isthing": arrow.bool_(), "score": real, "area": whole}
    region = {"category_id": whole, "area": whole, "segmentation": mask}
    return arrow.schema(
        {
            "id": whole,
            "file_name": text,
            "error": text,
            "height": whole,
            "width": whole,
            "instances": arrow.list_(arrow.struct(instance)),
            "panoptic": arrow.struct({"file_name": text, "segments_info": arrow.list_(arrow.struct(segment))}),
            "semantic": arrow.list_(arrow.struct(region)),
        }
    )


# Ending of the file -> its content
FORMATS: dict[str, Callable[[Rows], bytes]] = {"jsonl": json_lines, "parquet": parquet}
