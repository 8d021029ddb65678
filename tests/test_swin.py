"""Swin against torchvision, a slow reference and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from backbone_helpers import RES, TINY_SWIN, build, relative_error
from detectron2.layers import ShapeSpec
from torch import nn

from knet_d2.checkpoint.key_table import translate_state_dict
from knet_d2.checkpoint.openmmlab_backbones import merging_from_swin_release, pretrained_backbone_rules
from knet_d2.errors import ConfigError
from knet_d2.modeling.backbone.swin import SwinBlock, SwinTransformer, relative_position_index, shifted_window_mask


def swin_release_layout(state_dict):
    """torchvision's Swin state dict in the keys of the Swin release; both have the same order of tensors' elements."""
    renamed = {}
    for key, value in state_dict.items():
        part, _, rest = key.partition(".")
        if part != "features":
            renamed[key] = value
            continue
        index, _, rest = rest.partition(".")
        if index == "0":
            part, _, rest = rest.partition(".")
            renamed[f"patch_embed.{ {'0': 'proj', '2': 'norm'}[part] }.{rest}"] = value
        elif int(index) % 2:
            rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            renamed[f"layers.{int(index) // 2}.blocks.{rest}"] = value
        else:
            renamed[f"layers.{int(index) // 2 - 1}.downsample.{rest}"] = value
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return renamed


def test_swin_equals_torchvision_through_the_release_layout():
    """At a size where no map fits into one window, where torchvision does not shift."""
    settings = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}
    theirs = torchvision.models.SwinTransformer(
        patch_size=[4, 4], window_size=[7, 7], stochastic_depth_prob=0.0, num_classes=3, **settings
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    ours = SwinTransformer(**settings).eval()
    release = swin_release_layout(theirs.state_dict())
    translation = translate_state_dict(release, pretrained_backbone_rules(release, "")[1], ours.state_dict().keys())
    assert translation.unknown == []
    assert {"head.weight", "norm.bias", "layers.0.blocks.1.attn_mask"} < set(translation.ignored)
    incompatible = ours.load_state_dict(translation.state_dict, strict=False)
    assert incompatible.unexpected_keys == [] and all(k.startswith("out_norms") for k in incompatible.missing_keys)
    image = torch.rand(2, 3, 236, 260)
    with torch.no_grad():
        features, x = ours(image), image
        for i, layer in enumerate(theirs.features):
            x = layer(x)
            if i % 2:
                expected = F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)
                assert relative_error(features[RES[i // 2]], expected) < 2e-5, i


def test_merging_permutation_by_hand():
    release = ["00", "10", "01", "11"]  # (y, x) of the release's four blocks of channels
    channels, columns = 3, []
    for block in release:
        columns += [int(f"{channel}{block}") for channel in range(channels)]
    ours = merging_from_swin_release(torch.tensor([columns, columns]))
    expected = [int(f"{channel}{y}{x}") for channel in range(channels) for y in "01" for x in "01"]
    assert ours.tolist() == [expected, expected]


def slow_window_attention(block, x):
    """Attention over all positions of the map, masked to the window of each position in the (shifted) grid."""
    window, attention = block.window_size, block.attention
    batch, height, width, dim = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    padded = x.shape[1:3]
    y, x_ = (p.flatten() for p in torch.meshgrid(torch.arange(padded[0]), torch.arange(padded[1]), indexing="ij"))
    cell = [(p - block.shift).div(window, rounding_mode="floor") for p in (y, x_)]
    seen = (cell[0][:, None] == cell[0]) & (cell[1][:, None] == cell[1])
    dy, dx = y[:, None] - y + window - 1, x_[:, None] - x_ + window - 1
    row = (dy * (2 * window - 1) + dx).where(seen, torch.tensor(0))
    q, k, v = attention.qkv(x.flatten(1, 2)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = attention.relative_position_bias_table[row].permute(2, 0, 1)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    out = attention.proj((weights @ v).transpose(1, 2).flatten(2)).view(x.shape)
    return out[:, :height, :width]


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("height, width", [(10, 15), (11, 7), (3, 4), (5, 5)])
def test_window_attention_by_definition(shift, height, width):
    """Also on maps smaller than a window, where the official models shift as well."""
    torch.manual_seed(0)
    block = SwinBlock(8, num_heads=2, window_size=5, shift=shift, mlp_ratio=4.0, drop_path=0.0).double().eval()
    nn.init.normal_(block.attention.relative_position_bias_table)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    padded = [length + -length % 5 for length in (height, width)]
    y = x + slow_window_attention(block, block.norm1(x))
    y = y + block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x, shifted_window_mask(*padded, 5, shift)), y, rtol=0, atol=1e-12)


def test_shift_mask_and_position_index_by_hand():
    mask = shifted_window_mask(4, 4, window_size=2, shift=1)
    assert mask.shape == (4, 4, 4) and not mask[0].any()
    beside, below = mask[1] == 0, mask[2] == 0  # windows that join left | right, upper | lower parts
    assert beside.tolist() == [[i % 2 == j % 2 for j in range(4)] for i in range(4)]
    assert below.tolist() == [[i // 2 == j // 2 for j in range(4)] for i in range(4)]
    assert torch.equal(mask[3], -100.0 * (1 - torch.eye(4)))
    assert relative_position_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    index = relative_position_index(7)
    assert (index[0, 0], index[0, 48], index[48, 0], int(index.sum())) == (84, 0, 168, 84 * 49 * 49)


@pytest.mark.parametrize("height, width", [(1, 1), (5, 33), (90, 123), (61, 224)])
def test_swin_takes_any_size(height, width):
    backbone = build(TINY_SWIN).eval()
    out = backbone(torch.rand(2, 3, height, width))
    for i, (name, value) in enumerate(out.items()):
        assert name == RES[i] and value.is_contiguous()
        stride, channels = 4 * 2**i, 8 * 2**i
        assert value.shape == (2, channels, math.ceil(height / stride), math.ceil(width / stride))
        assert backbone.output_shape()[name] == ShapeSpec(channels=channels, stride=stride)
        torch.testing.assert_close(value.mean(1), torch.zeros_like(value[:, 0]), rtol=0, atol=1e-5)


def test_padding_is_zeros_at_the_bottom_and_right():
    backbone = build(TINY_SWIN).eval()
    image = torch.rand(1, 3, 30, 45)
    padded = F.pad(image, (0, 3, 0, 2))
    for name, value in backbone(image).items():
        assert torch.equal(value, backbone(padded)[name])


def test_swin_out_features_and_freezing():
    backbone = build([*TINY_SWIN, "MODEL.SWIN.OUT_FEATURES", ["res4", "res3"], "MODEL.BACKBONE.FREEZE_AT", 2])
    assert list(backbone(torch.rand(1, 3, 32, 32))) == ["res3", "res4"]
    assert len(backbone.stages) == 3
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in backbone.named_parameters() if name.startswith(("patch_embed", "stages.0"))}


def test_drop_path_grows_linearly_and_drops_whole_images():
    backbone = build([*TINY_SWIN, "MODEL.SWIN.DROP_PATH_RATE", 0.5])
    rates = [block.drop_path.p for stage in backbone.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 6))
    block = SwinBlock(4, num_heads=1, window_size=2, shift=0, mlp_ratio=1.0, drop_path=0.5).train()
    x = torch.rand(64, 2, 2, 4)
    torch.manual_seed(0)
    untouched = (block(x, None) == x).flatten(1).all(1)  # both branches dropped: with probability 1/4
    assert 4 < untouched.sum() < 32
    assert not (block.eval()(x, None) == x).flatten(1).all(1).any()


def test_other_swin_settings_reach_the_model():
    with torch.device("meta"):
        backbone = build([*TINY_SWIN, "MODEL.SWIN.WINDOW_SIZE", 5, "MODEL.SWIN.MLP_RATIO", 2.0])
    block = backbone.stages[0].blocks[1]
    assert block.mlp[0].out_features == 16 and block.shift == 2
    assert block.attention.relative_position_bias_table.shape == (81, 1)


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.SWIN.OUT_FEATURES", ["p2"]),
        ("MODEL.SWIN.OUT_FEATURES", []),
        ("MODEL.SWIN.DEPTHS", [2, 2]),
        ("MODEL.SWIN.NUM_HEADS", [3, 6, 12, 25]),
        ("MODEL.SWIN.DROP_PATH_RATE", 1.0),
    ],
)
def test_wrong_swin_config_names_the_key(key, value):
    with pytest.raises(ConfigError, match=key):
        build(["MODEL.BACKBONE.NAME", "build_knet_swin_backbone", key, value])
