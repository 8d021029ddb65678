"""A web page that segments uploaded images and short videos. See knet docs DEPLOYMENT."""

import argparse
import functools
import itertools
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..data.augmentation import ResizeTransform
from ..data.classes import markdown_text
from ..data.files import ARRAY_TYPE, find_images, read_image, read_picture, write_json
from ..data.pixels import PixelFormat, picture_of
from ..errors import ConfigError, DataError
from ..inference import ImagePredictor, Prediction, Trace, load
from ..inference.sinks import VideoFile
from ..inference.sources import Video
from ..results.outputs import OUTPUTS
from .arguments import add_config_arguments, positive

DOWNLOADS = ("picture (PNG)", "masks (COCO JSON)")
COLUMNS = ("class", "score", "pixels", "x", "y", "width", "height")
# Number of images whose network outputs are kept, so that moving a slider does not run the network again
NUM_KEPT = 4
# Largest upload, and largest number of requests that wait for the model
MAX_FILE_SIZE = "64mb"
MAX_WAITING = 32
# Number of examples, and of classes that are named for each model
MOST_EXAMPLES, MOST_CLASSES = 6, 40
# Seconds after which files of visitors are deleted
MAX_FILE_AGE = 3600
# Largest number of frames of a video that are used, and frames of the path that is drawn behind an object
MAX_FRAMES = 300
TRAIL = 15

logger = logging.getLogger("knet_d2.demo")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Show a page on which K-Net segments images.")
    parser.add_argument("--weights", nargs="+", required=True, metavar="FILE", help="weights of one or more models")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument(
        "--examples", nargs="+", default=[], metavar="PATH", help="images, folders or patterns: examples to click"
    )
    parser.add_argument("--max-megapixels", type=positive, default=2, help="larger images are shrunk to this size")
    add_config_arguments(parser)
    return parser


class View(NamedTuple):
    """The content of the page for one request.

    Attributes:
        message: one line of text: the number of segments, or an error.
        picture: uint8 RGB [h, w, 3], the segments over the image.
        rows: the table's row for each segment, see COLUMNS.
        coco: a COCO file, see :meth:`Prediction.to_coco_file`.
        num_stages: number of stages of the model.
    """

    message: str
    picture: np.ndarray | None
    rows: list[list[Any]]
    coco: dict[str, Any] | None
    num_stages: int


