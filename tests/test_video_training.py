"""Learning to follow objects: losses, pairs of frames, memory, and that image models stay as they are."""

import json
import math
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from data_helpers import custom_entry, data_cfg
from helpers import make_example, spread_scores, tiny_config, tiny_model
from toys import assert_identical

from checks.video import TrackingKernels
from knet_d2.checkpoint import Checkpointer
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data import build as data_build
from knet_d2.data import build_train_loader
from knet_d2.data.frame_pairs import FramePairs
from knet_d2.engine import Trainer
from knet_d2.engine.dump import load_batch, save_batch
from knet_d2.errors import CheckpointError, ConfigError, DataError
from knet_d2.modeling.association import VideoKernels, network_of_pairs
from knet_d2.modeling.losses import contrastive_loss, cosine_loss
from knet_d2.modeling.structures import KernelMemory, Targets
from knet_d2.tasks import TASKS
from knet_d2.video.model import TrackingKNet
from knet_d2.video.moving_shapes import write_moving_shapes

KAE = {"MODEL.KNET.VIDEO.EMBEDDING": True, "MODEL.KNET.VIDEO.EMBEDDING_DIM": 16}
KL = {**KAE, "MODEL.KNET.VIDEO.LINKING": True}
KF = {"MODEL.KNET.VIDEO.FUSING": True}
ALL = {**KL, **KF}
LOSSES = {"loss_track_contrast", "loss_track_cosine"}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- losses ----------------------------------------------------------------------------------------------------


def test_contrastive_loss_of_known_dot_products():
    """Dot products 3, 1, 0 of a thing with its match and two others: log(1 + e^-2 + e^-3); a thing alone counts not."""
    key = torch.tensor([[1.0, 0], [0, 1.0]], dtype=torch.float64)
    reference = torch.tensor([[3.0, 9], [1, 9], [0, 9]], dtype=torch.float64)
    same = torch.tensor([[True, False, False], [False, False, False]])
    total, number = contrastive_loss(key, reference, same)
    assert float(total) == pytest.approx(math.log(1 + math.exp(-2) + math.exp(-3)), abs=1e-12) and number == 1


def test_contrastive_loss_against_sums():
    """Also with several positives, which nothing forbids."""
    key, reference = random(4, 3), random(5, 3, seed=1)
    same = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) < 0.4
    expected = number = 0
    for i in range(4):
        dots = [float(key[i] @ x) for x in reference]
        positives = [dots[j] for j in range(5) if same[i, j]]
        negatives = [dots[j] for j in range(5) if not same[i, j]]
        number += bool(positives)
        expected += math.log(1 + sum(math.exp(n - p) for n in negatives for p in positives))
    total, count = contrastive_loss(key, reference, same)
    assert float(total) == pytest.approx(expected, abs=1e-12) and count == number > 1


def test_contrastive_loss_is_finite_for_large_dot_products():
    key = torch.tensor([[1e3, 0.0]], requires_grad=True)
    total, _ = contrastive_loss(key, torch.tensor([[0.0, 0], [1e3, 0]]), torch.tensor([[True, False]]))
    total.backward()
    assert float(total.detach()) == pytest.approx(1e6) and key.grad.isfinite().all()


def unit(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_cosine_loss_takes_the_hardest_negatives():
    """One positive of 60 degrees (cosine 0.5), so three of the negatives: those of the largest cosines, minus 0.1."""
    key, reference = unit(0), 7 * unit(60, 10, 20, 30, 40, 180)
    same = torch.tensor([[True, False, False, False, False, False]])
    total, number = cosine_loss(key, reference, same)
    cosines = [math.cos(math.radians(x)) - 0.1 for x in (10, 20, 30)]
    assert float(total) == pytest.approx(0.25 + sum(x * x for x in cosines), abs=1e-12) and number == 4
    # Fewer negatives than are asked for; those below the margin count as 0
    total, number = cosine_loss(key, unit(60, 90), same[:, :2])
    assert float(total) == pytest.approx(0.25, abs=1e-12) and number == 2


@pytest.mark.parametrize("loss", [contrastive_loss, cosine_loss])
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (4, 0), (2, 4)])
def test_nothing_to_compare_is_an_attached_zero(loss, shape):
    """Frames without things; and things without a match, whose 8 pairs are all negatives."""
    key, reference = (random(n, 3, seed=n).requires_grad_() for n in shape)
    total, number = loss(key, reference, torch.zeros(shape, dtype=torch.bool))
    total.backward()
    assert total == 0 and number == 0 and (key.grad == 0).all() and (reference.grad == 0).all()


