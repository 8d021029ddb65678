"""Runs of several processes: who starts them, and how they end when one fails or a signal stops them."""

import argparse
import atexit
import errno
import io
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from program_helpers import Program, errors_in, shapes, write_config  # noqa: F401
from torch.utils.data import DataLoader
from toys import assert_identical

from knet_d2.checkpoint import Checkpointer
from knet_d2.data.workers import STOP_SIGNALS, ignore_stop_signals
from knet_d2.engine import Trainer, launch, load_config, stop_signals
from knet_d2.engine.failures import explain
from knet_d2.engine.launch import Placement, find_placement, first_host, run
from knet_d2.engine.stop_signals import EXIT_PREEMPTED, StopSignals
from knet_d2.errors import ConfigError, DataError
from knet_d2.programs import train

TORCHRUN = {"TORCHELASTIC_RUN_ID": "7", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}

# ---- the environment -------------------------------------------------------------------------------------------


def test_places():
    assert find_placement(TORCHRUN) == Placement(5, 8, 1, 4, "env://")
    place = find_placement(SRUN)
    assert place[:4] == (5, 8, 1, 4)
    host, port = place.url.removeprefix("tcp://").split(":")
    assert host == "gpu07" and 1024 < int(port) < 32768
    assert find_placement({**SRUN, "SLURM_STEP_ID": "3"}).url != place.url
    assert find_placement({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"}).url == "tcp://10.0.0.1:99"
    assert find_placement({**SRUN, **TORCHRUN}).url == "env://"  # srun starts torchrun, which starts this process


def test_runs_on_one_machine_take_a_free_port(monkeypatch, capsys):
    """Runs on several machines must name it: the others can't know a port that the first one finds."""
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    parser = train.get_parser()
    assert parser.parse_args([]).dist_url == "auto"
    assert run(print, parser.parse_args(["--num-machines", "2"])) == 1
    assert "Error: --num-machines 2: name the first machine, as --dist-url tcp://" in capsys.readouterr().err


def test_processes_that_start_the_others():
    assert find_placement({}, num_gpus=8, num_machines=2) is None
    assert find_placement({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, num_gpus=8) is None
    assert find_placement({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None  # a batch script
    assert find_placement({**SRUN, "SLURM_STEP_NUM_TASKS": "2"}, num_gpus=8, num_machines=2) is None


@pytest.mark.parametrize(
    "environment, arguments, message",
    [
        (TORCHRUN, {"num_gpus": 4}, "torchrun has started 8 processes.*--num-gpus"),
        (SRUN, {"num_gpus": 4}, "srun has started 8 processes.*--num-gpus"),
        ({**TORCHRUN, "RANK": "five"}, {}, "RANK = 'five'"),
        ({**SRUN, "SLURM_PROCID": ""}, {}, "SLURM_PROCID = ''"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, {}, "SLURM_STEP_NODELIST = ''.*MASTER_ADDR"),
        ({**SRUN, "SLURM_LOCALID": "2"}, {}, "consecutive on each machine.*--distribution=block"),
    ],
)
def test_environments_that_cannot_be_used(environment, arguments, message):
    with pytest.raises(ConfigError, match=message):
        find_placement(environment, **arguments)


@pytest.mark.parametrize(
    "hosts, first",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("gpu[12],cpu1", "gpu12"),
        ("r[1-2]n[03-04]-ib,x", "r1n03-ib"),
        ("a.b.c", "a.b.c"),
    ],
)
def test_first_host(hosts, first):
    assert first_host(hosts) == first


@pytest.fixture
def outcome(monkeypatch, capsys):
    """A function that runs a program's work in this process; it returns exit code and stderr."""
    monkeypatch.setattr(logging, "raiseExceptions", True)  # run() changes these for the rest of its process
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    child_handler = signal.getsignal(signal.SIGCHLD)
    args = argparse.Namespace(num_gpus=1, num_machines=1, timeout_minutes=1)
    yield lambda work: (run(lambda _: work(), args), capsys.readouterr().err)
    signal.signal(signal.SIGCHLD, child_handler)


@pytest.mark.parametrize(
    "error, message",
    [
        (DataError("x.png: broken"), "Error: x.png: broken"),
        (OSError(errno.ENOSPC, "No space left on device", "log.txt"), "Error: log.txt: No space left on device."),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "run/x"), "Error: run/x: No such file"),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "Error: A process of this run"),
        (torch.distributed.DistBackendError("NCCL error"), "Error: A process of this run"),
        (MemoryError(), "Error: Out of memory. Use a smaller SOLVER.IMS_PER_BATCH"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Error: Out of memory."),
    ],
)
def test_what_a_person_can_mend_is_one_line(outcome, monkeypatch, error, message):
    def fail():
        raise error

    monkeypatch.setattr("knet_d2.engine.failures._GRACE_PERIOD", 0)
    code, text = outcome(fail)
    assert code == 1 and text.startswith(message) and text.count("\n") == 1


def test_the_process_group_ends_with_the_work(outcome, tmp_path):
    def work():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    assert outcome(work)[0] == 0
    assert not torch.distributed.is_initialized()


def test_other_failures_keep_their_traceback():
    assert explain(KeyError("bug")) is None and explain(RuntimeError("shape mismatch")) is None


def test_more_memory_than_there_is(outcome):
    code, text = outcome(lambda: torch.empty(1 << 60))
    assert code == 1 and text.startswith("Error: Out of memory.") and text.count("\n") == 1


class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.parametrize("num_workers", [1, 3])
def test_killed_loader_is_one_line(outcome, monkeypatch, num_workers):
    """The main process gets a broken connection, or an error of PyTorch's handler of SIGCHLD at any place."""
    monkeypatch.setattr("knet_d2.engine.failures._GRACE_PERIOD", 0)
    code, text = outcome(lambda: list(DataLoader(Killed(), num_workers=num_workers)))
    assert code == 1 and text.startswith("Error: A process of this run") and text.count("\n") == 1
    assert "DATALOADER.NUM_WORKERS" in text and "--resume" in text


def test_full_disk_is_told_once(outcome):
    """Log files and threads also fail, but print no other message."""
    full = OSError(errno.ENOSPC, "No space left on device", "events")

    class Log(io.StringIO):
        def flush(self):
            raise full

    def fail():
        raise full

    def work():
        logger = logging.Logger("of_a_full_disk")
        logger.addHandler(logging.StreamHandler(Log()))
        logger.error("lost")
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        fail()

    code, text = outcome(work)
    (line,) = text.splitlines()
    assert code == 1 and line.startswith("Error: events: No space left on device.")


def pool_of_multiprocessing():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3]


def pool_of_futures():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(abs, [-1, -2, -3])) == [1, 2, 3]