class Viewer:
    """The logic of the page without its user interface."""

    def __init__(self, models: dict[str, ImagePredictor], max_megapixels: float):
        """
        Args:
            models: predictors by the names that visitors see.
            max_megapixels: larger images are shrunk to this size.
        """
        self._models = models
        self._max_megapixels = max_megapixels
        self._trace = functools.lru_cache(maxsize=NUM_KEPT)(self._new_trace)

    def choices(self) -> dict[str, tuple[str, str]]:
        """Return (name of a model, one of its outputs) by the text of the choice on the page."""
        return {
            OUTPUTS[output].title + (f" ({name})" if len(self._models) > 1 else ""): (name, output)
            for name, model in self._models.items()
            for output in model.outputs
        }

    def description(self) -> str:
        """Return the names and classes of the models as Markdown."""
        lines = []
        for name, model in self._models.items():
            names = [markdown_text(x) for x in model.classes.names]
            more = f" and {len(names) - MOST_CLASSES} more" if len(names) > MOST_CLASSES else ""
            lines.append(f"- **{markdown_text(name)}** ({len(names)} classes): {', '.join(names[:MOST_CLASSES])}{more}")
        return "\n".join(lines)

    def num_stages(self, choice: str) -> int:
        """Return the number of stages of a choice's model."""
        return len(self._models[self.choices()[choice][0]].model.cascade.stages)

    def view(self, path: str | None, choice: str, threshold: float, stage: int) -> View:
        """Return the content of the page; errors of the file become its message.

        Args:
            path: path of the uploaded file; None: nothing was uploaded.
            choice: one of :meth:`choices`.
            threshold: lowest score of an instance or thing segment.
            stage: 0 for the static kernels; numbers above the last stage mean the last stage.
        """
        name, output = self.choices()[choice]
        num_stages = self.num_stages(choice)
        if path is None:
            return View("Upload an image, or click an example.", None, [], None, num_stages)
        try:
            image, trace = self._trace(path, name)
        except DataError as error:
            return View(f"**Error:** {error}", None, [], None, num_stages)
        except Exception:  # for example too little memory; the page must continue
            logger.exception("An uploaded image could not be segmented")
            return View("**Error:** this image can't be segmented; the log says why.", None, [], None, num_stages)
        stage = min(stage, num_stages)
        prediction = trace.prediction(threshold, stage=stage, output=output)
        height, width = prediction.size
        where = "the static kernels, before any update" if stage == 0 else f"stage {stage} of {num_stages}"
        message = f"{len(prediction.segments)} segments by {where}; {width} x {height} pixels."
        message += "" if prediction.segments else " A lower score threshold shows more."
        coco = prediction.to_coco_file(PurePath(path).name)
        return View(message, prediction.draw(image), table(prediction), coco, num_stages)

    def trackers(self) -> list[str]:
        """Return the names of the models that follow objects through a video."""
        return [name for name, model in self._models.items() if model.outputs[0] != "sem_seg"]

    def follow(self, path: str | None, name: str, folder: str) -> tuple[str, str | None]:
        """Draw the objects of a video, with numbers and colours that stay, into an MP4 file.

        Args:
            path: path of the uploaded file; None: nothing was uploaded.
            name: one of :meth:`trackers`.
            folder: where the file is written.

        Returns:
            A line of text, and the path of the file; None after an error, which is the text.
        """
        if path is None:
            return "Upload a video.", None
        target = os.path.join(folder, f"{PurePath(path).stem}_tracked.mp4")
        try:
            source = Video(path)
            pixels, limit = source.size[0] * source.size[1], self._max_megapixels * 1e6
            if pixels > limit:
                raise DataError(f"a frame has {pixels / 1e6:.1f} megapixels, and the page takes up to {limit / 1e6:g}.")
            count, ids = self._draw_tracks(source, self._models[name], target)
        except DataError as error:
            return f"**Error:** {PurePath(path).name}: {error}".replace(path, PurePath(path).name), None
        except Exception:  # for example too little memory; the page must continue
            logger.exception("An uploaded video could not be segmented")
            return "**Error:** this video can't be segmented; the log says why.", None
        ending = f"; the page uses the first {MAX_FRAMES} frames" if count == MAX_FRAMES else ""
        return f"{ids} objects in {count} frames{ending}.", target

    def _draw_tracks(self, source: Video, model: ImagePredictor, target: str) -> tuple[int, int]:
        """Return the numbers of frames and of the tracks of things."""
        drawn, follow = VideoFile(target, source, model.classes, TRAIL), model.follower()
        count, ids = 0, set()
        for frame in itertools.islice(source, MAX_FRAMES):
            predictions = follow(frame.picture)
            drawn.write(frame, predictions)
            things = (x for x in next(iter(predictions.values())).segments if x.label < model.classes.num_things)
            ids.update(x.track_id for x in things)
            count += 1
        drawn.close()
        return count, len(ids)

    def _new_trace(self, path: str, name: str) -> tuple[np.ndarray, Trace]:
        model = self._models[name]
        image = read_upload(path, self._max_megapixels, model.pixel_format)
        return picture_of(image), model.trace_image(image)