def video_kernels(weights=(0.25, 1.0), dim=8, seed=0, **switches):
    torch.manual_seed(seed)
    bank = TASKS["instance"].bank(num_matched=4, num_things=2, num_stuff=0)
    arguments = {"embedding_dim": 6, "linking": False, "fusing": False, **switches}
    return VideoKernels(
        bank, dim=dim, interaction={"num_heads": 2, "ffn_dim": 12}, update_dim=dim, loss_weights=weights, **arguments
    )


def targets_of(*track_ids):
    none = torch.zeros(0)
    return [Targets(none, none, none, none, track_ids=torch.tensor(ids, dtype=torch.int64)) for ids in track_ids]


def matches_of(*kernels_and_instances):
    return [(torch.tensor(k, dtype=torch.int64), torch.tensor(i, dtype=torch.int64)) for k, i in kernels_and_instances]


def test_losses_are_of_matched_kernels_of_each_pair():
    """Two pairs; a thing is the same one if its track is; means are over the things of all pairs."""
    embeddings = random(4, 4, 6)
    matches = matches_of(([0, 2], [1, 0]), ([3], [0]), ([1, 3], [0, 1]), ([0], [0]))
    targets = targets_of([7, 9], [5], [9, 8], [6])
    found = video_kernels().losses(embeddings, matches, targets)
    keys, references = embeddings[0][[0, 2]], embeddings[2][[1, 3]]  # tracks 9 and 7; 9 and 8
    same = torch.tensor([[True, False], [False, False]])
    contrast, cosine = contrastive_loss(keys, references, same), cosine_loss(keys, references, same)
    assert set(found) == LOSSES
    for name, weight, (total, number) in zip(sorted(LOSSES), (0.25, 1.0), (contrast, cosine)):
        value, count = found[name]
        assert float(value) == pytest.approx(weight * float(total) / int(number)) and count == number
    # Other numbers for the tracks, and another order of the instances, change nothing
    again = video_kernels().losses(
        embeddings,
        matches_of(([0, 2], [0, 1]), ([3], [0]), ([1, 3], [1, 0]), ([0], [0])),
        targets_of([90, 70], [50], [80, 90], [60]),
    )
    assert {k: float(v[0]) for k, v in again.items()} == {k: float(v[0]) for k, v in found.items()}


def test_weights_of_the_losses():
    arguments = random(2, 4, 6), matches_of(([0, 1], [0, 1]), ([0, 1], [0, 1])), targets_of([1, 2], [1, 2])
    base, other = video_kernels().losses(*arguments), video_kernels((0.5, 3.0)).losses(*arguments)
    factors = [float(other[k][0] / base[k][0]) for k in sorted(LOSSES)]
    assert factors == pytest.approx([2.0, 3.0])


# ---- the model -------------------------------------------------------------------------------------------------


def example(count, seed, tracks=None):
    found = make_example((64, 64), count, seed=seed)
    found["instances"].gt_track_ids = torch.arange(count) if tracks is None else torch.tensor(tracks)
    return found


