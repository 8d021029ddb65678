"""Reading of images, label maps and panoptic PNGs, and writing of JSON.

Whatever is wrong with a file that is read is a DataError that names it.
"""

import glob
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ..errors import ConfigError, DataError
from .pixels import PixelFormat, picture_of

T = TypeVar("T")
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
ARRAY_TYPE = ".npy"
# What Pillow may open. It reads these by itself; for others, as PostScript, it starts programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# The value of pixels without a class in label maps
IGNORE_LABEL = 255


def _megapixels() -> int:
    text = os.environ.get("KNET_D2_MAX_MEGAPIXELS", "100")
    if not text.isdecimal():
        raise ConfigError(f"KNET_D2_MAX_MEGAPIXELS = {text!r}: set this environment variable to a whole number.")
    return int(text)


# Most pixels of an image, and most values of all its channels: checked before anything is unpacked
MAX_PIXELS = _megapixels() * 10**6
Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, MAX_PIXELS)  # Pillow's own limit
MAX_VALUES = 4 * MAX_PIXELS
_TOO_LARGE = (
    f"it is too large: images of up to {MAX_PIXELS // 10**6} megapixels (with more than 4 channels: up to "
    f"{MAX_VALUES // 10**6} million values) are read; cut it into parts, or set "
    "the environment variable KNET_D2_MAX_MEGAPIXELS"
)

# Places in the first chunk of a PNG, and OpenCV's channels by the type of its colours
_PNG_BITS, _PNG_COLOR_TYPE = 24, 25
_PNG_CHANNELS = {0: [0], 2: [2, 1, 0], 4: [0, 3], 6: [2, 1, 0, 3]}
_EXIF_ORIENTATION = 0x0112  # the number of TIFF's tag, too
# Other tags of TIFF
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC = 256, 257, 258, 262
_SAMPLES, _PLANAR, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 277, 284, 338, 339
_TIFF_SHAPE = (_WIDTH, _HEIGHT, _BITS, _SAMPLES, _SAMPLE_FORMAT)
# From the stored pixels to the upright image, by EXIF's orientation
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 3),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


def find_images(inputs: Sequence[str]) -> list[str]:
    """The image files that names of files and folders and patterns stand for, in order.

    Raises:
        DataError: one of them stands for none.
    """
    files: list[str] = []
    for path in map(os.path.expanduser, inputs):
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if name.lower().endswith((*IMAGE_TYPES, ARRAY_TYPE)))
            found = [os.path.join(path, name) for name in names]
        else:
            found = [path] if os.path.isfile(path) else sorted(glob.glob(path))
        if not found:
            below = next(files_below(path, (*IMAGE_TYPES, ARRAY_TYPE)), None)
            hint = "" if below is None else f" Folders in it have some, as {os.path.dirname(below[1])}: name them."
            raise DataError(f"{path}: no image there (files ending in {', '.join(IMAGE_TYPES)}).{hint}")
        files += found
    return files


def files_below(root: str, suffixes: Sequence[str], _parents: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The files in a folder and all folders in it with one of the suffixes, in the order of their names.

    A link to a folder is followed, unless that is one of the folders that the link is in.

    Yields:
        (path below root without suffix, path).
    """
    real = os.path.realpath(root)
    if real in _parents or not os.path.isdir(root):
        return
    for name in sorted(os.listdir(root)):
        path = os.path.join(root, name)
        stem, suffix = os.path.splitext(name)
        if os.path.isdir(path):
            for below, file in files_below(path, suffixes, (*_parents, real)):
                yield os.path.join(name, below), file
        # A named pipe or a device would never end; a broken link is an error for who reads it
        elif suffix.lower() in suffixes and (os.path.isfile(path) or not os.path.exists(path)):
            yield stem, path


def refuse_to_replace(inputs: Iterable[str], outputs: Iterable[str], option: str) -> None:
    """Raise a ConfigError, which names the option, if one of the files to write is one of those that are read."""
    originals = set(map(os.path.realpath, inputs))
    replaced = next((path for path in outputs if os.path.realpath(path) in originals), None)
    if replaced is not None:
        raise ConfigError(f"{option}: this would replace {replaced}, which is read. Use another name or folder.")


def write_json(path: str, content: Any, indent: int | None = None) -> None:
    with PathManager.open(path, "w") as f:
        json.dump(content, f, indent=indent)


def read_image(path: str, pixel_format: PixelFormat | str) -> np.ndarray:
    """Read an image as a model takes it: uint8 or float32 [H, W, C] from 0 to 255; EXIF's rotation is applied.

    Args:
        path: one of FORMATS, or an array [H, W], [H, W, C] or [C, H, W] in a file that ends in ARRAY_TYPE. In a TIFF
            of several pages with one channel each, the pages are the channels.
        pixel_format: or its name, for the range of the file's type.

    Raises:
        DataError: it can't be read, or is of another number of channels.
    """
    wanted = PixelFormat(pixel_format) if isinstance(pixel_format, str) else pixel_format
    return wanted.prepare(read_stored(path, wanted), f"Image {path}")


def read_stored(path: str, wanted: PixelFormat) -> np.ndarray:
    """Read an image in its file's own type: [H, W] or [H, W, C], colours in RGB order; else as :func:`read_image`."""
    _check_exists(path, "Image")

    def read() -> np.ndarray:
        if path.lower().endswith(ARRAY_TYPE):
            return _read_array(path, wanted)
        with PathManager.open(path, "rb") as f:
            return _read_pixels(f.read(), wanted, path)

    return _readable(read, path)


def read_image_content(content: bytes, pixel_format: PixelFormat, name: str) -> np.ndarray:
    """:func:`read_image` for the content of an image file (no array).

    Args:
        content: the bytes of the file.
        pixel_format: see there.
        name: of the image, for messages.
    """
    return pixel_format.prepare(_readable(lambda: _read_pixels(content, pixel_format, name), name), f"Image {name}")


def _readable(read: Callable[[], T], name: str) -> T:
    try:
        return read()
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"Image {name} can't be read ({error}). Replace the file or take it out of the data set."
        ) from error