def read_upload(path: str, max_megapixels: float, pixel_format: PixelFormat) -> np.ndarray:
    """Read an uploaded image: [H, W, C] from 0 to 255, colours in RGB order.

    Args:
        max_megapixels: a larger image is shrunk to this size, because large masks take long.
        pixel_format: the model's format of images.

    Raises:
        DataError: see read_image. The message does not contain the folder.
    """
    try:
        image = read_image(path, pixel_format.as_rgb)
    except DataError as error:
        name = PurePath(path).name
        raise DataError(f"{name}: {error.__cause__ or error}".replace(path, name)) from error
    height, width = image.shape[:2]
    scale = (max_megapixels * 1e6 / (width * height)) ** 0.5
    if scale >= 1:
        return image
    size = [max(1, int(side * scale)) for side in (height, width)]
    return ResizeTransform(height, width, *size).apply_image(image)


def table(prediction: Prediction) -> list[list[Any]]:
    """Return a row of COLUMNS for each segment; the score of a semantic class is empty."""
    return [
        [prediction.classes.names[x.label], "" if x.score is None else round(x.score, 3), x.area, *x.box]
        for x in prediction.segments
    ]


def load_models(paths: Sequence[str], config_file: str | None, opts: Sequence[str]) -> dict[str, ImagePredictor]:
    """Load models; returns them by the last two parts of their paths, with a number if these are equal."""
    models: dict[str, ImagePredictor] = {}
    for path in paths:
        short = "/".join(PurePath(path).parts[-2:])
        name, number = short, 1
        while name in models:
            number += 1
            name = f"{short} {number}"
        models[name] = load(path, config_file=config_file, opts=[*opts, "TEST.AUG.ENABLED", "False"])
    return models


def build_page(viewer: Viewer, folder: str, examples: Sequence[str] = ()) -> Any:
    """Build the page, a gradio.Blocks.

    Args:
        folder: folder of uploads and downloads; the page serves files of no other folder.
        examples: image files that visitors can click; they are copied into the folder.

    Raises:
        ConfigError: Gradio is missing.
    """
    # Gradio reads these variables when it is imported; the first two turn off its telemetry.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=folder)
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f"The page needs Gradio ({error}). Install it: pip install 'gradio>=6'") from error

    choices = list(viewer.choices())
    last = viewer.num_stages(choices[0])

    def update(path: str | None, choice: str, threshold: float, stage: int) -> list[Any]:
        view = viewer.view(path, choice, threshold, stage)
        info = f"0: static kernels, before any update; {view.num_stages}: the last stage"
        slider = gradio.Slider(maximum=view.num_stages, value=min(stage, view.num_stages), info=info)
        files = write_files(view, folder)
        buttons = [gradio.DownloadButton(value=x, interactive=x is not None) for x in files]
        return [view.message, files[0], view.rows, *buttons, slider]

    with gradio.Blocks(title="K-Net", analytics_enabled=False, delete_cache=(MAX_FILE_AGE, MAX_FILE_AGE)) as page:
        gradio.Markdown(f"# K-Net\nThe segments of an image, stage by stage.\n\n{viewer.description()}")
        with gradio.Row():
            with gradio.Column(scale=1):
                upload = gradio.File(label="Image", file_types=["image", ARRAY_TYPE], height=140)
                if examples:
                    _add_examples(gradio, upload, examples, folder)
                choice = gradio.Radio(choices, value=choices[0], label="Task")
                threshold = gradio.Slider(
                    0, 1, 0.3, step=0.01, label="Score threshold", info="of instances and things; stuff is always shown"
                )
                stage = gradio.Slider(0, last, last, step=1, label="Stage")
            with gradio.Column(scale=2):
                message = gradio.Markdown()
                # Omit the share button, which would send the picture to another server
                picture = gradio.Image(label="Segments", format="png", buttons=["download", "fullscreen"])
                with gradio.Row():
                    downloads = [gradio.DownloadButton(f"Download {x}", interactive=False) for x in DOWNLOADS]
                rows = gradio.Dataframe(headers=list(COLUMNS), label="List of segments", interactive=False)
        inputs = [upload, choice, threshold, stage]
        gradio.on(
            [page.load, upload.change, choice.input, threshold.input, stage.input],
            update,
            inputs,
            [message, picture, rows, *downloads, stage],
            trigger_mode="always_last",
            api_name="segment",
        )
        if viewer.trackers():
            _add_video(gradio, viewer, folder)
    return page