def pairs(*counts):
    """Examples with a reference frame: (instances of the key frame, instances of the reference frame) each."""
    return [{**example(a, 2 * i), "reference": example(b, 2 * i + 1)} for i, (a, b) in enumerate(counts)]


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_switched_off_there_is_nothing(task):
    """The parameters of an image model are the same ones, and so are results without a memory, but for fusing."""
    image = tiny_model(task)
    assert image.video is None and not any(name.startswith("video.") for name in image.state_dict())
    for options, is_equal in ((KAE, True), (KL, True), (KF, False)):
        model = tiny_model(task, options)
        new = {name for name in model.state_dict() if name not in image.state_dict()}
        assert new and all(name.startswith("video.") for name in new)
        model.load_state_dict(image.state_dict(), strict=False)
        first, second = (x.eval()([example(1, 0)], do_postprocess=False)[0] for x in (image, model))
        assert torch.equal(first.mask_logits, second.mask_logits) is is_equal
        assert torch.equal(first.class_logits, second.class_logits) is is_equal


@pytest.mark.parametrize("task", ["instance", "panoptic"])
@pytest.mark.parametrize("options", [KAE, KL, KF, ALL], ids=["KAE", "KL", "KF", "all"])
def test_every_parameter_learns(task, options):
    """Also from frames without a thing; both frames have all of K-Net's losses."""
    model = tiny_model(task, options)
    for batch in (pairs((2, 3), (1, 0)), pairs((0, 0)), pairs((0, 2))):
        model.zero_grad()
        losses = model(batch)
        sum(losses.values()).backward()
        assert (LOSSES <= set(losses)) is (options is not KF)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    plain = tiny_model(task)
    frames = [x for x in pairs((2, 3))] + [pairs((2, 3))[0]["reference"]]
    if options is KAE:
        plain.load_state_dict(model.state_dict(), strict=False)
        expected, found = plain.eval().train()(frames), model(pairs((2, 3)))
        assert set(found) - set(expected) == LOSSES


def test_pairs_have_the_losses_of_both_frames():
    """Without batch statistics, a model whose embeddings cost nothing has the losses of an image model."""
    options = {"MODEL.RESNETS.NORM": "EvalBN"}
    image, model = tiny_model("panoptic", options), tiny_model("panoptic", {**options, **KAE})
    model.load_state_dict(image.state_dict(), strict=False)
    batch = pairs((2, 3), (1, 0))
    expected = image([*batch, *(x["reference"] for x in batch)])
    found = model(batch)
    assert set(found) == set(expected) | LOSSES
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name


@torch.no_grad()
@pytest.mark.parametrize("head", ["SemanticFPNKernelHead", "ImageKernelHead"])
def test_key_frames_remember_their_reference_frames(head):
    """As two frames of a video: the reference frame first, then the key frame with its kernels."""
    weight = 1.0 if head == "ImageKernelHead" else 0.0
    options = {"MODEL.SEM_SEG_HEAD.NAME": head, "MODEL.KNET.LOSS.CENTER_WEIGHT": weight}
    model = tiny_model("panoptic", {**ALL, **options}).eval()
    images = torch.stack([example(1, i)["image"].float() / 255 for i in range(4)])
    sizes = torch.tensor([[64, 64]] * 4)
    found = network_of_pairs(model, images, sizes)
    references = model.network(images[2:], sizes[2:])
    keys = model.network(images[:2], sizes[:2], KernelMemory.of_frame(references.stages[-1].kernels))
    for part, rows in ((keys, slice(0, 2)), (references, slice(2, 4))):
        torch.testing.assert_close(found.embeddings[rows], part.embeddings, rtol=0, atol=0)
        torch.testing.assert_close(found.stages[-1].mask_logits[rows], part.stages[-1].mask_logits, rtol=0, atol=0)
    for state in (found.state, references.state):
        assert (state.places is not None) == (head == "ImageKernelHead")
    if found.state.places is not None:
        assert torch.equal(found.state.places.cells[2:], references.state.places.cells)
    alone = model.network(images[:2], sizes[:2])
    assert not torch.equal(alone.embeddings, keys.embeddings)
    # Only the last stage knows of the frame before
    assert torch.equal(alone.stages[-2].mask_logits, keys.stages[-2].mask_logits)
    assert not torch.equal(alone.stages[-1].mask_logits, keys.stages[-1].mask_logits)


