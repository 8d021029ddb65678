"""Equality with tensors of the official K-Net: keys, initialisation, inference, training; and detection of errors."""

import functools
import gzip
import json

import pytest
import torch
from detectron2.modeling import build_model

from checks.references.cases import (
    COMMITTED,
    CONFIGS,
    Result,
    filled_model,
    find_cases,
    load_manifests,
    not_compared,
    zoo_config,
)
from checks.references.mutations import MUTATIONS
from checks.references.program import check_case, first_failure
from checks.references.state_dicts import check_state_dict
from knet_d2.checkpoint.key_table import find_rule, translate_key
from knet_d2.checkpoint.openmmlab import openmmlab_rules

MANIFESTS = load_manifests(COMMITTED)
# How much every file has to have compared, so that nothing is left out unnoticed
NUM_COMPARED = {
    "ref_ins_r50_b": 57,
    "ref_pan_r50_b": 56,
    "ref_pan_r50_c": 8,
    "ref_seg_fcn_b": 28,
    "ref_seg_psp_b": 17,
    "ref_seg_dlv3_b": 17,
    "ref_seg_uper_b": 17,
    "ref_seg_uper_swint_b": 28,
    "train_ins_r50_noinst": 163,
    "train_pan_r50_two": 187,
    "train_seg_fcn_two": 71,
}


@functools.lru_cache(maxsize=2)
def official_model(architecture):
    return filled_model(architecture, MANIFESTS[architecture]["state_dict"])


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("architecture", CONFIGS)
def test_official_state_dict_fits(architecture):
    results = check_state_dict(architecture, MANIFESTS[architecture])
    assert [(result.name, result.difference) for result in results if not result.passed] == []


def test_another_state_dict_does_not_fit():
    """Every kind of difference is counted: names, shapes, numbers of parameters."""
    manifest = {**MANIFESTS["ins_r50"], "state_dict": MANIFESTS["pan_r101"]["state_dict"]}
    results = {result.name: result.difference for result in check_state_dict("ins_r50", manifest)}
    assert results["state dict: missing"] == 0
    assert results["state dict: unexpected"] == 17 * 3 * (1 + 5)
    assert results["state dict: of another shape"] == 2 + 3 * 2
    assert results["state dict: parameters"] == results["state dict: trained parameters"] == 0
    manifest = {**MANIFESTS["ins_r50"], "num_params": 1, "num_trainable": 2}
    results = {result.name: result.difference for result in check_state_dict("ins_r101", manifest)}
    assert results["state dict: missing"] == 17 * 3 * (1 + 5)
    assert results["state dict: parameters"] == 56474496 - 1
    assert results["state dict: trained parameters"] == 56249152 - 2


# ---------------------------------------------------------------- initialisation


def statistics(tensor):
    tensor = tensor.detach().double()
    std = tensor.std() if tensor.numel() > 1 else tensor.new_zeros(())
    return [float(value) for value in (tensor.mean(), std, tensor.min(), tensor.max())]


@pytest.mark.parametrize("architecture", ["pan_r50", "seg_fcn", "seg_uper_swint"])
def test_initialisation_has_the_official_distributions(architecture):
    """Constants are equal; random values agree in mean, spread and kind of distribution (uniform or normal)."""
    with gzip.open(COMMITTED / "initialisation.json.gz", "rt") as f:
        official = json.load(f)[architecture]
    torch.manual_seed(0)
    model = build_model(zoo_config(CONFIGS[architecture]))
    parameters = dict(model.named_parameters())
    rules = openmmlab_rules(dict.fromkeys([*official, *MANIFESTS[architecture]["state_dict"]]))
    assert len(official) > 100
    for name, (mean, std, low, high) in official.items():
        parameter = parameters[translate_key(name, find_rule(name, rules))]
        our_mean, our_std, our_low, our_high = statistics(parameter)
        if std < 1e-6:
            assert (our_low, our_high) == pytest.approx((mean, mean), abs=1e-5), name
            continue
        n = parameter.numel()
        assert abs(our_mean - mean) < 6 * std * (2 / n) ** 0.5 + 1e-6, name
        assert our_std / std == pytest.approx(1, abs=0.005 + 5 / n**0.5), name
        # The largest value, in standard deviations: 1.7 if uniform, above 2.5 if normal
        is_uniform = max(abs(low), abs(high)) < 2 * std
        assert (max(-our_low, our_high) < 2 * our_std) == is_uniform, name


# ---------------------------------------------------------------- inference and training


def test_all_committed_cases_are_known():
    assert set(find_cases(COMMITTED)) == set(NUM_COMPARED)


@pytest.mark.parametrize("case", find_cases(COMMITTED))
def test_equals_the_official_implementation(case):
    architecture = case.split("_", 1)[1].rsplit("_", 1)[0]
    results, skipped = check_case(COMMITTED, case, official_model(architecture))
    assert [result for result in results if not result.passed] == []
    assert len(results) == NUM_COMPARED[case]
    assert skipped == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_versions_are_noticed(name):
    assert first_failure(COMMITTED, MUTATIONS[name], official_model) is not None


def test_a_recorded_tensor_that_nothing_is_compared_with_is_reported():
    results = [Result("case", name, 0.0, 0.0) for name in ("p2_slice", "masks: shape", "float64 loss64/mask")]
    recorded = ["image0", "gt_masks1", "info", "p2_slice", "p2_stats", "masks", "loss64/mask", "loss64/dice"]
    assert not_compared(recorded, results) == ["p2_stats", "loss64/dice"]
