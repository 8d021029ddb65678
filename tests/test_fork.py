"""Processes that are forked after this one has computed with several threads."""

import pytest
from program_helpers import Program, write_config

from knet_d2.data.shapes import write_shapes

# The threads of a prediction, which a forked child does not have
SCRIPT = """
import multiprocessing, sys, torch
from knet_d2.programs import train
def convolve():
    torch.set_num_threads(1)
    torch.nn.functional.conv2d(torch.ones(1, 16, 64, 64), torch.ones(16, 16, 3, 3))
if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.nn.functional.conv2d(torch.ones(1, 16, 64, 64), torch.ones(16, 16, 3, 3))
    child = multiprocessing.get_context("fork").Process(target=convolve)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    sys.exit(train.main(train.get_parser().parse_args(sys.argv[1:])))
"""


@pytest.mark.skipif("fork" not in __import__("multiprocessing").get_all_start_methods(), reason="no fork here")
def test_workers_that_are_forked_after_a_prediction_do_not_wait_for_ever(tmp_path):
    """Of the data loaders, in a run that trains and evaluates in turn; and a child as docs/DEPLOYMENT.md has it."""
    write_shapes(str(tmp_path / "fork_data"), 4, seed=1, size=64)
    config = write_config(tmp_path, tmp_path / "fork_data", "panoptic", MAX_ITER=2, WARMUP_ITERS=0)
    (tmp_path / "main.py").write_text(SCRIPT)
    words = [
        "--config-file",
        config,
        "OUTPUT_DIR",
        tmp_path / "out",
        "TEST.EVAL_PERIOD",
        1,
        "DATALOADER.NUM_WORKERS",
        1,
    ]
    with Program(tmp_path, tmp_path / "main.py", *words) as program:
        code, text = program.finish()
    assert code == 0, text
