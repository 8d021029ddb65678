"""Weights files that are made to do harm: each is refused in one sentence, soon, and without much memory."""

import http.server
import io
import json
import pickle
import random
import struct
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
import yaml
from helpers import tiny_config, tiny_model
from torch import nn

import knet_d2
from knet_d2.checkpoint import Checkpointer, describe_model, download, load_file, read_description
from knet_d2.checkpoint.zoo import ZooEntry
from knet_d2.errors import CheckpointError


def piece(value, protocol=2):
    """The opcodes of a value, without the pickle's begin and end."""
    return pickle.dumps(value, protocol)[2:-1]


def dtype(code):
    return b"cnumpy\ndtype\n(" + piece(code) + piece(False) + piece(True) + b"tR"


EMPTY_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + piece((0,)) + piece("b") + b"tR"


def array(shape, element_type, values):
    """A pickle of {"a": an array}."""
    state = piece(1) + piece(shape) + element_type + piece(False) + values
    return b"\x80\x02}" + piece("a") + EMPTY_ARRAY + b"(" + state + b"tbs."


STRUCTURE = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 1)
ADDRESSES = dtype("V8") + piece(STRUCTURE) + b"b"
# A tuple of twice a tuple of twice a tuple ..., as the key of a dict
TOWER = b"\x80\x02})" + b"q\x00h\x00\x86" * 99 + b"K\x01s."

PICKLES = {
    "addresses as objects": (array((4,), ADDRESSES, piece(b"A" * 32, 3)), "'V8', not of numbers"),
    "memory as it is": (
        b"\x80\x02cnumpy\nndarray\n(" + piece((1 << 20,)) + piece("u1") + b"tR.",
        "numpy.ndarray without",
    ),
    "array of a long type": (
        array((1,), TOWER[2:].replace(b"}", b"cnumpy\ndtype\n").replace(b"K\x01s.", b"\x85R"), b"N"),
        "'tuple'",
    ),
    "objects": (array((1,), dtype("O8"), b"](" + piece("x") + b"e"), "'O8'"),
    "larger than its bytes": (array((1 << 40,), dtype("f4"), piece(b"A" * 32, 3)), "differs from its shape"),
    "of many dimensions": (array((1,) * 65, dtype("f4"), piece(b"A" * 4, 3)), "damaged"),
    "key that takes for ever": (TOWER, "damaged"),
    "keys with one hash": (
        b"\x80\x02}(" + b"".join(piece(i * (2**61 - 1)) + b"N" for i in range(99)) + b"u.",
        "damaged",
    ),
    "list in itself": (b"\x80\x02]q\x00h\x00a.", "in cycles"),
    "dict in itself": (b"\x80\x02}q\x00K\x01h\x00s.", "in cycles"),
    "deep lists": (b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".", "nested too deeply"),
    "many objects": (b"\x80\x02](" + b"N" * 600_000 + b"e.", "more than 500000 objects"),
    "long number": (b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b".", "bits"),
    "large memo": (b"\x80\x02}r\xff\xff\xff\xff.", "damaged"),
    "claimed string": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50), "damaged"),
    "byte array": (b"\x80\x05\x96" + struct.pack("<Q", 4) + b"abcd.", "BYTEARRAY8"),
    "set": (b"\x80\x04\x8f.", "EMPTY_SET"),
    "call of a byte array": (b"\x80\x02c__builtin__\nbytearray\n" + piece((1 << 40,)) + b"R.", "could run code"),
    "call of a tensor": (b"\x80\x02ctorch\nFloatTensor\n" + piece((1 << 40,)) + b"R.", "could run code"),
    "class alone": (b"\x80\x02cnumpy\ndtype\n.", "numpy.dtype without"),
    "storage": (
        b"\x80\x02(" + piece("storage") + b"ctorch\nFloatStorage\n" + piece("0") + b"NK\x01tQ.",
        "without its values",
    ),
    "tar": (b"x" * 257 + b"ustar" + b"x" * 300, "tar archive"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(tmp_path, name):
    content, message = PICKLES[name]
    path = tmp_path / "weights.pkl"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=f"weights.pkl.*{message}") as error:
        load_file(str(path))
    assert time.monotonic() - start < 5 and "\n" not in str(error.value)


