"""The trainer: Detectron2's DefaultTrainer with K-Net's data, optimiser, training step and exact resume."""

import logging
import os
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from ..checkpoint import (
    Checkpointer,
    changed_options,
    describe_model,
    has_description,
    periodic_checkpoints,
    remove_unfinished,
    write_atomically,
)
from ..config.merging import config_to_blame
from ..data import build_loss_loader, build_test_loader, build_train_loader, register_custom_datasets, resolve_classes
from ..data.classes import class_table
from ..errors import CheckpointError, ConfigError, NonFiniteError
from ..evaluation import Evaluators, best_metric, build_evaluators, write_report
from ..evaluation.report import REPORT
from ..inference.tiled_model import TiledKNet, size_and_overlap
from ..modeling.tta import KNetWithTTA
from ..results.comparison import draw_validation_pictures
from ..video.model import follow_videos
from . import optimizer as optim
from .averaging import build_weight_average
from .dump import batch_file, save_batch
from .hooks import (
    BestCheckpointer,
    CheckpointHook,
    EarlyStopping,
    EvalHook,
    FinishIteration,
    MetricsHistory,
    PeriodicWriter,
    ProcessAgreement,
    StopHook,
)
from .output_dir import lock_output_dir, release_output_dir, resolve_seed
from .progress import FirstEstimate, ProgressBar
from .stop_signals import StopSignals
from .trackers import RUN_IDS, TrackerWriter, check_trackers
from .train_step import TrainStep, amp_dtype
from .validation import mean_loss
from .writers import (
    EVENTS,
    ConsoleWriter,
    MetricsWriter,
    TensorBoardWriter,
    bounded_storage,
    cut_metrics,
    is_terminal,
    read_metrics,
)

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains, evaluates, keeps checkpoints; a run that is resumed ends as one that was never interrupted."""

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)  # DefaultTrainer's would start data loaders before it is known where to start
        with config_to_blame("The batch of each process"):
            cfg = self.auto_scale_workers(cfg, comm.get_world_size()).clone()
        cfg.defrost()
        cfg.SEED = resolve_seed(cfg)
        # load_config has done both. For a config that was made in Python, resolving reads the data sets, which sets the
        # names of the classes in their metadata
        register_custom_datasets(cfg)
        resolve_classes(cfg)
        cfg.freeze()
        self.cfg = cfg
        os.makedirs(cfg.OUTPUT_DIR or ".", exist_ok=True)
        model = self.build_model(cfg)
        device = next(model.parameters()).device
        dtype = amp_dtype(cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE, device)
        if dtype is not None and device.type == "cuda":
            model.to(memory_format=torch.channels_last)  # as the feature maps, see modeling/layers.py
        optimizer = self.build_optimizer(cfg, model)
        device_ids = [torch.cuda.current_device()] if device.type == "cuda" else None
        # On the CPU a resumed run is equal to the bit. DistributedDataParallel would lay out its buckets anew after the
        # first step of a process, so that gradients of several processes are summed in another order from then on;
        # looking for unused parameters keeps the first layout.
        keep_buckets = device.type == "cpu"
        ddp_model = create_ddp_model(
            model, broadcast_buffers=False, device_ids=device_ids, find_unused_parameters=keep_buckets
        )
        # After DistributedDataParallel has given all processes the weights of the main one
        self._average = build_weight_average(cfg, model)
        self._signals = StopSignals()
        # The name that DefaultTrainer.run_step relies on
        self._trainer = TrainStep(
            ddp_model,
            optimizer,
            clip_gradients=optim.build_gradient_clipper(cfg),
            seed=cfg.SEED,
            dtype=dtype,
            non_finite_limit=cfg.SOLVER.NON_FINITE_STEPS,
            num_parts=_number_of_parts(cfg),
            signals=self._signals,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            self.evaluated_model,
            cfg.OUTPUT_DIR,
            partial=True,
            metadata=describe_model(cfg),
            classes=class_table(cfg),
            trainer=weakref.proxy(self),
        )
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._metrics_file = os.path.join(cfg.OUTPUT_DIR, "metrics.json")
        self.last_written = -1  # iteration of the last line in the metrics file
        self._last_eval_results: dict[str, Any] | None = None
        self.register_hooks(self.build_hooks())

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated and saved: the one that is trained, or the average of its weights."""
        return self.model if self._average is None else self._average.averaged_model

    # What is built from the config.

    @classmethod
    @config_to_blame("The model")
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        logger.debug("Model:\n%s", model)
        return model

    @classmethod
    @config_to_blame("The optimiser")
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return optim.build_optimizer(cfg, model)

    @classmethod
    @config_to_blame("The schedule of the learning rate")
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return optim.build_lr_scheduler(cfg, optimizer)

    @classmethod
    @config_to_blame("The loader of training images")
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0):
        return build_train_loader(cfg, start_iter=start_iter)

    @classmethod
    @config_to_blame("The loader of validation images")
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return Evaluators(build_evaluators(cfg, dataset_name, output_folder))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list | None = None) -> dict[str, Any]:
        """Evaluate on DATASETS.TEST, with a memory for frames of videos, and in tiles if TEST.TILES asks for it."""
        if cfg.TEST.TILES.SIZE:
            return super().test(_with_whole_images(cfg), TiledKNet(cfg, model), evaluators)
        return super().test(cfg, follow_videos(cfg, model), evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation (TEST.AUG); the keys of the results end in "_TTA"."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        augmented = KNetWithTTA(cfg, model)
        cfg = _with_whole_images(cfg)
        cfg.TEST.REPORT = False  # the report is on the evaluation without augmentation
        evaluators = [cls.build_evaluator(cfg, name, os.path.join(folder, name)) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, augmented, evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}

    def build_hooks(self) -> list[HookBase]:
        """See knet_d2.engine.hooks for what their order guarantees."""
        cfg = self.cfg
        _check_hook_options(cfg)
        checkpoints = CheckpointHook(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_TO_KEEP)
        stop = StopHook(self._signals, checkpoints, self._trainer)
        models = [self.model] if self._average is None else [self.model, self.evaluated_model]
        agreement = ProcessAgreement(models, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
        until_stop = [hooks.IterationTimer(), hooks.LRScheduler(), MetricsHistory(), self._average, agreement]
        until_stop += [checkpoints, stop]
        evaluation = EvalHook(cfg.TEST.EVAL_PERIOD, stop)
        after: list[HookBase] = [evaluation]
        metric, best, progress = best_metric(cfg), None, []
        if comm.is_main_process():
            best = BestCheckpointer(evaluation, self.checkpointer, metric, self._metrics_file)
            after.append(best)
        if cfg.SOLVER.PATIENCE:
            after.append(EarlyStopping(cfg.SOLVER.PATIENCE, best, checkpoints, cfg.TEST.EVAL_PERIOD))
        if comm.is_main_process():
            after.append(PeriodicWriter(cfg.SOLVER.LOG_PERIOD, cfg.TEST.EVAL_PERIOD))
            progress = [ProgressBar(cfg.SOLVER.IMS_PER_BATCH, metric) if is_terminal() else FirstEstimate()]
        return [*(hook for hook in until_stop if hook is not None), *after, FinishIteration(after), *progress]

    def build_writers(self) -> list[EventWriter]:
        return [
            ConsoleWriter(self.max_iter),
            MetricsWriter(self._metrics_file, self.last_written),
            *(TrackerWriter(self.cfg, name, self.start_iter) for name in self.cfg.SOLVER.TRACKERS),
            TensorBoardWriter(self.cfg.OUTPUT_DIR, self.start_iter),  # the last one: it clears the pictures
        ]

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the model on DATASETS.TEST, put pictures of it into the event storage and write the report."""
        cfg, model = self.cfg, self.evaluated_model
        evaluators = [self.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        results = self.test(cfg, model, evaluators)
        plain_model = getattr(model, "module", model)  # not wrapped for distributed training
        if cfg.TEST.VALIDATION_LOSS:
            loss = mean_loss(plain_model, *build_loss_loader(cfg, cfg.DATASETS.TEST[0]))
            results = {**results, "validation": {"total_loss": loss}}
        if cfg.TEST.AUG.ENABLED and self.iter + 1 == self.max_iter:
            results = {**results, **self.test_with_TTA(cfg, model)}
        if cfg.TEST.NUM_PICTURES and cfg.DATASETS.TEST and comm.is_main_process():
            for name, picture in draw_validation_pictures(cfg, plain_model, cfg.TEST.NUM_PICTURES).items():
                self.storage.put_image(f"validation/{name}", picture.transpose(2, 0, 1))
        now = {"iteration": self.iter, **flatten_results_dict(results)}
        write_report(cfg, plain_model, evaluators, results, [*read_metrics(self._metrics_file), now])
        self._last_eval_results = results
        return results

    # The run.

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint in OUTPUT_DIR (with ``resume``, if there is one), or load MODEL.WEIGHTS."""
        lock_output_dir(self.cfg.OUTPUT_DIR)
        super().resume_or_load(resume=resume)
        if self._average is not None:
            self._average.start()
        # A config that it can't be built from leaves an earlier run as it is
        self.data_loader = self.build_train_loader(self.cfg, self.start_iter)  # DefaultTrainer hands it to _trainer
        comm.synchronize()  # nobody reads any more what is renamed or cut
        if not comm.is_main_process():
            return
        remove_unfinished(self.cfg.OUTPUT_DIR)
        if resume:
            self.last_written = cut_metrics(self._metrics_file, self.start_iter - 1)
        else:
            self._set_earlier_run_aside()

    def _set_earlier_run_aside(self) -> None:
        """Rename what would be taken for this run's later: metrics.json -> metrics_1.json, and so on."""
        folder = self.cfg.OUTPUT_DIR
        names = ["metrics.json", RUN_IDS, "last_checkpoint", "model_best.pth", "model_final.pth", REPORT]
        names += periodic_checkpoints(folder)
        pairs = [(name, os.path.splitext(name)) for name in names if os.path.exists(os.path.join(folder, name))]
        events = [name for name in os.listdir(folder) if name.startswith(EVENTS)]
        if not pairs and not events:
            return
        number = 1
        taken = [*pairs, ("events", ("events", ""))]
        while any(os.path.exists(os.path.join(folder, f"{stem}_{number}{suffix}")) for _, (stem, suffix) in taken):
            number += 1
        if events:  # TensorBoard shows a folder in the folder as another run
            os.mkdir(os.path.join(folder, f"events_{number}"))
        for name in events:
            os.replace(os.path.join(folder, name), os.path.join(folder, f"events_{number}", name))
        for name, (stem, suffix) in pairs:
            os.replace(os.path.join(folder, name), os.path.join(folder, f"{stem}_{number}{suffix}"))
        logger.warning(
            f"{folder} has an earlier run; its metrics, checkpoints, report and events are renamed: their "
            f"names or that of their folder end in _{number} now"
        )

    def train(self) -> dict[str, Any] | None:
        """Train from ``start_iter`` to SOLVER.MAX_ITER.

        Returns:
            The results of the last evaluation, on the main process.

        Raises:
            Preempted: SIGTERM, SIGUSR1 or Ctrl-C came; the run can be resumed where it was.
        """
        if self.data_loader is None:  # without resume_or_load
            self.data_loader = self.build_train_loader(self.cfg, self.start_iter)
        logger.info(f"Training from iteration {self.start_iter} to {self.max_iter}. Ctrl-C ends it with a checkpoint.")
        self.iter = self.start_iter
        with bounded_storage(self.start_iter) as self.storage, self._signals.listening():
            try:
                self.before_train()
                while self.iter < self.max_iter:  # a hook may lower max_iter
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    self.iter += 1
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} {self._dump_step()}") from error
            finally:
                self.after_train()
                release_output_dir(self.cfg.OUTPUT_DIR)
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def repeat_step(self, batch: list[dict[str, Any]], rank: int) -> dict[str, float]:
        """Take the present iteration's step as process ``rank`` took it; returns the losses by name."""
        return self._trainer.repeat(batch, self.iter, rank)

    def _dump_step(self) -> str:
        """Keep what the failed step was made of; returns what to tell about it."""
        name = f"non_finite_{self.iter:07d}"
        folder = os.path.join(self.cfg.OUTPUT_DIR, name)
        try:
            os.makedirs(folder, exist_ok=True)
            save_batch(batch_file(folder, comm.get_rank()), self._trainer.last_batch)
            if comm.is_main_process():
                write_atomically(os.path.join(folder, "config.yaml"), lambda f: f.write(self.cfg.dump()), mode="w")
                self.checkpointer.save(f"{name}/model", tag=False)
        except (OSError, RuntimeError, CheckpointError) as error:
            return f"What it was made of can't be kept: {error}"
        comm.synchronize()  # the first process that ends may end the others
        return f"To repeat it: python -m knet_d2.engine.replay {folder}"

    def state_dict(self) -> dict[str, Any]:
        state = TrainerBase.state_dict(self)
        state["_trainer"] = self._trainer.state_dict()
        state["seed"] = self.cfg.SEED
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "_trainer" not in state_dict:
            raise CheckpointError(
                f"The last checkpoint in {self.cfg.OUTPUT_DIR} has no optimiser state, so it can't be resumed; "
                "start from it by MODEL.WEIGHTS and without --resume."
            )
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        if self.iter + 1 < self.max_iter:
            optim.restart_schedule(self.scheduler, self.optimizer)
        self._tell_changed_options()
        if state_dict.get("seed", self.cfg.SEED) != self.cfg.SEED:
            logger.warning(
                f"SEED was {state_dict['seed']} and is now {self.cfg.SEED}: the run is not continued exactly."
            )

    def _tell_changed_options(self) -> None:
        """Log what the command line or the config file changes in a run that is resumed."""
        if not has_description({"metadata": self.checkpointer.file_metadata}):
            return
        changed = changed_options(self.checkpointer.metadata, self.checkpointer.file_metadata)
        changed.pop("SEED", None)  # has a sentence of its own
        if changed:
            values = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
            logger.warning(f"Options that differ from those of the run so far, and hold from now on: {values}.")
        if changed.get("SOLVER.MAX_ITER", (0, 0))[0] == self.iter + 1 < self.max_iter:
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            logger.warning(
                f"The run had ended at iteration {self.iter + 1}. It goes on to {self.max_iter}, with a learning rate "
                f"of {rate:.2g} that falls from now on. If that is too low, start a new run from its weights: "
                f"MODEL.WEIGHTS {self.cfg.OUTPUT_DIR}, and another output folder."
            )


def _with_whole_images(cfg: CfgNode) -> CfgNode:
    """A copy whose loaders leave images as they are: tiles and views of them are resized later."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0
    return cfg


def _check_hook_options(cfg: CfgNode) -> None:
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ConfigError("TEST.PRECISE_BN.ENABLED = True is not supported: set it to False.")
    solver = cfg.SOLVER
    check_trackers(solver.TRACKERS)
    if cfg.TEST.TILES.SIZE:
        size_and_overlap(cfg)
    for key, value, meaning in (
        ("SOLVER.CHECKPOINT_PERIOD", solver.CHECKPOINT_PERIOD, "only the final and the best checkpoint"),
        ("SOLVER.CHECKPOINTS_TO_KEEP", solver.CHECKPOINTS_TO_KEEP, "all"),
        ("SOLVER.LOG_PERIOD", solver.LOG_PERIOD, "only after evaluations and at the end"),
        ("SOLVER.PATIENCE", solver.PATIENCE, "train to SOLVER.MAX_ITER"),
        ("TEST.EVAL_PERIOD", cfg.TEST.EVAL_PERIOD, "only at the end"),
    ):
        if value < 0:
            raise ConfigError(f"{key} = {value}: use at least 0 (0: {meaning}).")
    if solver.PATIENCE and not (cfg.TEST.EVAL_PERIOD and cfg.DATASETS.TEST):
        raise ConfigError(
            f"SOLVER.PATIENCE = {solver.PATIENCE}: it counts evaluations. Set TEST.EVAL_PERIOD and DATASETS.TEST, or "
            "set it to 0."
        )


def _number_of_parts(cfg: CfgNode) -> int:
    """SOLVER.ACCUMULATE_GRADIENTS, checked."""
    parts, images = cfg.SOLVER.ACCUMULATE_GRADIENTS, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    if not 1 <= parts <= images:
        raise ConfigError(
            f"SOLVER.ACCUMULATE_GRADIENTS = {parts}: use 1 to {images}, the images of a batch (SOLVER.IMS_PER_BATCH) "
            "that each process has."
        )
    return parts