@torch.no_grad()
@pytest.mark.parametrize("options", [KL, KF], ids=["KL", "KF"])
def test_frames_without_a_memory_stand_in_for_it(options):
    """One image of a batch may have a memory and the other none."""
    model = tiny_model("panoptic", options).eval()
    images = torch.stack([example(1, i)["image"].float() / 255 for i in range(2)])
    memory = KernelMemory(random(2, model.bank.num_kernels, 32).float(), torch.tensor([False, True]))
    mixed, none = model.network(images, None, memory), model.network(images)
    every = model.network(images, None, memory._replace(known=torch.tensor([True, True])))

    def outcome(output):
        return output.stages[-1].mask_logits if output.embeddings is None else output.embeddings

    assert torch.equal(outcome(mixed)[0], outcome(none)[0]) and not torch.equal(outcome(every)[0], outcome(none)[0])
    assert torch.equal(outcome(mixed)[1], outcome(every)[1])


@torch.no_grad()
def test_fusing_replaces_the_input_of_the_last_stage():
    model = tiny_model("instance", KF).eval()
    images = example(1, 0)["image"][None].float() / 255
    previous = random(1, 6, 32).float()
    output = model.network(images, None, KernelMemory.of_frame(previous))
    feature, before, last = output.state.feature, output.stages[-2], model.cascade.stages[-1]
    group_features = last.gather(feature, before.mask_logits)
    fused = model.video.fusing.interaction(model.video.fusing.kernel_update(group_features, previous))
    torch.testing.assert_close(output.stages[-1].kernels, last(feature, fused, before.mask_logits).kernels)