def image_size(path: str) -> tuple[int, int]:
    """The (height, width) of an image as read_image gives it; only the head of the file is decoded.

    Raises:
        DataError: the file does not exist or can't be read.
    """
    _check_exists(path, "Image")
    try:
        if path.lower().endswith(ARRAY_TYPE):
            shape = np.lib.format.open_memmap(PathManager.get_local_path(path), mode="r").shape
            return shape[1:] if len(shape) == 3 and shape[0] < shape[2] else shape[:2]
        with PathManager.open(path, "rb") as f:
            return _size(f.read())
    except Exception as error:
        raise DataError(f"Image {path} can't be read ({error}). Replace the file.") from error


def content_size(content: bytes | bytearray, name: str) -> tuple[int, int]:
    """:func:`image_size` for the content of an image file (no array); name: see :func:`read_image_content`."""
    return _readable(lambda: _size(content), name)


def _size(content: bytes | bytearray) -> tuple[int, int]:
    image = _open_image(io.BytesIO(content))
    return image.size if _orientation(image) >= 5 else image.size[::-1]


def read_picture(path: str, pixel_format: PixelFormat | str) -> np.ndarray:
    """Read an image to look at, uint8 RGB [H, W, 3]; see read_image and picture_of."""
    wanted = PixelFormat(pixel_format) if isinstance(pixel_format, str) else pixel_format
    return picture_of(read_image(path, wanted.as_rgb))


def _read_array(path: str, wanted: PixelFormat) -> np.ndarray:
    """The array in a .npy file; its size is known before it is read, and nothing in it is run."""
    pixels = np.lib.format.open_memmap(PathManager.get_local_path(path), mode="r")
    counts = (1, 3) if wanted.is_named else (wanted.channels,)
    if pixels.ndim == 3 and pixels.shape[2] not in counts and pixels.shape[0] in counts:
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim in (2, 3):
        _check_extent(*pixels.shape)
    return np.array(pixels)


def _read_pixels(content: bytes, wanted: PixelFormat, path: str) -> np.ndarray:
    """[H, W] or [H, W, channels] of the file's own type, colours in RGB order, without alpha where it is none."""
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0"):
        pixels = _read_tiff(content, wanted, path)
        if pixels is not None:
            return pixels
    image = _open_image(io.BytesIO(content))
    image.load()
    if image.format == "PNG" and content[_PNG_BITS] == 16:
        return _TURNS.get(_orientation(image), np.asarray)(_read_deep_png(content, wanted))
    return image_pixels(image, wanted)


def image_pixels(image: Image.Image, wanted: PixelFormat) -> np.ndarray:
    """The pixels of a Pillow image, as it is seen: [H, W] or [H, W, channels], colours in RGB order."""
    if image.mode.startswith(("I", "F")):
        pixels = _one_channel(image)
    elif wanted.is_named:
        pixels = np.asarray(image.convert(wanted.as_rgb.name))
    else:
        if image.mode in ("1", "P", "PA"):
            image = image.convert("L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB")
        pixels = np.asarray(image)
    return _TURNS.get(_orientation(image), np.asarray)(pixels)


def exif_orientation(content: bytes) -> int:
    """1 to 8, as EXIF counts, of an image file's content; 1 (as it is stored) where it has none."""
    try:
        return _orientation(Image.open(io.BytesIO(content), formats=FORMATS))
    except OSError:
        return 1  # an array, or a TIFF that Pillow can't read


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken EXIF of a picture that can be seen
        orientation = 1
    return orientation if orientation in _TURNS else 1