def test_many_arrays_of_the_same_bytes(tmp_path):
    values = b"B" + struct.pack("<I", 100_000) + b"\0" * 100_000 + b"q\xff"
    first = array((100_000,), dtype("u1") + b"q\xfe", values)[len(b"\x80\x02}" + piece("a")) : -2]
    again = EMPTY_ARRAY + b"(" + piece(1) + piece((100_000,)) + b"h\xfe" + piece(False) + b"h\xfftb"
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"\x80\x02](" + first + again + b"e.")
    assert all(x.shape == (100_000,) for x in load_file(str(path)))
    path.write_bytes(b"\x80\x02](" + first + again * 100 + b"e.")
    with pytest.raises(CheckpointError, match="larger than the file"):
        load_file(str(path))


def torch_file(path, content, change=None, compression=zipfile.ZIP_STORED):
    """A file of torch.save whose records ``change`` has changed."""
    stream = io.BytesIO()
    torch.save(content, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(path, "w", compression) as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, change(name, data) if change else data)
    return str(path)


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        load_file(path)
    return str(error.value)


def test_archives_that_unfold(tmp_path):
    zeros = {"a": torch.zeros(1_000_000)}
    assert "compressed" in refusal(torch_file(tmp_path / "w.pth", zeros, compression=zipfile.ZIP_DEFLATED))
    path = torch_file(tmp_path / "w.pth", {"a": torch.arange(4.0)})
    data = bytearray((tmp_path / "w.pth").read_bytes())
    place = data.rfind(b"PK\x01\x02")
    data[place + 20 : place + 28] = struct.pack("<LL", 1 << 30, 1 << 30)
    (tmp_path / "w.pth").write_bytes(data)
    assert "claim more bytes" in refusal(path)
    with zipfile.ZipFile(tmp_path / "many.pth", "w") as archive:
        for number in range(90_000):
            archive.writestr(zipfile.ZipInfo(f"{number:050d}"), b"")
    assert "its directory has more than" in refusal(str(tmp_path / "many.pth"))


def test_tensors_that_are_not_in_the_archive(tmp_path):
    def cut(name, data):
        return data[:-4] if name.endswith("data/0") else data

    def longer(name, data):  # a tensor of 9 values on a storage of 4
        return data.replace(b"K\x04\x85", b"K\x09\x85") if name.endswith("data.pkl") else data

    path, four = tmp_path / "w.pth", {"a": torch.arange(4.0)}
    assert "record of a tensor has a wrong size" in refusal(torch_file(path, four, cut))
    assert "of shape (9,) has only 4 values" in refusal(torch_file(path, four, longer))
    assert "has only 1 values" in refusal(torch_file(path, {"a": torch.zeros(1).expand(10**12)}))
    assert "sparse" in refusal(torch_file(path, {"a": torch.zeros(2, 3).to_sparse()}))
    assert "meta" in refusal(torch_file(path, {"a": torch.zeros(2, device="meta")}))
    stream = io.BytesIO()
    torch.save(four, stream, _use_new_zipfile_serialization=False)
    path.write_bytes(stream.getvalue().replace(struct.pack("<q", 4), struct.pack("<q", 1 << 60)))
    assert "damaged" in refusal(str(path))
    keys = stream.getvalue().rindex(b"\x80\x02]")
    path.write_bytes(stream.getvalue()[:keys] + TOWER.replace(b"}", b"](").replace(b"K\x01s.", b"e."))
    assert "damaged" in refusal(str(path))


