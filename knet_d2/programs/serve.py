"""An HTTP service: POST an image, get its segments as a COCO file in JSON, or as a picture (knet docs DEPLOYMENT)."""

import argparse
import asyncio
import io
import logging
import socket
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.classes import categories
from ..data.files import content_size
from ..errors import ConfigError, DataError
from ..inference import ImagePredictor
from ..results.outputs import OUTPUTS
from ..results.prediction import MASK_FORMATS
from ..setup.dependencies import VERSION
from .arguments import add_predictor_arguments, load_predictor, positive

# Requests that wait for the model, and largest files that all requests may hold in memory; more are refused
MAX_WAITING = 32
# Seconds in which a request's image must arrive
MAX_SECONDS = 60
FORMATS = ("json", "png")
_MISSING = "The service needs packages: pip install starlette uvicorn"

logger = logging.getLogger("knet_d2.serve")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, metavar="FILE", help="the model, also as an .onnx file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any that is free")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="images that are predicted at once")
    parser.add_argument("--max-megabytes", type=positive, default=32, help="larger files are refused")
    parser.add_argument("--max-megapixels", type=positive, default=50, help="images of more pixels are refused")
    add_predictor_arguments(parser, default_device="a GPU if there is one")
    return parser


def answer(
    predictor: ImagePredictor, content: bytes | bytearray, picture: bool, masks: str, max_megapixels: float
) -> dict[str, Any] | bytes:
    """The prediction for an image file, as a COCO file or as a picture in PNG.

    Raises:
        DataError: it is no image that can be read, or it is too large.
    """
    height, width = content_size(content, "of this request")
    if height * width > max_megapixels * 1e6:
        raise DataError(f"{width} x {height} pixels: send an image of at most {max_megapixels:g} megapixels.")
    prediction = predictor(content)
    assert not isinstance(prediction, list)
    if not picture:
        return prediction.to_coco_file("image", masks)
    file = io.BytesIO()
    Image.fromarray(prediction.drawn()).save(file, "PNG")
    return file.getvalue()


def build_service(
    predictor: ImagePredictor, threads: int = 1, max_megabytes: float = 32, max_megapixels: float = 50
) -> Any:
    """The service as an ASGI application.

    Args:
        threads: images that are predicted at once.
        max_megabytes, max_megapixels: larger files, and images of more pixels, are refused.

    Raises:
        ConfigError: Starlette is missing.
    """
    try:
        from anyio import CapacityLimiter, to_thread
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise ConfigError(f"{_MISSING} ({error}).") from error

    limiter, waiting, held = CapacityLimiter(threads), [0], [0]
    most = int(max_megabytes * 1e6)
    busy = HTTPException(503, "Too many images wait. Try again later.", {"Retry-After": "5"})

    async def read_body(request: Request, content: bytearray) -> None:
        too_large = HTTPException(413, f"The file is larger than {max_megabytes:g} MB. Send a smaller one.")
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        try:
            async with asyncio.timeout(MAX_SECONDS):
                async for chunk in request.stream():
                    content += chunk
                    held[0] += len(chunk)
                    if len(content) > most:
                        raise too_large
                    if held[0] > MAX_WAITING * most:
                        raise busy
        except TimeoutError:
            raise HTTPException(408, f"The file did not arrive within {MAX_SECONDS} seconds. Send it again.") from None
        except ClientDisconnect:
            raise HTTPException(400, "The connection was closed before the file had arrived.") from None
        if not content:
            raise HTTPException(400, "The request has no body. Send the bytes of an image file, not a form.")

    def choice(request: Request, name: str, choices: tuple[str, ...]) -> str:
        value = request.query_params.get(name, choices[0])
        if value not in choices:
            raise HTTPException(400, f"{name} = {value!r}: use {' or '.join(choices)}.")
        return value

    async def segment(request: Request) -> Response:
        unknown = set(request.query_params) - {"format", "masks"}
        if unknown:
            raise HTTPException(400, f"{unknown.pop()}: there is no such parameter. Use format and masks.")
        picture, masks = choice(request, "format", FORMATS) == "png", choice(request, "masks", MASK_FORMATS)
        content = bytearray()
        try:
            await read_body(request, content)
            found = await predict(content, picture, masks)
        finally:
            held[0] -= len(content)
        return Response(found, media_type="image/png") if isinstance(found, bytes) else JSONResponse(found)

    async def predict(content: bytearray, picture: bool, masks: str) -> dict[str, Any] | bytes:
        if waiting[0] >= MAX_WAITING + threads:
            raise busy
        waiting[0] += 1
        try:
            arguments = predictor, content, picture, masks, max_megapixels
            return await to_thread.run_sync(answer, *arguments, limiter=limiter)
        except DataError as error:
            raise HTTPException(400, str(error)) from error
        except Exception as error:  # for example too little memory; the service must continue
            logger.exception("An image could not be segmented")
            raise HTTPException(500, "This image can't be segmented; the log of the service says why.") from error
        finally:
            waiting[0] -= 1

    async def describe(_: Request) -> Response:
        outputs = [OUTPUTS[name].title for name in predictor.outputs]
        classes = [{**x, "id": x["dataset_id"]} for x in categories(predictor.classes)]
        return JSONResponse({"version": VERSION, "output": outputs[0], "categories": classes})

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    routes = [Route("/segment", segment, methods=["POST"]), Route("/model", describe)]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse})


def warm_up(predictor: ImagePredictor) -> list[float]:
    """The seconds that two empty images take; the first one takes longer, so no visitor shall wait for it."""
    image = np.zeros((480, 640, predictor.pixel_format.channels), np.uint8)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        predictor.predict(image)
        seconds.append(time.perf_counter() - start)
    return seconds


def main(args: argparse.Namespace) -> None:
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"{_MISSING} ({error}).") from error
    if args.threads < 1:
        raise ConfigError(f"--threads {args.threads}: use at least 1.")
    predictor = load_predictor(args.weights, args)
    service = build_service(predictor, args.threads, args.max_megabytes, args.max_megapixels)
    first, second = warm_up(predictor)
    print(f"640 x 480 pixels: first image {first:.2f} s, second {second:.2f} s, {torch.get_num_threads()} threads")
    try:
        listening = socket.create_server((args.host, args.port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"The service can't listen on --host {args.host} --port {args.port}; try another.") from error
    host, port = listening.getsockname()[:2]
    print(f"POST images to http://{host}:{port}/segment; Ctrl+C ends the service.", flush=True)
    uvicorn.Server(uvicorn.Config(service, log_level="warning")).run(sockets=[listening])