def _open_image(file: io.BytesIO) -> Image.Image:
    """An image, not decoded yet; a ValueError where it is none of FORMATS or too large."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is no image that can be read; use one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ValueError(_TOO_LARGE) from None
    _check_extent(image.height, image.width)
    return image


def _check_extent(height: int, width: int, channels: int = 1) -> None:
    if height * width > MAX_PIXELS or height * width * channels > MAX_VALUES:
        raise ValueError(_TOO_LARGE)


def _decode_by_opencv(content: bytes) -> np.ndarray:
    import cv2  # not at the top: images of 8 bits are read without OpenCV, which not every installation has

    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("OpenCV can't decode it")
    return pixels


def _read_deep_png(content: bytes, wanted: PixelFormat) -> np.ndarray:
    """A PNG of 16 bits, of whose colours Pillow keeps 8."""
    pixels = _decode_by_opencv(content)
    # OpenCV orders colours as BGR, repeats grey that has alpha, and may make alpha of a transparent colour
    channels = _PNG_CHANNELS[content[_PNG_COLOR_TYPE]]
    has_alpha = len(channels) in (2, 4)
    return pixels if pixels.ndim == 2 else pixels[:, :, channels[:-1] if has_alpha and wanted.is_named else channels]


def _read_tiff(content: bytes, wanted: PixelFormat, path: str) -> np.ndarray | None:
    """A TIFF of several pages, or of channels that Pillow would cut to 8 bits or drop; None: Pillow reads it well."""
    pages = _tiff_pages(content, max(wanted.channels, 100))
    tags = pages[0]
    samples, bits, kind = tags.get(_SAMPLES, 1), max(tags.get(_BITS, (1,))), max(tags.get(_SAMPLE_FORMAT, (1,)))
    photometric, orientation = tags.get(_PHOTOMETRIC, 1), tags.get(_EXIF_ORIENTATION, 1)
    if samples == 1 and len(pages) > 1 and bits in (8, 16, 32) and photometric in (0, 1):
        return _read_pages(content, len(pages))
    fits = samples <= 4 if wanted.is_named else samples == wanted.channels
    if not fits:
        raise wanted.wrong_channels(samples, f"Image {path}")
    # From images of 8 bits, Pillow reads grey or colours, with or without alpha, and drops all other channels
    is_picture = bits <= 8 and (photometric > 1 or samples == 2) and (wanted.is_named or samples == 3)
    if is_picture or (samples == 1 and bits < 64):
        return None
    if photometric == 2 and samples in (3, 4) and orientation == 1 and (bits, kind) in ((16, 1), (32, 3)):
        pixels = _decode_by_opencv(content)
        if pixels.shape[2:] != (samples,):
            raise ValueError("OpenCV can't decode it")
        pixels = pixels[:, :, [2, 1, 0, *range(3, samples)]]
    else:
        try:
            import tifffile
        except ImportError:
            raise ValueError(
                f"a TIFF of {samples} channels of {bits} bits in one page needs a package: pip install tifffile; or "
                f"save each channel as a page of its own, or all as {ARRAY_TYPE}"
            ) from None
        pixels = tifffile.imread(io.BytesIO(content), key=0)
        if samples > 1 and tags.get(_PLANAR, 1) == 2:
            pixels = np.moveaxis(pixels, 0, 2)
        pixels = _TURNS.get(orientation, np.asarray)(pixels)
    has_alpha = samples == 4 and tuple(tags.get(_EXTRA_SAMPLES, ()))[:1] in ((1,), (2,))
    return pixels[:, :, :3] if has_alpha and wanted.is_named else pixels


def _read_pages(content: bytes, count: int) -> np.ndarray:
    """The first pages of a TIFF as channels."""
    image, channels = _open_image(io.BytesIO(content)), []
    for page in range(count):
        image.seek(page)
        channels.append(_one_channel(image))
    return np.stack(channels, axis=2)


def _one_channel(image: Image.Image) -> np.ndarray:
    """[H, W] of an image of more than 8 bits, or of a page of grey."""
    pixels = np.asarray(image)
    # Pillow scales the values of a PPM to this type's range, but holds them in 32 bits
    is_short = image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I")
    return pixels.astype(np.uint16) if is_short else pixels


def _tiff_pages(content: bytes, most: int) -> list[ImageFileDirectory_v2]:
    """The tags of the first page, and if it has one channel, of those that follow it and are no overviews of it.

    Raises:
        ValueError: there are more than ``most``; a file of some megabytes has room for 100,000.
    """
    header = content[: 16 if content[2] == 43 else 8]  # 43: BigTIFF
    start, seen = ImageFileDirectory_v2(header).next, set()
    pages: list[ImageFileDirectory_v2] = []
    while start and start not in seen:  # a damaged chain of pages may be a circle
        seen.add(start)
        stream, tags = io.BytesIO(content), ImageFileDirectory_v2(header)
        stream.seek(start)
        tags.load(stream)
        if pages and any(tags.get(key) != pages[0].get(key) for key in _TIFF_SHAPE):
            break
        pages.append(tags)
        if len(pages) > most:
            raise ValueError(f"it has more than {most} pages, each of which would be a channel")
        _check_extent(tags[_HEIGHT], tags[_WIDTH], tags.get(_SAMPLES, 1) * len(pages))
        start = tags.next if tags.get(_SAMPLES, 1) == 1 else 0
    return pages


class UnknownColorError(DataError):
    """A label map in colour has a colour without a meaning."""


def read_labels(
    path: str, image_path: str = "", size: tuple[int, int] | None = None, colors: Sequence[int] = ()
) -> np.ndarray:
    """Read a label map: one channel of integers, or a palette image, whose indices count: int64 [H, W].

    Args:
        image_path, size: the image that it belongs to, and its (height, width), which is compared before anything is
            decoded; None: any.
        colors: for label maps whose colours count, the colours as color_code gives them; the result is the position of
            each pixel's colour in this list.

    Raises:
        UnknownColorError: a colour is not in colors.
        DataError: the file can't be read.
    """
    if len(colors):
        return _positions(read_colors(path, image_path, size), np.asarray(colors, np.int64), path)
    labels = np.asarray(open_labels(path, "Label map", image_path, size))
    if labels.ndim != 2:
        raise DataError(
            f"Label map {path} is a colour image of shape {labels.shape}. It must have one channel with class ids."
        )
    if labels.dtype.kind == "f" and not (np.isfinite(labels) & (labels == np.rint(labels))).all():
        raise DataError(f"Label map {path} has values that are no whole numbers. Save one class id per pixel.")
    return labels.astype(np.int64)


def _positions(codes: np.ndarray, colors: np.ndarray, path: str) -> np.ndarray:
    order = np.argsort(colors)
    found = order[np.searchsorted(colors[order], codes).clip(max=len(colors) - 1)]
    unknown = colors[found] != codes
    if unknown.any():
        code = int(codes[unknown][0])
        raise UnknownColorError(
            f"Label map {path} has the colour {(code >> 16, code >> 8 & 255, code & 255)} in "
            f"{np.count_nonzero(codes == code)} pixels, which is in neither colors nor ignore_colors. Add it there, or "
            "correct the file; colours must not be resized or lossy."
        )
    return found


def color_code(color: Sequence[int]) -> int:
    """A colour (red, green, blue) as one number, as read_colors gives it."""
    return int(color[0]) << 16 | int(color[1]) << 8 | int(color[2])


def read_colors(path: str, image_path: str = "", size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a PNG whose colours have a meaning: color_code of each pixel, int64 [H, W]; arguments as of read_labels."""
    pixels = np.asarray(open_labels(path, "Label map", image_path, size).convert("RGB")).astype(np.int64)
    return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]


