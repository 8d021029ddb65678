"""What differs between the versions of numpy, torch and Detectron2."""

import warnings
import zipfile

import numpy as np
import pytest
import torch

from knet_d2.checkpoint.loading import load_file
from knet_d2.setup import compat


@pytest.mark.parametrize("package", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_of_either_numpy_are_read(tmp_path, package):
    array, number = np.arange(6, dtype=np.float32).reshape(2, 3), np.float64(2.5)
    torch.save({"array": array, "number": number}, tmp_path / "own.pth")
    with zipfile.ZipFile(tmp_path / "own.pth") as source, zipfile.ZipFile(tmp_path / "other.pth", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            for written in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
                content = content.replace(b"c" + written + b"\n", b"c" + package.encode() + b"\n")
            target.writestr(name, content)
    assert package.encode() in (tmp_path / "other.pth").read_bytes()
    loaded = load_file(str(tmp_path / "other.pth"))
    np.testing.assert_array_equal(loaded["array"], array)
    assert loaded["number"] == number


def test_torchscript_is_quiet_and_nothing_else():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with compat.quiet_torchscript():
            warnings.warn("`torch.jit.script` is deprecated. Please switch to `torch.compile`.", FutureWarning)
            warnings.warn("something else is deprecated", FutureWarning)
        warnings.warn("`torch.jit.script` is deprecated.", FutureWarning)
    assert [str(warning.message)[:9] for warning in caught] == ["something", "`torch.ji"]