@torch.no_grad()
def test_a_video_is_followed_with_its_memory():
    """Frames of one call are those of several; another video, and an image, do not see the memory."""
    options = {**ALL, "MODEL.KNET.VIDEO.TEMPERATURE": 1e-4, "MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0}
    model = spread_scores(tiny_model("instance", options)).eval()
    frames = [{"image": example(1, i)["image"], "video_id": v} for i, v in ((0, 0), (1, 0), (0, 1), (1, 1))]

    def follow(*batches):
        tracking = TrackingKNet(tiny_config("instance", options), model)
        found = [x["instances"] for batch in batches for x in tracking(batch)]
        return [(x.track_ids.tolist(), x.scores.tolist()) for x in found]

    whole = follow(frames)
    assert whole == follow(*([x] for x in frames)) and whole[:2] == whole[2:] and whole[0] != whole[1]
    image = {"image": frames[1]["image"]}
    tracking = TrackingKNet(tiny_config("instance", options), model)
    tracking([frames[0]])
    plain = model([image])[0]["instances"]
    assert torch.equal(tracking([image])[0]["instances"].scores, plain.scores)
    assert sorted(whole[1][1]) != sorted(plain.scores[plain.scores > 0.35].tolist())


@torch.no_grad()
def test_objects_are_followed_by_their_embeddings():
    model = spread_scores(tiny_model("panoptic", {**KAE, "MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0})).eval()
    (logits,) = model([example(1, 0)], do_postprocess=False)
    output = model.network(model.preprocess_image([example(1, 0)]).tensor)
    expected = model.video.embedding(output.stages[-1].kernels[0, :6])
    torch.testing.assert_close(logits.embeddings[:6], expected)
    assert logits.embeddings.shape == (8, 16) and (logits.embeddings[6:] == 0).all()
    torch.testing.assert_close(logits.kernels, output.stages[-1].kernels[0])


@torch.no_grad()
def test_kernels_of_a_model_with_embeddings_follow_as_those_of_an_image_model():
    """What checks.video compares the embeddings with; the embeddings themselves give other ids."""
    options = {"MODEL.KNET.VIDEO.TEMPERATURE": 1e-3, "MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0}
    image, model = spread_scores(tiny_model("panoptic", options)), tiny_model("panoptic", {**options, **KAE})
    model.load_state_dict(image.state_dict(), strict=False)
    frames = [{"image": example(2, i)["image"], "video_id": 0} for i in range(4)]

    def ids_of(tracking):
        return [[x["track_id"] for x in result["panoptic_seg"][1]] for result in tracking(frames)]

    cfg = tiny_config("panoptic", {**options, **KAE})
    expected = ids_of(TrackingKNet(cfg, image.eval()))
    assert ids_of(TrackingKernels(cfg, model.eval())) == expected != ids_of(TrackingKNet(cfg, model))


def test_references_for_some_examples_only_are_an_error():
    batch = pairs((1, 1), (1, 1))
    del batch[1]["reference"]
    with pytest.raises(DataError, match="has no 'reference'"):
        tiny_model("panoptic", KAE)(batch)
    batch = pairs((1, 1))
    batch[0]["instances"].remove("gt_track_ids")
    with pytest.raises(DataError, match="track_ids"):
        tiny_model("panoptic", KAE)(batch)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("semantic", {"EMBEDDING": True}, "EMBEDDING = True: a semantic model"),
        ("panoptic", {"LINKING": True}, "LINKING = True: it changes embeddings only"),
        ("panoptic", {"EMBEDDING": True, "EMBEDDING_DIM": 0}, "EMBEDDING_DIM = 0: use"),
        ("panoptic", {"EMBEDDING": True, "REFERENCE_RANGE": 0}, "REFERENCE_RANGE = 0: use"),
        ("panoptic", {"EMBEDDING": True, "COSINE_WEIGHT": -1.0}, "COSINE_WEIGHT = -1.0: use"),
        ("panoptic", {"EMBEDDING": True, "CONTRAST_WEIGHT": 0.0, "COSINE_WEIGHT": 0.0}, "one above 0"),
    ],
)
def test_bad_options(task, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_model(task, {f"MODEL.KNET.VIDEO.{key}": value for key, value in options.items()})


def test_training_starts_from_an_image_model(tmp_path):
    """New parameters are named; a prediction needs all of them."""
    image, path = tiny_model("panoptic", seed=1), str(tmp_path / "image.pth")
    save_weights(path, image.state_dict(), {})
    model = tiny_model("panoptic", ALL, seed=2)
    checkpointer = Checkpointer(model, partial=True)
    checkpointer.load(path)
    missing = set(checkpointer.report.missing)
    assert missing and missing == {name for name in model.state_dict() if name.startswith("video.")}
    assert "re-initialised: not in the file" in checkpointer.report.as_text()
    assert torch.equal(model.cascade.stages[0].mask_branch[0].weight, image.cascade.stages[0].mask_branch[0].weight)
    with pytest.raises(CheckpointError, match="video."):
        Checkpointer(tiny_model("panoptic", ALL)).load(path)


# ---- pairs of frames -------------------------------------------------------------------------------------------


def records_of(*lengths):
    return [
        {"file_name": f"{v}/{i}.jpg", "video_id": v, "image_id": i} for v, n in enumerate(lengths) for i in range(n)
    ]


def test_reference_frames_are_close_and_of_the_same_video():
    """All of -2, -1, 1 and 2 are drawn as often, and none beyond the ends of a video."""
    records = records_of(7, 1, 2)
    chosen = FramePairs(records, 2)
    np.random.seed(0)
    offsets = [chosen.draw(3) - 3 for _ in range(4000)]
    assert {x: abs(offsets.count(x) - 1000) < 100 for x in (-2, -1, 1, 2)} == dict.fromkeys((-2, -1, 1, 2), True)
    assert {chosen.draw(0) for _ in range(50)} == {1, 2} and {chosen.draw(6) for _ in range(50)} == {4, 5}
    assert chosen.draw(7) == 7  # alone in its video
    assert {chosen.draw(8) for _ in range(50)} == {9}
    # Videos of two data sets with the same id
    twice = [*records_of(2), *({**x, "file_name": f"b/{x['file_name']}"} for x in records_of(2))]
    assert {FramePairs(twice, 2).draw(1) for _ in range(20)} == {0}
    with pytest.raises(ConfigError, match=r"DATASETS.TRAIN: a.jpg is of no video"):
        FramePairs([*records, {"file_name": "a.jpg"}], 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("moving_shapes"))
    write_moving_shapes(folder, 3, seed=5, num_frames=5, size=64)
    return folder


def train_cfg(root, kind="video_panoptic", task="panoptic", **changes):
    cfg = data_cfg(task, custom=(custom_entry(kind, root, **changes),))
    cfg.MODEL.KNET.VIDEO.EMBEDDING = True
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = 2, 3, 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    return cfg


def batches(cfg, count, start=0):
    return list(islice(build_train_loader(cfg, start_iter=start), count))


def summary(batch):
    """What tells the pairs of a batch apart: files, sums of pixels, tracks."""
    return [
        (y["file_name"], int(y["image"].long().sum()), y["ground_truth"].track_ids.tolist())
        for x in batch
        for y in (x, x["reference"])
    ]


@pytest.mark.parametrize(
    ("kind", "task"), [("video_panoptic", "panoptic"), ("youtube_vis", "instance"), ("kitti_step", "panoptic")]
)
def test_pairs_of_every_format(root, kind, task):
    """Tracks are the same numbers in both frames of most pairs, and one number for each instance."""
    shared = 0
    for batch in batches(train_cfg(root, kind, task), 4):
        for x in batch:
            key, other = x["ground_truth"], x["reference"]["ground_truth"]
            assert x["video_id"] == x["reference"]["video_id"] and x["file_name"] != x["reference"]["file_name"]
            for truth in (key, other):
                assert len(truth.track_ids) == len(truth.classes) == len(set(truth.track_ids.tolist()))
            both = {*key.track_ids.tolist()} & {*other.track_ids.tolist()}
            shared += len(both)
            classes = [dict(zip(y.track_ids.tolist(), y.classes.tolist())) for y in (key, other)]
            assert all(classes[0][i] == classes[1][i] for i in both)
    assert shared > 5


def test_pairs_are_a_function_of_seed_and_iteration(root, monkeypatch):
    """They do not depend on where a run is resumed, on the number of workers, or on that of processes."""
    cfg = train_cfg(root)
    whole = [summary(x) for x in batches(cfg, 4)]
    assert len({str(x) for x in whole}) == 4
    assert [summary(x) for x in batches(cfg, 2, start=2)] == whole[2:]
    cfg.DATALOADER.NUM_WORKERS = 1
    assert [summary(x) for x in batches(cfg, 2)] == whole[:2]
    cfg.DATALOADER.NUM_WORKERS = 0
    monkeypatch.setattr(data_build.comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(data_build.comm, "get_rank", lambda rank=rank: rank)
        assert [summary(x) for x in batches(cfg, 2)] == [x[2 * rank : 2 * rank + 2] for x in whole[:2]]


def test_both_frames_have_the_same_augmentation(root, monkeypatch):
    """Of a frame that is its own reference frame, image and masks are equal, whatever flip and crop were drawn."""
    monkeypatch.setattr(FramePairs, "draw", lambda self, index: index)
    cfg = train_cfg(root)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "relative_range", [0.4, 0.4]
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 80, 96)
    shapes = set()
    for batch in batches(cfg, 4):
        for x in batch:
            assert torch.equal(x["image"], x["reference"]["image"])
            assert torch.equal(x["ground_truth"].packed_masks, x["reference"]["ground_truth"].packed_masks)
            shapes.add(x["image"].shape)
    assert len(shapes) > 3


def test_image_models_get_no_pairs(root):
    cfg = train_cfg(root)
    cfg.MODEL.KNET.VIDEO.EMBEDDING = False
    assert all("reference" not in x for x in batches(cfg, 1)[0])


def test_a_kept_batch_has_its_reference_frames(root, tmp_path):
    batch = batches(train_cfg(root), 1)[0]
    save_batch(str(tmp_path / "batch.pth"), batch)
    assert summary(load_batch(str(tmp_path / "batch.pth"))) == summary(batch)


def test_a_resumed_run_ends_as_an_uninterrupted_one(root, tmp_path):
    """From an image model's weights, with all three switches, exact to the bit; then it is evaluated as any model."""
    name = train_cfg(root).DATASETS.TRAIN[0]
    size = {"MODEL.KNET.NUM_THING_CLASSES": 4, "MODEL.KNET.NUM_STUFF_CLASSES": 3}
    save_weights(str(tmp_path / "image.pth"), tiny_model("panoptic", size).state_dict(), {})

    def run(folder, resume):
        cfg = tiny_config("panoptic", {**size, **ALL, "MODEL.WEIGHTS": str(tmp_path / "image.pth")})
        cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR, cfg.SEED, cfg.TEST.EVAL_PERIOD = (name,), str(folder), 3, 0
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.LOG_PERIOD = 2, 4, 2, 1
        cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TRAIN, cfg.DATALOADER.NUM_WORKERS = "RGB", (48, 64), 0
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        lines = (folder / "metrics.json").read_text().splitlines()
        return trainer, [json.loads(x) for x in lines], torch.load(folder / "model_final.pth", weights_only=True)

    trainer, metrics, whole = run(tmp_path / "whole", resume=False)
    assert all(set(x) >= LOSSES for x in metrics) and trainer.checkpointer.report.missing
    (tmp_path / "part").mkdir()
    for file in ("model_0000001.pth", "metrics.json"):
        shutil.copy(tmp_path / "whole" / file, tmp_path / "part")
    (tmp_path / "part" / "last_checkpoint").write_text("model_0000001.pth")
    resumed, again, part = run(tmp_path / "part", resume=True)
    assert resumed.start_iter == 2 and again == metrics
    assert_identical(whole["model"], part["model"])
    cfg = resumed.cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = (name,)
    results = Trainer.test(cfg, resumed.model)
    assert 0 <= results["video_panoptic"]["STQ"] < 60


# ---- learning --------------------------------------------------------------------------------------------------


def test_embeddings_learn_what_an_object_is():
    """Kernels that say more about the place than about the object: cosines of kernels fail, embeddings learn to tell.

    Objects of the test are none of those that were learned from.
    """
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 16, generator=generator)

    def frames(count):
        """Kernels of 4 objects in two frames: 8 numbers of the object, 8 of its place, which is another one each."""
        objects = torch.randn(count, 4, 8, generator=generator)
        places = 3 * torch.randn(2, count, 4, 8, generator=generator)
        return [torch.cat([objects, place], dim=-1) @ mixing for place in places]

    def share_found(first, second):
        cosines = torch.nn.functional.normalize(first, dim=-1) @ torch.nn.functional.normalize(second, dim=-1).mT
        return float((cosines.argmax(dim=-1) == torch.arange(4)).float().mean())

    model = video_kernels(dim=16, embedding_dim=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    matches = matches_of(*[([0, 1, 2, 3], [0, 1, 2, 3])] * 64)
    targets = targets_of(*[[0, 1, 2, 3]] * 64)
    for _ in range(250):
        losses = model.losses(model.embedding(torch.cat(frames(32))), matches, targets)
        optimizer.zero_grad()
        sum(value for value, _ in losses.values()).backward()
        optimizer.step()
    first, second = frames(500)
    with torch.no_grad():
        before, after = share_found(first, second), share_found(model.embedding(first), model.embedding(second))
    assert before < 0.5 and after > 0.85, (before, after)