def read_panoptic(path: str, image_path: str = "", size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a panoptic PNG: uint8 [H, W, 3], segment id = R + 256 G + 65536 B; arguments as of read_labels."""
    return np.asarray(open_labels(path, "Panoptic PNG", image_path, size).convert("RGB"))


def _check_same_size(path: str, size: tuple[int, int], image_path: str, image_size: tuple[int, int]) -> None:
    """Raise a DataError unless both (height, width) are equal."""
    if tuple(size) != tuple(image_size):
        raise DataError(
            f"{path} is {size[1]} x {size[0]} pixels (width x height), but its image {image_path} is "
            f"{image_size[1]} x {image_size[0]}. They must have the same size."
        )


def open_labels(path: str, what: str, image_path: str, size: tuple[int, int] | None) -> Image.Image:
    """Open a label map or panoptic PNG, and decode it.

    Args:
        what: of the two, for messages.
        image_path, size: see :func:`read_labels`.

    Raises:
        DataError: it can't be read, or is of another size.
    """
    _check_exists(path, what)
    try:
        with PathManager.open(path, "rb") as f:
            content = io.BytesIO(f.read())  # Pillow would reserve whatever length a damaged part claims to have
        image = _open_image(content)
        if image.format == "JPEG":
            raise ValueError("a JPEG has other values than were saved; save it as PNG")
        if size is not None:
            _check_same_size(path, image.size[::-1], image_path, size)
        image.load()
        return image
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what} {path} can't be read ({error}). Replace the file.") from error


def _check_exists(path: str, what: str) -> None:
    if not PathManager.isfile(path):
        raise DataError(
            f"{what} {path} does not exist. Put it there, correct the path of its data set, or set the environment "
            "variable DETECTRON2_DATASETS to the folder that holds the data sets."
        )