def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path):
    storage = torch.arange(12.0)
    content = {
        "view": storage[2:8].view(2, 3).t(),
        "tied": storage[2:8],
        "parameter": nn.Parameter(torch.ones(2)),
        "types": [torch.ones(3).to(x) for x in (torch.float16, torch.bfloat16, torch.int64, torch.uint16, torch.bool)],
        "empty": torch.zeros(0, 4),
        "number": np.float64(2.5),
        "state": nn.BatchNorm2d(2).state_dict(),
        "step": torch.tensor(3.0),
        "betas": (0.9, 0.999),
        "large": 2**40,
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        read = load_file(str(tmp_path / "w.pth"))
        for name in ("view", "tied", "parameter", "empty", "step"):
            assert torch.equal(read[name], content[name]) and read[name].dtype == content[name].dtype
        for ours, theirs in zip(read["types"], content["types"], strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        assert read["number"] == 2.5 and type(read["number"]) is np.float64
        assert read["betas"] == (0.9, 0.999) and read["large"] == 2**40
        assert list(read["state"]) == list(content["state"])


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_numbers(tmp_path, value):
    source = tiny_model("instance")
    state = {name: x.double() if x.is_floating_point() else x for name, x in source.state_dict().items()}
    name = next(name for name in state if name.endswith("stem.conv1.weight"))
    state[name].view(-1)[3] = value
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"w.pth: {name} has NaN or infinite values"):
        Checkpointer(tiny_model("instance")).load(str(tmp_path / "w.pth"))


def test_buffers_that_are_no_statistics(tmp_path):
    for ending, value, message in ((".running_var", -1.0, "negative"), (".num_batches_tracked", 0.5, "no torch.int64")):
        state = dict(tiny_model("instance").state_dict())
        name = next(name for name in state if name.endswith(ending))
        state[name] = torch.full_like(state[name], value, dtype=torch.float32)
        torch.save({"model": state}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=f"{name} has.*{message}"):
            Checkpointer(tiny_model("instance")).load(str(tmp_path / "w.pth"))


# ---------------------------------------------------------------- config and classes


@pytest.fixture(scope="module")
def described():
    cfg = tiny_config("instance", {"MODEL.KNET.THING_CATEGORY_IDS": [0, 1, 2]})
    return {"model": dict(tiny_model("instance").state_dict()), "metadata": describe_model(cfg)}


def changed(described, key=None, value=None, **metadata):
    config = yaml.safe_load(described["metadata"]["config"])
    if key:
        node = config
        for part in key.split(".")[:-1]:
            node = node.setdefault(part, {})
        node[key.split(".")[-1]] = value
        metadata["config"] = yaml.safe_dump(config)
    return {**described, "metadata": {**described["metadata"], **metadata}}


ALIASES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize("text", [ALIASES + "MODEL: *a39\n", MERGES, "MODEL: " + "[" * 5000, "a" * 200_000, "- 1", 3])
def test_configs_that_take_for_ever(described, text):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="w.pth: its config and classes"):
        read_description(changed(described, config=text), "w.pth")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
        ("MODEL.META_ARCHITECTURE", "os.system"),
        ("MODEL.KNET.NUM_KERNELS", 10**9),
        ("MODEL.KNET.NUM_KERNELS", 10**30),
        ("MODEL.KNET.NUM_STAGES", 10**6),
        ("MODEL.KNET.NUM_STAGES", -1),
        ("MODEL.KNET.UPDATE_HEAD.FFN_DIM", 10**12),
        ("MODEL.KNET.TASK", "none"),
        ("MODEL.PIXEL_STD", [0.0, 0.0, 0.0]),
        ("MODEL.PIXEL_STD", ["a"]),
        ("INPUT.MIN_SIZE_TEST", -5),
        ("INPUT.MIN_SIZE_TEST", 10**9),
        ("MODEL.UNKNOWN", 1),
    ],
)
def test_configs_of_another_model(described, key, value):
    start = time.monotonic()
    with pytest.raises(
        CheckpointError, match="^w.pth: its (config and classes|parameters are not those of its config)"
    ):
        read_description(changed(described, key, value), "w.pth")
    assert time.monotonic() - start < 5


def test_device_and_weights_of_a_description_are_not_used(described):
    cfg, _ = (
        read_description(changed(described, "MODEL", {}), "w.pth") if False else read_description(described, "w.pth")
    )
    for key, value in (("MODEL.DEVICE", "meta"), ("MODEL.WEIGHTS", "/etc/passwd")):
        assert read_description(changed(described, key, value), "w.pth").cfg == cfg


