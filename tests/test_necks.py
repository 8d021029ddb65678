"""BiFPN and multi-scale deformable attention, against slow references and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import make_batch, neck, tiny_config, tiny_model

from knet_d2.engine.optimizer import parameter_groups
from knet_d2.errors import ConfigError
from knet_d2.export import halve
from knet_d2.modeling.backbone.necks import (
    BiFPNLayer,
    DeformableAttention,
    FusionNode,
    Neck,
    as_maps,
    cell_centers,
    sample_values,
)

NECKS = {name: {**neck(name), "MODEL.NECK.NUM_LAYERS": 2} for name in ("BiFPN", "MSDeformAttn")}


# ---- deformable attention


def slow_sample(value, x, y):
    """One head's channels of a map [c, H, W] at (x, y) in pixels, where pixel i reaches from i to i + 1."""
    height, width = value.shape[1:]
    x, y = x - 0.5, y - 0.5
    left, top = (math.floor(position.item()) for position in (x, y))
    total = torch.zeros_like(value[:, 0, 0])
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                total = total + (1 - abs(x - column)) * (1 - abs(y - row)) * value[:, row, column]
    return total


def slow_attention(values, places, offsets, weights):
    """Deformable DETR, Eq. 3, one number of everything at a time."""
    batch, queries, heads, _, points, _ = offsets.shape
    channels = values[0].shape[1] // heads
    rows = []
    for b in range(batch):
        for q in range(queries):
            for a in range(heads):
                total = 0
                for level, value in enumerate(values):
                    height, width = value.shape[2:]
                    for p in range(points):
                        dx, dy = offsets[b, q, a, level, p]
                        x, y = places[q, 0] * width + dx, places[q, 1] * height + dy
                        read = slow_sample(value[b, a * channels : (a + 1) * channels], x, y)
                        total = total + weights[b, q, a, level, p] * read
                rows.append(total)
    return torch.stack(rows).view(batch, queries, -1)


