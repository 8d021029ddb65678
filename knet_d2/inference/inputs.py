"""Reads whatever may hold an image: a file, an address, bytes, a PIL image, an array or a tensor."""

from __future__ import annotations

import http.client
import os
import time
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from ..data.files import image_pixels, read_image, read_image_content
from ..data.pixels import PixelFormat
from ..errors import DataError

ORDERS = ("RGB", "BGR")
MAX_DOWNLOAD = 100_000_000
_SECONDS_WITHOUT_DATA = 20.0
_MOST_SECONDS = 300.0
_SCHEMES = ("http", "https")


def read_input(image: Any, order: str | None, pixel_format: PixelFormat) -> np.ndarray:
    """Read an image as a model takes it: uint8 or float32 [H, W, C] from 0 to 255.

    Args:
        image: the path of a file; an address that begins with http:// or https:// (at most MAX_DOWNLOAD bytes); the
            content of a file as bytes, or an open binary file; a PIL image; an array [H, W] or [H, W, C]; or a tensor
            [H, W] or [C, H, W] on any device. EXIF's rotation is applied to all but arrays and tensors. Their values
            are as files have them: uint8, uint16, floats from 0 to 1, or what INPUT.VALUE_RANGE says.
        order: of three channels of an array or tensor that are colours, "RGB" or "BGR"; None for anything else.
        pixel_format: what the model takes.

    Raises:
        DataError: it is something else, or can't be read.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _read_array(image, order, pixel_format)
    if order is not None:
        name = str(image)[:100] if isinstance(image, (str, os.PathLike)) else "The image"
        raise DataError(
            f"{name}: order = {order!r} is for arrays and tensors; that of a {type(image).__name__} is known. Leave it "
            "out."
        )
    for kinds, read in _READERS:
        if isinstance(image, kinds):
            return read(image, pixel_format)
    if callable(getattr(image, "read", None)):
        return _read_content(image.read(), pixel_format)
    raise DataError(
        f"The image is of type {type(image).__name__}; use a path, an http(s) address, bytes, a PIL image, an array "
        "[H, W, C], a tensor [C, H, W], or a list of these."
    )


def _read_array(image: np.ndarray | torch.Tensor, order: str | None, pixel_format: PixelFormat) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype in (torch.bfloat16, torch.float16) else image).numpy()
        image = np.moveaxis(image, 0, 2) if image.ndim == 3 else image
    has_colors = pixel_format.is_named and image.ndim == 3 and image.shape[2] == 3
    if has_colors and order not in ORDERS:
        raise DataError(
            f"order = {order!r}: say how an array's channels are ordered, order='RGB' (as from Pillow, imageio, "
            "torchvision) or order='BGR' (as from OpenCV)."
        )
    return pixel_format.prepare(image, "The image", order or "RGB")


def _read_path(path: str | os.PathLike[str], pixel_format: PixelFormat) -> np.ndarray:
    name = os.fspath(path)
    if urlsplit(name).scheme.lower() in _SCHEMES:
        return read_image_content(download(name), pixel_format, name)
    if "://" in name:
        raise DataError(f"{name[:100]}: addresses must begin with http:// or https://. Download the file first.")
    if os.path.isdir(name):
        raise DataError(f"{name}: is a folder; use predictor.images(folder), which gives its images one by one.")
    return read_image(name, pixel_format)


def _read_content(content: Any, pixel_format: PixelFormat) -> np.ndarray:
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise DataError("The image is an open file that gives text; open it in binary mode, as open(path, 'rb').")
    return read_image_content(bytes(content), pixel_format, "of these bytes")


def _read_pil(image: Image.Image, pixel_format: PixelFormat) -> np.ndarray:
    try:
        image.load()
    except Exception as error:  # Pillow reads a file when its pixels are first needed
        raise DataError(f"The PIL image can't be read ({error}). Use another image.") from error
    return pixel_format.prepare(image_pixels(image, pixel_format), "The image")


_READERS: tuple[tuple[Any, Callable[[Any, PixelFormat], np.ndarray]], ...] = (
    ((str, os.PathLike), _read_path),
    ((bytes, bytearray, memoryview), _read_content),
    (Image.Image, _read_pil),
)


def download(url: str) -> bytes:
    """Return the content of an http(s) address.

    Raises:
        DataError: it can't be downloaded, is larger than MAX_DOWNLOAD bytes, or leads to another kind of address.
    """
    opener = urllib.request.OpenerDirector()  # without the handlers of ftp: and file: addresses
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"User-Agent": "knet_d2"})
    try:
        with opener.open(request, timeout=_SECONDS_WITHOUT_DATA) as response:
            content = _read_all(response)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{url}: can't be downloaded ({reason}). Check the address, or download the file first."
        ) from error
    if len(content) > MAX_DOWNLOAD:
        raise DataError(f"{url}: is larger than {MAX_DOWNLOAD // 10**6} MB. Download the file first.")
    return content


def _read_all(response: http.client.HTTPResponse) -> bytes:
    """Up to MAX_DOWNLOAD + 1 bytes; a TimeoutError where a server sends them one by one for ever."""
    content, end = bytearray(), time.monotonic() + _MOST_SECONDS
    while len(content) <= MAX_DOWNLOAD and (part := response.read1(1 << 16)):
        content += part
        if time.monotonic() > end:
            raise TimeoutError(f"not complete after {_MOST_SECONDS:g} seconds")
    if response.length and len(content) <= MAX_DOWNLOAD:
        raise http.client.IncompleteRead(bytes(content), response.length)
    return bytes(content[: MAX_DOWNLOAD + 1])