def test_classes_of_another_model(described):
    records = json.loads(described["metadata"]["classes"])
    first, *rest = records
    for classes in (
        [],
        records[:2],
        rest,
        {},
        [{**first, "color": [1, 2, "x"]}, *rest],
        [{**first, "color": [1, 2, 256]}, *rest],
        [{**first, "id": [1]}, *rest],
        [{**first, "name": 3}, *rest],
        [{**first, "isthing": False}, *rest],
        [None, *rest],
    ):
        with pytest.raises(CheckpointError, match="w.pth: its config and classes"):
            read_description(changed(described, classes=json.dumps(classes)), "w.pth")
    with pytest.raises(CheckpointError, match="w.pth: its config and classes"):
        read_description(changed(described, classes="[" * 100_000 + "]" * 100_000), "w.pth")
    assert read_description(described, "w.pth").classes.num_things == 3


# ---------------------------------------------------------------- downloads


class Stalling(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"x" * 1000)
        self.wfile.flush()
        self.server.released.wait(30)


@pytest.fixture
def stalling(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling)
    server.released = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_SECONDS_WITHOUT_DATA", 0.2)
    yield f"http://127.0.0.1:{server.server_port}/a-00000000.pth"
    server.released.set()
    server.shutdown()
    server.server_close()


def test_a_download_without_data_ends(stalling, tmp_path):
    with pytest.raises(CheckpointError, match=r"can't be downloaded \(timed out\)"):
        download.fetch_checkpoint(ZooEntry("x", None, {}, "", stalling))
    with pytest.raises(CheckpointError, match=r"can't be downloaded \(timed out\)"):
        Checkpointer(nn.Linear(1, 1)).load(stalling)
    left = [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert left == []


def test_the_whole_hash_is_kept_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "w.pth"
    torch.save(nn.Linear(1, 1).state_dict(), source)
    digest = download.hashlib.sha256(source.read_bytes()).hexdigest()
    source = source.rename(tmp_path / f"w-{digest[:8]}.pth")
    entry = ZooEntry("x", None, {}, "", source.as_uri())
    path = download.fetch_checkpoint(entry)
    assert f"sha256 {digest}" in capsys.readouterr().err
    record = tmp_path / "cache" / "knet_d2" / f"{source.name}.sha256"
    assert record.read_text() == f"{digest}  {source.name}\n"
    assert download.fetch_checkpoint(entry) == path and capsys.readouterr().err == ""
    record.write_text(f"{digest[:8]}{'0' * 56}  {source.name}\n")  # as if the file had been replaced by another
    with pytest.raises(CheckpointError, match=f"its sha256 is {digest}, but .* contains {digest[:8]}000"):
        download.fetch_checkpoint(entry)


def test_a_hash_can_be_demanded(tmp_path):
    source, target = nn.Linear(1, 1), nn.Linear(1, 1)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    path, digest = tmp_path / "w.pth", download.hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    Checkpointer(target).load(f"{path}?sha256={digest}")
    assert torch.equal(source.weight, target.weight)
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    for read in (Checkpointer(target).load, load_file, knet_d2.load):
        with pytest.raises(CheckpointError, match=f"w.pth: its sha256 is not {wrong}"):
            read(f"{path}?sha256={wrong}")


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_every_damage_is_a_checkpoint_error(tmp_path, form):
    draw = random.Random(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    content = {"model": model.state_dict(), "iteration": 3, "text": "abc"}
    stream = io.BytesIO()
    if form == "pickle":
        pickle.dump({k: v.numpy() for k, v in model.state_dict().items()}, stream, protocol=2)
    else:
        torch.save(content, stream, _use_new_zipfile_serialization=form == "zip")
    good, path, refused = stream.getvalue(), tmp_path / "w.pth", 0
    start = time.monotonic()
    for _ in range(800):
        data = bytearray(good)
        for _ in range(draw.choice((1, 1, 3, 20))):
            place = draw.randrange(len(good))
            kind = draw.random()
            if kind < 0.7:
                data[place % len(data)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            elif kind < 0.8:
                del data[place:]
                data.extend(good[place : place + 3])
            else:
                data[place:place] = good[draw.randrange(len(good)) :][: draw.randrange(30)]
        path.write_bytes(data)
        try:
            load_file(str(path))
        except CheckpointError as error:
            refused += 1
            assert "w.pth" in str(error) and "\n" not in str(error)
    assert refused > 250 and time.monotonic() - start < 60
