"""The HTTP service: started as a program and asked, and what it answers where something fails."""

import asyncio
import http.client
import io
import json
import re
import shlex
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import spread_scores, tiny_config
from PIL import Image
from program_helpers import ROOT, Program

import knet_d2
from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data import resolve_classes
from knet_d2.errors import ConfigError
from knet_d2.programs import serve, web

SIZES = [(60, 84), (40, 50), (84, 60), (70, 70)]


def test_container_file():
    """It installs the tested version of PyTorch, copies what exists, and starts the program with its own options."""
    lines = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1].isupper()]
    words = dict(lines)
    entry, options = json.loads(words["ENTRYPOINT"]), json.loads(words["CMD"])
    assert entry[:4] == ["python", "-m", "knet_d2", "serve"]
    args = serve.get_parser().parse_args([*entry[4:], *options])
    assert args.host == "0.0.0.0" and str(args.port) == words["EXPOSE"]
    copied = [path for line in lines if line[0] == "COPY" for path in shlex.split(line[1])[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    (modules,) = re.findall(r"py_modules=\[(.*)\]", (ROOT / "setup.py").read_text())
    needed = ["setup.py", "knet_d2", "configs", *(f"{name}.py" for name in re.findall(r"\w+", modules))]
    unignored = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert set(needed) <= set(copied) and set(copied) == set(unignored)
    tested = re.findall(r"^(?:torch|torchvision)==.*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert len(tested) == 2 and all(x in (ROOT / "Dockerfile").read_text() for x in tested)


pytest.importorskip("starlette")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    cfg = tiny_config("panoptic", {"MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0, "INPUT.MIN_SIZE_TEST": 64})
    resolve_classes(cfg)
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("serve") / "model.pth")
    save_weights(path, spread_scores(knet_d2.KNet(cfg)).state_dict(), describe_model(cfg))
    return path


@pytest.fixture(scope="module")
def address(weights, tmp_path_factory):
    pytest.importorskip("uvicorn")
    options = ["--device", "cpu", "--port", 0, "--threads", 2, "--max-megabytes", 0.1]
    with Program(tmp_path_factory.mktemp("log"), "tools/serve.py", "--weights", weights, *options) as program:
        while not (found := re.search(r"http://([\d.:]+)/segment", program.output())):
            assert program.process.poll() is None, program.output()
            time.sleep(0.05)
        yield found[1]
        program.process.send_signal(signal.SIGTERM)
        program.finish()
        assert "first image" in program.output()


def png_of(size, seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def ask(address, path, body=None):
    """Status, type and content."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", body, timeout=60) as response:
            return response.status, response.headers["Content-Type"], response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read()


def test_segments_of_several_visitors(address, weights):
    predictor, photos = knet_d2.load(weights, device="cpu"), [png_of(size, i) for i, size in enumerate(SIZES)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda photo: ask(address, "/segment", photo), photos))
    for photo, (status, kind, content) in zip(photos, answers, strict=True):
        expected = predictor(photo).to_coco_file("image")
        assert (status, kind) == (200, "application/json") and expected["annotations"]
        assert json.loads(content) == json.loads(json.dumps(expected))
    polygons = json.loads(ask(address, "/segment?masks=polygons", photos[0])[2])
    assert polygons == json.loads(json.dumps(predictor(photos[0]).to_coco_file("image", "polygons")))
    status, kind, content = ask(address, "/segment?format=png", photos[0])
    assert (status, kind) == (200, "image/png")
    assert (np.asarray(Image.open(io.BytesIO(content))) == predictor(photos[0]).drawn()).all()


def test_the_model_is_described(address):
    found = json.loads(ask(address, "/model")[2])
    assert found["output"] == "panoptic" and len(found["categories"]) == 5
    assert found["version"] == knet_d2.__version__


def test_what_is_refused(address):
    for path, body, status, message in (
        ("/segment", b"junk", 400, "can't be read"),
        ("/segment", png_of((60, 84))[:-500], 400, "can't be read"),
        ("/segment", b"", 400, "no body"),
        ("/segment?masks=bits", b"junk", 400, "masks = 'bits': use rle or polygons"),
        ("/segment?format=gif", b"junk", 400, "format = 'gif': use json or png"),
        ("/segment?treshold=1", b"junk", 400, "treshold: there is no such parameter"),
        ("/segment", bytes(100_001), 413, "larger than 0.1 MB"),
        ("/segment", None, 405, "Method Not Allowed"),
        ("/other", b"junk", 404, "Not Found"),
    ):
        found, kind, content = ask(address, path, body)
        error = json.loads(content)["error"]
        assert (found, kind) == (status, "application/json") and message in error and "\n" not in error
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", "/segment", (bytes(10_000) for _ in range(11)))  # its length is not told before
    response = connection.getresponse()
    assert response.status == 413 and b"larger than 0.1 MB" in response.read()


def test_a_port_that_is_in_use(address, weights):
    port = address.rpartition(":")[2]
    with pytest.raises(ConfigError, match=f"can't listen on --host 127.0.0.1 --port {port}"):
        serve.main(serve.get_parser().parse_args(["--weights", weights, "--device", "cpu", "--port", port]))
    with pytest.raises(ConfigError, match="can't listen on --host 127.0.0.1 --port 65536"):
        serve.main(serve.get_parser().parse_args(["--weights", weights, "--device", "cpu", "--port", "65536"]))


@pytest.mark.parametrize("program", [serve, web])
@pytest.mark.parametrize("text", ["nan", "inf", "0", "-1"])
def test_limits_that_are_none(program, text, capsys):
    with pytest.raises(SystemExit):
        program.get_parser().parse_args(["--weights", "m.pth", "--max-megapixels", text])
    assert f"{text}: use a number above 0" in capsys.readouterr().err


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "starlette.applications", None)
    with pytest.raises(ConfigError, match="pip install starlette uvicorn"):
        serve.build_service(None)


# ---- without a network ----------------------------------------------------------------------------------------------


async def post(service, body, delay=0.0, ends=True):
    """Status and JSON content of an answer; without an end, the rest of the body never comes."""
    sent, parts = [], [body]

    async def receive():
        await asyncio.sleep(delay if parts else 60)
        if body is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts.pop(), "more_body": not ends}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/segment", "query_string": b"", "headers": []}
    await service(
        {**scope, "http_version": "1.1", "server": ("x", 1), "client": ("x", 1), "scheme": "http"}, receive, send
    )
    return sent[0]["status"], json.loads(b"".join(x.get("body", b"") for x in sent))


def test_the_service_goes_on_after_a_failure(monkeypatch, caplog):
    def predict(content):
        if content == b"large":
            raise MemoryError("no room for it")
        time.sleep(0.2)
        return SimpleNamespace(to_coco_file=lambda name, masks: {"masks": masks})

    monkeypatch.setattr(serve, "content_size", lambda *_: (1, 1))
    monkeypatch.setattr(serve, "MAX_WAITING", 1)
    monkeypatch.setattr(serve, "MAX_SECONDS", 0.5)
    service = serve.build_service(predict)

    async def several():
        late = post(service, b"small", delay=1.0)
        return await asyncio.gather(*(post(service, b"small") for _ in range(4)), late)

    assert asyncio.run(post(service, None))[0] == 400  # a visitor who leaves is no failure
    status, content = asyncio.run(post(service, b"large"))
    assert status == 500 and "can't be segmented" in content["error"] and "no room for it" in caplog.text
    answers = asyncio.run(several())
    assert [status for status, _ in answers] == [200, 200, 503, 503, 408]
    assert answers[0][1] == {"masks": "rle"} and "Try again later" in answers[2][1]["error"]


def test_requests_hold_a_limited_number_of_bytes(monkeypatch):
    """A body that does not end keeps its memory, so others are refused until it is given up."""
    monkeypatch.setattr(serve, "content_size", lambda *_: (1, 1))
    monkeypatch.setattr(serve, "MAX_WAITING", 2)
    monkeypatch.setattr(serve, "MAX_SECONDS", 0.3)
    prediction = SimpleNamespace(to_coco_file=lambda name, masks: {"masks": masks})
    service = serve.build_service(lambda content: prediction, threads=4, max_megabytes=0.1)

    async def several():
        slow = [asyncio.create_task(post(service, bytes(90_000), ends=False)) for _ in range(2)]
        await asyncio.sleep(0.1)
        statuses = [(await post(service, bytes(n)))[0] for n in (10_000, 90_000)]
        return [
            *statuses,
            *(status for status, _ in await asyncio.gather(*slow)),
            (await post(service, bytes(90_000)))[0],
        ]

    assert asyncio.run(several()) == [200, 503, 408, 408, 200]


def test_an_image_of_many_pixels_is_refused_before_it_is_unpacked():
    file = io.BytesIO()
    Image.fromarray(np.zeros((5000, 4000), np.uint8)).save(file, "PNG")
    service = serve.build_service(lambda content: pytest.fail("predicted"), max_megapixels=19.9)
    status, content = asyncio.run(post(service, file.getvalue()))
    assert status == 400 and "4000 x 5000 pixels: send an image of at most 19.9 megapixels" in content["error"]
