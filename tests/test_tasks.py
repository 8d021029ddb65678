"""The table of tasks."""

import pickle

import pytest
from helpers import tiny_config

from knet_d2.data import build_mapper
from knet_d2.errors import ConfigError
from knet_d2.modeling.criterion import TERMS
from knet_d2.tasks import TASKS, Assignment, get_task


@pytest.mark.parametrize("name", TASKS)
def test_a_task_and_its_mapper_reach_processes_that_are_spawned(name):
    assert pickle.loads(pickle.dumps(TASKS[name])) == TASKS[name]
    cfg = tiny_config(name)
    knet = cfg.MODEL.KNET
    knet.THING_CATEGORY_IDS = list(range(knet.NUM_THING_CLASSES))
    knet.STUFF_CATEGORY_IDS = list(range(knet.NUM_STUFF_CLASSES))
    assert type(pickle.loads(pickle.dumps(build_mapper(cfg, is_train=True)))).__name__ == "KNetDatasetMapper"


@pytest.mark.parametrize(
    "name, matched, fixed, classes", [("instance", 6, [], 3), ("panoptic", 6, [3, 4], 5), ("semantic", 0, [0, 1], 2)]
)
def test_groups_of_kernels(name, matched, fixed, classes):
    bank = TASKS[name].bank(num_matched=6, num_things=3, num_stuff=2)
    assert (bank.num_matched, bank.fixed_class_ids, bank.num_classes) == (matched, fixed, classes)
    assert [group.assignment for group in bank.groups] == (
        [Assignment.HUNGARIAN] * bool(matched) + [Assignment.IDENTITY] * bool(fixed)
    )


@pytest.mark.parametrize("name", TASKS)
def test_every_term_is_known_and_the_default_output_is_one_of_the_task(name):
    task = TASKS[name]
    assert set(task.losses) <= set(TERMS) and task.checked_outputs(()) == task.outputs[:1]
    with pytest.raises(ConfigError, match=r"MODEL\.KNET\.TEST\.OUTPUTS has \['boxes'\]"):
        task.checked_outputs(["boxes"])


def test_an_unknown_task_is_named_with_the_known_ones():
    cfg = tiny_config("panoptic")
    cfg.MODEL.KNET.TASK = "depth"
    with pytest.raises(ConfigError, match="MODEL.KNET.TASK = 'depth': use one of instance, panoptic, semantic"):
        get_task(cfg)