def _add_video(gradio: Any, viewer: Viewer, folder: str) -> None:
    """Add the part of the page that follows the objects of a video."""

    def follow(path: str | None, name: str) -> list[Any]:
        message, drawn = viewer.follow(path, name, tempfile.mkdtemp(dir=folder))
        return [message, gradio.DownloadButton(value=drawn, interactive=drawn is not None)]

    gradio.Markdown(f"# Video\nUpload a video of up to {MAX_FRAMES} frames to follow its objects.")
    with gradio.Row():
        upload = gradio.File(label="Video", file_types=["video"])
        with gradio.Column():
            name = gradio.Radio(viewer.trackers(), value=viewer.trackers()[0], label="Model")
            button = gradio.Button("Follow objects")
            message = gradio.Markdown()
            download = gradio.DownloadButton("Download the drawn video (MP4)", interactive=False)
    button.click(follow, [upload, name], [message, download], api_name="follow")


def _add_examples(gradio: Any, upload: Any, examples: Sequence[str], folder: str) -> None:
    """Add pictures to the page; a click on one is an upload of its file."""
    place = tempfile.mkdtemp(prefix="examples_", dir=folder)
    files = [shutil.copy(path, place) for path in examples[:MOST_EXAMPLES]]
    pictures = [read_picture(path, PixelFormat("RGB")) for path in files]
    gallery = gradio.Gallery(
        pictures,
        label="Examples: click one",
        columns=2,
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],  # the share button would send pictures to another server
    )

    def choose(event: gradio.SelectData) -> str:
        return files[event.index]

    gallery.select(choose, None, upload, api_visibility="private")


def write_files(view: View, folder: str) -> list[str | None]:
    """Write what DOWNLOADS names into a folder of its own; returns the paths, or None where there is nothing."""
    if view.coco is None or view.picture is None:
        return [None] * len(DOWNLOADS)
    place = tempfile.mkdtemp(dir=folder)
    stem = PurePath(view.coco["images"][0]["file_name"]).stem
    picture, masks = (os.path.join(place, f"{stem}_{x}") for x in ("segments.png", "masks.json"))
    Image.fromarray(view.picture).save(picture, compress_level=1)  # a slider waits for it
    write_json(masks, view.coco)
    return [picture, masks]


def theme() -> Any:
    """Gradio's theme with hints that can be read: its own are light grey on white."""
    import gradio

    dark, light = "*neutral_700", "*neutral_300"
    return gradio.themes.Default().set(
        block_info_text_color=dark,
        block_info_text_color_dark=light,
        block_label_text_color=dark,
        block_label_text_color_dark=light,
        block_title_text_color=dark,
        block_title_text_color_dark=light,
        body_text_color_subdued=dark,
        body_text_color_subdued_dark=light,
    )


def serve(page: Any, host: str, port: int) -> str:
    """Start to serve the page; returns its address.

    Raises:
        ConfigError: the port is in use or not allowed.
    """
    try:
        _, address, _ = page.queue(max_size=MAX_WAITING).launch(
            server_name=host,
            server_port=port,
            share=False,
            allowed_paths=[],
            max_file_size=MAX_FILE_SIZE,
            enable_monitoring=False,
            mcp_server=False,
            run_history=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise ConfigError(f"The page can't listen on --host {host} --port {port}; try another port.") from error
    return address


def main(args: argparse.Namespace) -> None:
    # Service managers stop the page by SIGTERM; exit as after Ctrl+C, so that the uploads are deleted
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    viewer = Viewer(load_models(args.weights, args.config_file, args.opts), args.max_megapixels)
    with tempfile.TemporaryDirectory(prefix="knet_d2_web_") as folder:
        page = build_page(viewer, folder, find_images(args.examples) if args.examples else ())
        address = serve(page, args.host, args.port)
        print(f"Open {address} in a browser; Ctrl+C ends the page.", flush=True)
        page.block_thread()
