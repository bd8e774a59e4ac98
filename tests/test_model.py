"""LeNet, and the faster layers that some of its own become on a CPU."""

import copy
from unittest import mock

import pytest
import torch
from conftest import plain_lenet
from torch import nn

import main


def calls_of(layer_type):
    """Records the calls of PyTorch's own `forward`, which the faster layer does not need."""
    forward = layer_type.forward
    return mock.patch.object(layer_type, "forward", autospec=True, side_effect=forward)


def test_is_the_guides_lenet():
    """Its initial parameters, too. Compiled, it drops what PyTorch's layers drop, in all places."""
    images = torch.randn(8, 1, 28, 28).double()
    torch.manual_seed(5)
    ours = main.LeNet(dropout=0.5).double()
    main.make_faster(ours)
    output = torch.compile(ours, backend="eager", fullgraph=True)(images)
    torch.manual_seed(5)
    torch.testing.assert_close(output, plain_lenet(dropout=0.5).double()(images))
    with calls_of(nn.Conv2d) as calls:
        ours(images)
    assert not calls.called


def guides_block():
    layers = (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True))
    nn.init.ones_(layers[1].bias)  # More than half of the values pass ReLU.
    return nn.Sequential(*layers, nn.MaxPool2d(2, stride=2), nn.Dropout(0.0))


# Changes of a block: attributes of the layer in this place, another layer there, or a hook.
def assign(place, **values):
    return lambda block: vars(block[place]).update(values)


def replace(place, layer):
    return lambda block: block.__setitem__(place, copy.deepcopy(layer).double())


def hook(place, kind):
    return lambda block: getattr(block[place], f"register_{kind}_hook")(lambda *details: None)


# Changes after which a block is still the guide's, and so the faster one.
FAST = {
    "none": lambda block: None,
    "other settings of the norm": assign(1, momentum=0.3, eps=0.1),
    "norm in another mode": assign(1, train=lambda mode: None),
    "frozen convolution": lambda block: block[0].requires_grad_(False),
    "padding": replace(0, nn.Conv2d(2, 6, 3, padding="same", padding_mode="reflect")),
    "stride": assign(0, stride=(2, 2)),
    "dilation": assign(0, dilation=(2, 2)),
    "groups": replace(0, nn.Conv2d(2, 6, 3, groups=2)),
    "another max pool": replace(3, nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)),
    "rare dropout": assign(4, p=1e-6),
    "nothing is kept": assign(4, p=1.0),
}
# One for each condition: after these, it has to do what PyTorch does.
SLOW = {
    "no bias": replace(0, nn.Conv2d(2, 6, 3, bias=False)),
    "no bias of the norm": lambda block: block[1].register_parameter("bias", None),
    "statistics not updated": assign(1, track_running_stats=False),
    "momentum None": assign(1, momentum=None),
    "negative scale": lambda block: block[1].weight.data[:2].fill_(-1),
    # All values of a channel are equal, and the first of them gets the gradient.
    "scale 0": lambda block: block[1].weight.data[:2].zero_(),
    "another norm": replace(1, nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
    "another activation": replace(2, nn.GELU()),  # It falls, and then rises.
    "another pool": replace(3, nn.AvgPool2d(2)),
    "another last layer": replace(4, nn.Tanh()),
    "dropout in place": assign(4, p=0.5, inplace=True),
    "a layer more": lambda block: block.append(nn.Tanh()),
    "forward of one's own": assign(2, forward=torch.abs),
    "forward hook": hook(1, "forward"),
    "forward pre-hook": hook(2, "forward_pre"),
    "backward hook": hook(0, "full_backward"),
    "backward pre-hook": hook(3, "full_backward_pre"),
}


def compute(block, x):
    """Everything that a pass forward and backward leaves behind."""
    torch.manual_seed(1)  # for dropout
    x = x.clone().requires_grad_()
    block.zero_grad()
    output = block(x)
    loss = output.square().sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()  # as if a gradient in the images had a penalty
    gradients = [parameter.grad for parameter in block.parameters()]
    return [output, slope, x.grad, *gradients, *block.buffers()]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_a_changed_block_is_the_same_function(name):
    torch.manual_seed(3)
    plain = guides_block().double()
    block = copy.deepcopy(plain)
    main.make_faster(block)
    for net in (plain, block):
        (FAST | SLOW)[name](net)
    with calls_of(nn.Conv2d) as calls:
        for training in (True, False, True):
            x = torch.randn(4, 2, 9, 9).double()
            expected = compute(plain.train(training), x)
            found = compute(block.train(training), x)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            # Statistics with a graph would keep all of it alive.
            assert not any(buffer.requires_grad for buffer in block.buffers())
    assert (calls.call_count > 3) == (name in SLOW)  # The plain block calls it three times.


def test_half_precision_hooks_and_single_images_are_left_to_pytorch():
    block = guides_block().eval()
    main.make_faster(block)
    x = torch.randn(4, 2, 9, 9)
    with calls_of(nn.Conv2d) as calls:
        with torch.autocast("cpu"):
            block(x)
        with nn.modules.module.register_module_forward_pre_hook(lambda *details: None):
            block(x)
        with pytest.raises(ValueError, match="expected 4D input"):
            block(x[0])
        block.train()(x[:1])  # Statistics of a single value would not be numbers.
        block.bfloat16()(x.bfloat16())
    assert calls.call_count == 5


def test_layers_of_ones_own_stay():
    for base, arguments in ((nn.Dropout, []), (nn.Sequential, guides_block())):
        own = type("Own", (base,), {})(*arguments)
        main.make_faster(own)
        assert type(own).__name__ == "Own"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_is_random_everywhere(layout):
    layer = nn.Dropout(0.1)
    main.make_faster(layer)
    torch.manual_seed(7)
    ones = torch.ones(200, 50, 10, 10).to(memory_format=layout).requires_grad_()
    output = layer(ones)
    output.sum().backward()
    assert torch.equal(ones.grad, output.detach())  # which scales gradients as well
    centred, again = ((values != 0).double() - 0.9 for values in (output, layer(ones)))
    # The same share for every image, every channel and every place, within five deviations,
    for part in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1)):
        means = centred.mean(part)
        assert means.abs().max() < 5 * (0.1 * 0.9 * means.numel() / centred.numel()) ** 0.5
    # each value for itself, in the order of memory and in that of the indices, and anew each time.
    products = [(centred * again).flatten()]
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        row = centred.permute(order).flatten()
        products += [row[lag:] * row[:-lag] for lag in (*range(1, 9), 50, 100, 5000, 500_000)]
    for product in products:
        assert product.mean().abs() < 5 * 0.1 * 0.9 / len(product) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_is_the_faster_one_and_scales(dtype):
    layer = nn.Dropout(0.25)
    main.make_faster(layer)
    for x in (torch.ones(33, 7, dtype=dtype), torch.ones(9, 8, 4, dtype=dtype)[:, ::2]):
        with calls_of(nn.Dropout) as calls:
            output = layer(x)
        assert output.dtype == dtype and output.shape == x.shape and not calls.called
        assert torch.equal(output.unique(), torch.tensor([0, 4 / 3], dtype=dtype))
    assert torch.equal(layer.eval()(x), x)