def test_sampling_is_the_slow_loop_forward_and_backward():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    values = [random(2, 6, 4, 9), random(2, 6, 2, 5)]
    places = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    offsets = (3 * random(2, 5, 3, 2, 2, 2)).detach().requires_grad_()  # some leave the maps
    weights = random(2, 5, 3, 2, 2)
    inputs = [*values, offsets, weights]
    found, expected = (f(values, places, offsets, weights) for f in (sample_values, slow_attention))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * upstream).sum(), inputs) for x in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_offset_of_one_is_one_pixel_of_each_map_along_its_own_axis():
    """Divided by (H, W) instead of (W, H), it would be two pixels, or half of one, on a map of 8 x 16."""
    value = torch.arange(8.0 * 16).view(1, 1, 8, 16)
    places = cell_centers(value)
    assert places.shape == (128, 2) and places[17].tolist() == [1.5 / 16, 1.5 / 8]
    for dx, dy in [(0, 0), (1, 0), (0, 1), (-3, 2), (40, 0)]:
        offsets = torch.tensor([dx, dy]).float().expand(1, 128, 1, 1, 1, 2)
        found = sample_values([value], places, offsets, torch.ones(1, 128, 1, 1, 1)).view(8, 16)
        expected = torch.zeros(8, 16)  # outside of the map
        rows, columns = slice(max(0, -dy), 8 - max(0, dy)), slice(max(0, -dx), max(0, 16 - max(0, dx)))
        expected[rows, columns] = value[0, 0].roll((-dy, -dx), (0, 1))[rows, columns]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_attention_starts_with_one_direction_per_head_and_equal_weights():
    attention = DeformableAttention(16, 4, 2, 3)
    maps = [torch.randn(1, 16, 5, 7), torch.randn(1, 16, 3, 4)]
    sizes = [(5, 7), (3, 4)]
    tokens = torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(as_maps(tokens, sizes), maps, strict=True))
    offsets = attention.sampling_offsets(tokens[0, 0]).view(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    torch.testing.assert_close(offsets[:, 0], directions[:, None] * torch.tensor([1.0, 2, 3])[:, None])
    assert torch.equal(offsets[:, 0], offsets[:, 1])
    assert (attention.attention_weights(tokens) == 0).all()
    with torch.no_grad():
        attention.sampling_offsets.bias.zero_()  # all points of the two maps are at the place itself
        attention.value_projection.weight.copy_(torch.eye(16))
        attention.output_projection.weight.copy_(torch.eye(16))
        center = attention(tokens[:, :1], torch.tensor([[3.5 / 7, 2.5 / 5]]), tokens, sizes)
    coarse = (maps[1][..., 1, 1] + maps[1][..., 1, 2]) / 2
    torch.testing.assert_close(center[:, 0], (maps[0][..., 2, 3] + coarse) / 2)


def test_sampling_stays_in_full_precision_under_autocast():
    attention = DeformableAttention(16, 4, 1, 2)
    x = torch.randn(1, 16, 6, 200)
    tokens = x.flatten(2).transpose(1, 2)
    expected = attention(tokens, cell_centers(x), tokens, [(6, 200)])
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(tokens, cell_centers(x), tokens, [(6, 200)])
    assert torch.equal(found, expected)


def test_sampling_offsets_learn_at_a_tenth_of_the_rate():
    options = {**NECKS["MSDeformAttn"], "SOLVER.BASE_LR": 1.0, "SOLVER.BACKBONE_MULTIPLIER": 0.5}
    model = tiny_model("panoptic", options)
    rates = {id(p): x["lr"] for x in parameter_groups(tiny_config("panoptic", options), model) for p in x["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert {rate for name, rate in found.items() if ".sampling_offsets." in name} == {0.1}
    assert {rate for name, rate in found.items() if name.startswith("backbone.bottom_up.")} == {0.5}
    assert {rate for name, rate in found.items() if "offsets" not in name and "bottom_up" not in name} == {1.0}


# ---- BiFPN


def test_fusion_is_the_mean_by_weights_that_are_not_negative():
    node = FusionNode(3, 32, "GN")
    x, y, z = (torch.randn(1, 32, 3, 5) for _ in range(3))
    torch.testing.assert_close(node.fuse(x, x, x), x, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        node.weights.copy_(torch.tensor([3.0, 1.0, -2.0]))
    torch.testing.assert_close(node.fuse(x, y, z), (0.75 * x + 0.25 * y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [[(25, 13), (13, 7), (7, 4), (4, 2)], [(8, 12), (8, 12), (4, 6)], [(7, 10), (3, 5)]])
def test_bifpn_connects_the_maps_as_in_figure_3(sizes, monkeypatch):
    """Each node alone weighs its inputs; sizes are odd and halved up or down, or two maps have one stride."""
    monkeypatch.setattr(FusionNode, "forward", FusionNode.fuse)
    steps = [1 if a == b else 2 for a, b in zip(sizes, sizes[1:])]
    layer = BiFPNLayer(32, steps, "GN")
    with torch.no_grad():
        for i, node in enumerate([*layer.down, *layer.up]):
            node.weights.copy_(torch.rand(len(node.weights), generator=torch.Generator().manual_seed(i)) + 0.1)
    maps = [torch.randn(2, 32, *size) for size in sizes]

    def mean(node, *inputs):
        return sum(w * x for w, x in zip(node.weights, inputs, strict=True)) / (node.weights.sum() + 1e-4)

    last = len(maps) - 1
    middle = {last: maps[last]}
    for node, i in zip(layer.down, range(last - 1, -1, -1), strict=True):
        middle[i] = mean(node, maps[i], F.interpolate(middle[i + 1], sizes[i]))
    expected = [middle[0]]
    for i in range(1, last + 1):
        down = expected[-1] if steps[i - 1] == 1 else F.max_pool2d(expected[-1], 3, stride=2, padding=1)
        down = down[..., : sizes[i][0], : sizes[i][1]]
        inputs = (maps[i], down) if i == last else (maps[i], middle[i], down)
        expected.append(mean(layer.up[i - 1], *inputs))
    for a, b in zip(layer(maps), expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- in a model


@pytest.mark.parametrize("name", NECKS)
def test_a_neck_takes_the_place_of_the_fpn(name):
    plain, model = tiny_model("panoptic"), tiny_model("panoptic", NECKS[name])
    assert isinstance(model.backbone, Neck) and model.backbone.output_shape() == plain.backbone.output_shape()
    names = {x for x, _ in model.named_parameters()}
    assert {x for x, _ in plain.named_parameters() if "fpn_" not in x or "semantic" in x} <= names
    assert not any(x.startswith("backbone.fpn_") for x in names)
    assert model.size_divisibility == 32  # of the head
    # Each map depends on each feature of the backbone
    features = [x.detach().requires_grad_() for x in model.backbone.bottom_up(torch.rand(1, 3, 64, 96)).values()]
    maps = model.backbone.neck(features)
    for x, stride in zip(maps, (4, 8, 16, 32), strict=True):
        assert x.shape == (1, 32, 64 // stride, 96 // stride)
        gradients = torch.autograd.grad(x.square().sum(), features, retain_graph=True, allow_unused=True)
        reached = [g is not None and bool(g.abs().sum() > 0) for g in gradients]
        assert reached == [name == "BiFPN" or stride == 4, True, True, True]  # the encoder does not read res2


@pytest.mark.parametrize("name", NECKS)
def test_a_neck_computes_in_half_precision(name):
    model = tiny_model("semantic", NECKS[name]).eval()
    with torch.no_grad():
        maps = list(model.backbone.bottom_up(torch.rand(1, 3, 64, 160)).values())
        expected = model.backbone.neck(maps)
        found = halve(model).backbone.neck([x.half() for x in maps])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NECKS)
def test_a_neck_behind_a_backbone_without_an_fpn_keeps_its_names(name):
    model = tiny_model("semantic", NECKS[name])
    assert {key: (x.channels, x.stride) for key, x in model.backbone.output_shape().items()} == {
        "res3": (32, 8),
        "res4": (32, 16),
    }
    assert model.size_divisibility == tiny_model("semantic").size_divisibility < 2
    assert all(x.isfinite() for x in model.train()(make_batch([2, 1])).values())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"MODEL.NECK.NAME": "PAFPN"}, r"MODEL\.NECK\.NAME = 'PAFPN': use one of \['FPN', 'BiFPN', 'MSDeformAttn'\]"),
        ({**NECKS["BiFPN"], "MODEL.NECK.NUM_LAYERS": 0}, r"MODEL\.NECK\.NUM_LAYERS = 0: use at least 1"),
        ({**NECKS["MSDeformAttn"], "MODEL.NECK.NUM_HEADS": 5}, r"MODEL\.NECK\.NUM_HEADS = 5: use a divisor .* 32"),
    ],
)
def test_wrong_options_are_named(options, what):
    with pytest.raises(ConfigError, match=what):
        tiny_model("panoptic", options)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("BiFPN", "NUM_LAYERS", 3),
        ("BiFPN", "NORM", "BN"),
        ("MSDeformAttn", "NUM_HEADS", 4),
        ("MSDeformAttn", "NUM_POINTS", 2),
        ("MSDeformAttn", "FFN_DIM", 24),
    ],
)
def test_options_change_the_neck(name, option, value):
    shapes = [
        {
            key: tuple(p.shape)
            for key, p in tiny_model("instance", {**NECKS[name], **more}).backbone.state_dict().items()
        }
        for more in ({}, {f"MODEL.NECK.{option}": value})
    ]
    assert shapes[0] != shapes[1]
