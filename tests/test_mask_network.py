"""Masks by a network of each kernel's own."""

import pytest
import torch
from helpers import IMAGE_KERNELS, make_batch, make_example, tiny_model

from knet_d2.errors import ConfigError
from knet_d2.modeling import mask_network
from knet_d2.modeling.mask_network import MaskNetwork, limited
from knet_d2.modeling.structures import MaskInputs

B, N, C, WIDTH, H, W = 2, 3, 5, 4, 6, 7


def make_network(seed=0):
    """A network in float64 with random weights in all layers."""
    torch.manual_seed(seed)
    network = MaskNetwork(C, WIDTH).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return network


def make_inputs():
    shapes = (B, WIDTH, H, W), (B, N, W), (B, N, H)
    return MaskInputs(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))


def test_each_kernel_is_two_convolutions_with_a_relu_between_them():
    network, inputs = make_network(), make_inputs()
    kernels = torch.randn(B, N, C, dtype=torch.float64)
    masks = network(kernels, inputs)
    assert masks.shape == (B, N, H, W)
    for b, n, i, j in ((0, 0, 0, 0), (1, 2, 5, 6), (0, 1, 2, 5), (1, 0, 4, 3)):
        numbers = iter(network.weights(kernels[b, n]).tolist())
        # [WIDTH, WIDTH] for the local channels, then a number for each hidden channel: across, down, offset, last layer
        of_local = [[next(numbers) for _ in range(WIDTH)] for _ in range(WIDTH)]
        of_across, of_down, offsets, last = ([next(numbers) for _ in range(WIDTH)] for _ in range(4))
        expected = next(numbers)
        for channel in range(WIDTH):
            value = (
                offsets[channel] + of_across[channel] * inputs.across[b, n, j] + of_down[channel] * inputs.down[b, n, i]
            )
            value += sum(w * x for w, x in zip(of_local[channel], inputs.local[b, :, i, j]))
            expected += last[channel] * max(value.item(), 0)
        assert masks[b, n, i, j].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("at_once", [1, 2, N])
def test_masks_and_gradients_do_not_depend_on_how_many_kernels_are_computed_at_once(at_once, monkeypatch):
    kernels = torch.randn(B, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results, computed = [], []
    whole = MaskNetwork._masks
    monkeypatch.setattr(MaskNetwork, "_masks", lambda *args: computed.append(args[1].shape[1]) or whole(*args))
    for elements in (1 << 19, at_once * B * WIDTH * H * W):
        monkeypatch.setattr(mask_network, "CHUNK_ELEMENTS", elements)
        network, inputs = make_network(), make_inputs()
        tensors = [x.requires_grad_() for x in (kernels.clone(), *inputs)]
        masks = network(tensors[0], MaskInputs(*tensors[1:]))
        gradients = torch.autograd.grad(masks.square().sum(), [*tensors, *network.parameters()])
        results.append([masks, *gradients])
    assert computed == [N] + [min(at_once, N - i) for i in range(0, N, at_once)]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_positions_near_an_object_are_as_they_are_and_far_ones_limited():
    found = limited(torch.tensor([0.0, 0.01, -0.01, 4.0, 1e6, -1e6], dtype=torch.float64))
    expected = torch.tensor([0.0, 0.01, -0.01, 4 * 0.76159415595, 4.0, -4.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_training_begins_with_the_masks_of_the_model_without(task):
    """The network's last layer is 0 at first, and learns: all of its weights then get gradients."""
    without = tiny_model(task, {**IMAGE_KERNELS, "MODEL.KNET.MASK_NETWORK_WIDTH": 0}).eval()
    model = tiny_model(task, IMAGE_KERNELS, seed=1).eval()
    missing = model.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert missing and all(".mask_network." in name or ".local." in name for name in missing)
    image = model.preprocess_image([make_example((64, 96), 0)]).tensor
    for found, expected in zip(model.network(image).stages, without.network(image).stages, strict=True):
        assert torch.equal(found.mask_logits, expected.mask_logits)
    networks = {name: x for name, x in model.named_modules() if isinstance(x, MaskNetwork)}
    assert len(networks) == 1 + len(model.cascade.stages)  # the first masks, and those of each stage
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        sum(model(make_batch([3, 1])).values()).backward()
        optimizer.step()
    for name, network in networks.items():
        assert network.weights.weight.grad.abs().sum(dim=1).gt(0).float().mean() > 0.5, name


@torch.no_grad()
def test_stuff_kernels_have_no_network():
    model = tiny_model("panoptic", IMAGE_KERNELS).eval()
    image = model.preprocess_image([make_example((64, 96), 0)]).tensor
    before = model.network(image).stages[0].mask_logits
    torch.nn.init.ones_(model.cascade.stages[0].mask_network.weights.bias)
    changed = (model.network(image).stages[0].mask_logits != before).flatten(2).any(dim=2)[0]
    assert changed[: model.bank.num_matched].all() and not changed[model.bank.num_matched :].any()


@pytest.mark.parametrize(
    "options", [{"MODEL.KNET.MASK_NETWORK_WIDTH": 8}, {**IMAGE_KERNELS, "MODEL.KNET.MASK_NETWORK_WIDTH": -1}]
)
def test_kernels_without_places_have_no_network(options):
    with pytest.raises(ConfigError, match="MODEL.KNET.MASK_NETWORK_WIDTH = "):
        tiny_model("instance", options)
