"""The whole model in double precision beside a second one, written plainly: any batch, size and number of kernels."""

import pytest
import torch
import torch.nn.functional as F
from helpers import IGNORE, make_example, tiny_model
from official_layout import official_state_dict
from plain_knet import PlainKNet, bilinear

from knet_d2.modeling.layers import channels_last  # the backbone rounds as in the model

SIZES = [(61, 83), (97, 50), (64, 64)]
OUTPUTS = [(68, 80), (97, 50), (31, 129)]


def double_model(task, options, seed=0):
    """A model without a default value in it, and its parameters by the official names."""
    model = tiny_model(task, options).double()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            scale = 1.3 / value[0].numel() ** 0.5 if value.dim() > 1 else 0.1
            value.copy_(scale * noise + (value.dim() == 1 and name.endswith(("weight", "var"))))
    return model, official_state_dict(model.state_dict(keep_vars=True))


def make_batch(counts, ignored=False):
    batch = [make_example(size, n, seed=i) for i, (size, n) in enumerate(zip(SIZES, counts))]
    for x, (height, width) in zip(batch, OUTPUTS):
        x.update(height=height, width=width)
        if ignored:
            x["sem_seg"].fill_(IGNORE)
    return batch


def assert_same_losses_and_gradients(model, losses, expected):
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=1e-12, abs=1e-14), name
    parameters = [p for name, p in model.named_parameters() if not name.startswith("backbone.bottom_up")]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    ours, theirs = (torch.autograd.grad(sum(terms.values()), parameters, **options) for terms in (losses, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()) + 1e-15)


@pytest.mark.parametrize(
    "task, num_kernels, num_stages, counts, ignored",
    [
        ("instance", 5, 2, [4, 0, 9], False),  # fewer kernels than instances
        ("instance", 2, 1, [0, 0], False),  # fewer than classes, nobody there
        ("panoptic", 19, 4, [4, 0, 9], False),
        ("panoptic", 1, 2, [0, 2], False),
        ("panoptic", 7, 1, [0, 0], True),
    ],
)
def test_detection(task, num_kernels, num_stages, counts, ignored):
    options = {"MODEL.KNET.NUM_KERNELS": num_kernels, "MODEL.KNET.NUM_STAGES": num_stages}
    options["TEST.DETECTIONS_PER_IMAGE"] = num_kernels
    model, weights = double_model(task, options)
    plain = PlainKNet(weights, 3, 2 if task == "panoptic" else 0, num_stages, num_heads=4)
    batch = make_batch(counts, ignored)
    padded = [-(-max(size) // 32) * 32 for size in zip(*SIZES[: len(counts)])]
    model.train()
    images = model.preprocess_image(batch)
    assert list(images.tensor.shape[-2:]) == padded
    levels = model.backbone(channels_last(images.tensor))
    levels = [levels[f"p{i}"] for i in (2, 3, 4, 5)]
    assert_same_losses_and_gradients(model, model(batch), plain.losses(levels, batch, padded))

    model.eval()
    with torch.no_grad():
        levels = model.backbone(channels_last(images.tensor))
        levels = [levels[f"p{i}"] for i in (2, 3, 4, 5)]
        expected = plain.results(levels, padded, SIZES, OUTPUTS)
        for result, theirs in zip(model(batch), expected, strict=True):
            if task == "instance":
                instances = result["instances"]
                assert instances.scores.tolist() == pytest.approx([score for score, _, _ in theirs], rel=1e-12)
                assert instances.pred_classes.tolist() == [c for _, c, _ in theirs]
                assert torch.equal(instances.pred_masks, torch.stack([mask for _, _, mask in theirs]))
            else:
                segment_map, segments = result["panoptic_seg"]
                assert torch.equal(segment_map.long(), theirs[0])
                assert [s["area"] for s in segments] == [area for _, _, area in theirs[1]]
                assert [s["isthing"] for s in segments] == [c < 3 for c, _, _ in theirs[1]]
                assert [s["score"] for s in segments] == pytest.approx([score for _, score, _ in theirs[1]], rel=1e-12)


@pytest.mark.parametrize("num_stages, ignored", [(3, False), (1, True)])
def test_semantic(num_stages, ignored):
    """Kernels of twice the update's width; images of several sizes, in training padded together, else alone."""
    options = {"MODEL.KNET.NUM_STAGES": num_stages, "MODEL.KNET.UPDATE_HEAD.FEATURE_DIM": 16}
    options.update({"MODEL.KNET.DROPOUT": 0.0, "MODEL.KNET.LOSS.AUXILIARY_WEIGHT": 0.0})
    model, weights = double_model("semantic", options)
    plain, batch = PlainKNet(weights, 0, 5, num_stages, num_heads=4), make_batch([0, 0, 0], ignored)
    model.train()
    images = model.preprocess_image(batch)
    state = model.sem_seg_head(model.backbone(channels_last(images.tensor)))
    labels = [F.pad(x["sem_seg"], (0, 83 - w, 0, 97 - h), value=IGNORE) for x, (h, w) in zip(batch, SIZES)]
    labels, expected = torch.stack(labels), {}
    for i, logits in enumerate(plain.semantic_logits(state.feature, state.mask_logits)):
        logits = bilinear(logits, (97, 83))
        own = logits.gather(1, torch.where(labels == IGNORE, 0, labels)[:, None])[:, 0] - logits.logsumexp(1)
        expected[f"loss_rank_s{i}"] = -(own * (labels != IGNORE)).mean()
    assert_same_losses_and_gradients(model, model(batch), expected)

    model.eval()
    with torch.no_grad():
        for x, result in zip(batch, model(batch), strict=True):
            state = model.sem_seg_head(model.backbone(model.preprocess_image([x]).tensor))
            logits = plain.semantic_logits(state.feature, state.mask_logits)[-1]
            logits = bilinear(bilinear(logits, x["image"].shape[1:]), (x["height"], x["width"]))[0]
            torch.testing.assert_close(result["sem_seg"], logits, rtol=1e-9, atol=1e-10)