def abandoned_loader():
    iterator = iter(DataLoader(range(100), num_workers=2, worker_init_fn=ignore_stop_signals))
    assert next(iterator) == 0


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no processes are forked")
@pytest.mark.parametrize("use", [pool_of_multiprocessing, pool_of_futures, abandoned_loader])
def test_children_end_while_signals_are_handled(use):
    """A child with the handlers of the training loop would ignore Pool's SIGTERM, and Pool would wait forever."""
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    signals = StopSignals()
    with signals.listening():
        for _ in range(15):
            start = time.monotonic()
            use()
            assert time.monotonic() - start < 5
    assert signals.received is None and handlers == [signal.getsignal(number) for number in STOP_SIGNALS]


def test_a_second_interrupt_ends_at_once(monkeypatch, capfd):
    """One that torchrun passes on right after the terminal's is not the second one."""
    handler = signal.getsignal(signal.SIGINT)
    signals = StopSignals()
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        monkeypatch.setattr(stop_signals, "_ONE_INTERRUPT", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("Press it again to end at once") == 1
    assert signal.getsignal(signal.SIGINT) is handler


def _end_after_exit_functions(ending, path):
    atexit._clear()  # what the parent of this forked process has registered
    atexit.register(path.write_text, "saved")
    threading.Thread(target=time.sleep, args=(600,)).start()  # the interpreter's own end would wait for it

    def run_guarded(main, args):
        if isinstance(ending, BaseException):
            raise ending
        return ending

    launch.run_guarded = run_guarded
    launch._work(None, None)


@pytest.mark.parametrize(
    "ending, code", [(0, 0), (1, 1), (KeyboardInterrupt(), 130), (SystemExit(EXIT_PREEMPTED), EXIT_PREEMPTED)]
)
def test_a_process_of_several_ends_at_once_with_its_exit_code(tmp_path, ending, code):
    process = multiprocessing.get_context("fork").Process(
        target=_end_after_exit_functions, args=(ending, tmp_path / "log")
    )
    process.start()
    process.join(60)
    assert process.exitcode == code and (tmp_path / "log").read_text() == "saved"


def wait_for_interrupt(worker):
    ignore_stop_signals(worker)
    os.kill(os.getpid(), signal.SIGINT)


def test_workers_outlive_the_interrupt_of_their_terminal():
    loader = DataLoader(range(6), num_workers=2, batch_size=None, worker_init_fn=wait_for_interrupt)
    with StopSignals().listening():
        assert list(loader) == list(range(6))


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_forked_child_ends_at_the_signal(number):
    """The signal is not lost at any time while the child starts."""
    with StopSignals().listening():
        for delay in [0.0] * 10 + [0.001 * i for i in range(10)]:
            child = os.fork()
            if child == 0:
                time.sleep(20)
                os._exit(0)
            time.sleep(delay)
            os.kill(child, number)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number


# ---- runs of two processes -------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return str(s.getsockname()[1])


def test_every_starter_trains_the_same(tmp_path, shapes):  # noqa: F811
    """Detectron2's launch (stopped by SIGTERM and resumed), torchrun and srun: weights, state and metrics file."""
    config = write_config(tmp_path, shapes, "panoptic", MAX_ITER=6, CHECKPOINT_PERIOD=2, LOG_PERIOD=1)
    arguments = ["train_net.py", "--config-file", config, "DATALOADER.NUM_WORKERS", "1"]

    def output(name):
        return ["OUTPUT_DIR", tmp_path / name]

    launched = [arguments[0], "--num-gpus", "2", "--resume", *arguments[1:], *output("launch")]
    with Program(tmp_path, *launched) as program:
        program.wait_for(tmp_path / "launch" / "last_checkpoint")
        program.process.send_signal(signal.SIGTERM)
        code, text = program.finish()
    assert code == EXIT_PREEMPTED == 75 and "Traceback" not in text and not errors_in(text), text[-3000:]
    assert "Received SIGTERM" in text and "Continue with --resume" in text
    stopped_at = int((tmp_path / "launch" / "last_checkpoint").read_text()[6:13])
    assert stopped_at < 5

    variables = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "localhost"}
    variables["MASTER_PORT"] = free_port()
    places = [{**variables, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    runs = [
        [Program(tmp_path, *launched)],
        [Program(tmp_path, *arguments, *output("torchrun"), starter=torchrun)],
        [Program(tmp_path, *arguments, *output("srun"), environment=place) for place in places],
    ]
    for programs in runs:
        for program in programs:
            with program:
                code, text = program.finish()
                assert code == 0, text[-3000:]

    metrics = {name: (tmp_path / name / "metrics.json").read_bytes() for name in ("launch", "torchrun", "srun")}
    assert len([json.loads(line) for line in metrics["launch"].splitlines()]) == 6
    assert metrics["launch"] == metrics["torchrun"] == metrics["srun"]
    states = [torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in metrics]
    assert_identical(states[0], states[1])
    assert_identical(states[0], states[2])
    assert (tmp_path / "torchrun" / "log.txt.rank1").exists()

    cfg = load_config(config, ["MODEL.WEIGHTS", str(tmp_path / "launch" / "model_final.pth")])
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    of_one_process = Trainer.test(cfg, model)["panoptic_seg"]
    of_two = json.loads(metrics["launch"].splitlines()[-1])
    for name, value in of_one_process.items():
        assert of_two[f"panoptic_seg/{name}"] == pytest.approx(value, rel=1e-12, nan_ok=True), name


def test_failure_of_one_process_ends_all_with_one_message(tmp_path, shapes):  # noqa: F811
    config = write_config(tmp_path, shapes, "semantic", MAX_ITER=50)
    image = sorted((shapes / "images").iterdir())[1]
    good = image.read_bytes()
    image.write_bytes(good[:100])
    try:
        with Program(tmp_path, "train_net.py", "--num-gpus", "2", "--config-file", config) as program:
            code, text = program.finish()
    finally:
        image.write_bytes(good)
    (message,) = errors_in(text)
    assert code == 1 and image.name in message and "Traceback" not in text, text[-3000:]


def test_error_in_all_processes_is_told_once(tmp_path, shapes):  # noqa: F811
    config = write_config(tmp_path, shapes, "semantic", MAX_ITER=2)
    arguments = ["--num-gpus", "2", "--config-file", config, "SOLVER.IMS_PER_BATCH", "3", "OUTPUT_DIR", tmp_path]
    with Program(tmp_path, "train_net.py", *arguments) as program:
        code, text = program.finish()
    (message,) = errors_in(text)
    assert code == 1 and "SOLVER.IMS_PER_BATCH = 3" in message and "Traceback" not in text, text[-3000:]


def test_killed_process_ends_all_with_one_message(tmp_path, shapes):  # noqa: F811
    config = write_config(tmp_path, shapes, "semantic", MAX_ITER=10_000, CHECKPOINT_PERIOD=1)
    arguments = ["--num-gpus", "2", "--config-file", config, "OUTPUT_DIR", tmp_path]
    with Program(tmp_path, "train_net.py", *arguments) as program:
        program.wait_for(tmp_path / "last_checkpoint")
        children = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children").read_text().split()
        # the other one is multiprocessing's resource tracker
        workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(workers[1], signal.SIGKILL)
        code, text = program.finish()
    (message,) = errors_in(text)
    assert code == 1 and "killed by SIGKILL" in message and "--resume" in message and "Traceback" not in text
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
