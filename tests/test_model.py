"""LeNet, and the faster layers that it is built of: they compute what PyTorch's own do."""

import copy
from unittest import mock

import pytest
import torch
from conftest import plain_lenet
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, spectral_norm

import main

SHORT_CUT = mock.patch.object(main, "scale_and_shift", side_effect=main.scale_and_shift)


def test_is_the_guides_lenet():
    """Its initial parameters, too. It can be compiled, and used like any nn.Module."""
    images = torch.randn(8, 1, 28, 28).double()
    torch.manual_seed(5)
    ours = main.LeNet(dropout=0.0).double()
    compiled = torch.compile(copy.deepcopy(ours), backend="eager")
    torch.manual_seed(5)
    plain = plain_lenet().double()
    parameters = [parameters_to_vector(net.parameters()) for net in (ours, plain)]
    assert torch.equal(*parameters)
    with SHORT_CUT as calls:
        torch.testing.assert_close(ours(images), plain(images))
        assert calls.call_count == 2
    torch.testing.assert_close(compiled(images), plain(images))
    ours(images).square().sum().backward()
    gradients = torch.cat([parameter.grad.view(-1) for parameter in ours.parameters()])
    plain(images).square().sum().backward()
    expected = torch.cat([parameter.grad.view(-1) for parameter in plain.parameters()])
    torch.testing.assert_close(gradients, expected)


def guides_block(block_type, dropout_type):
    layers = (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True))
    nn.init.ones_(layers[1].bias)  # More than half of the values pass ReLU.
    return block_type(*layers, nn.MaxPool2d(2, stride=2), dropout_type(0.0))


# Changes of a block: attributes of the layer in this place, another layer there, or hooks.
def assign(place, **values):
    return lambda block: vars(block[place]).update(values)


def replace(place, layer):
    return lambda block: block.__setitem__(place, copy.deepcopy(layer).double())


HOOKS = {  # what each kind of hook does with the values that it is given
    "forward_pre": lambda layer, inputs: (2 * inputs[0],),
    "forward": lambda layer, inputs, output: 2 * output,
    "full_backward_pre": lambda layer, slopes: (2 * slopes[0],),
    "full_backward": lambda layer, input_slopes, slopes: (2 * input_slopes[0],),
}


def hook(place, kind):
    def change(block):
        block[2] = nn.ReLU()  # PyTorch itself refuses some hooks before a ReLU that works in place.
        getattr(block[place], f"register_{kind}_hook")(HOOKS[kind])

    return change


def hooks(*places):
    return {f"{kind} hook on {place}": hook(place, kind) for place in places for kind in HOOKS}


class OwnConvolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).abs()


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).abs()


# Changes after which the block can still pool first.
FAST = {
    "none": lambda block: None,
    "other settings of the norm": assign(1, momentum=0.3, eps=0.1),
    "norm in another mode": assign(1, train=lambda mode: None),
    "frozen convolution": lambda block: block[0].requires_grad_(False),
    "frozen norm": lambda block: block[1].requires_grad_(False).eval(),
    "no bias": replace(0, nn.Conv2d(2, 6, 3, bias=False)),
    "padding": replace(0, nn.Conv2d(2, 6, 3, padding="same", padding_mode="reflect")),
    "stride": assign(0, stride=(2, 2)),
    "dilation": assign(0, dilation=(2, 2)),
    "groups": replace(0, nn.Conv2d(2, 6, 3, groups=2)),
    "own convolution": replace(0, OwnConvolution(2, 6, 3)),
    "forward on the convolution": assign(0, forward=lambda x: x.repeat(1, 3, 1, 1)),
    "pruned convolution": lambda block: prune.l1_unstructured(block[0], "weight", 0.5),
    "spectral norm": lambda block: parametrizations.spectral_norm(block[0]),
    "old spectral norm": lambda block: spectral_norm(block[0]),
    "another max pool": replace(3, nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)),
    "rare dropout": assign(4, p=1e-6),
    "nothing is kept": assign(4, p=1.0),
    "dropout in place": assign(4, p=1e-6, inplace=True),
    "another last layer": replace(4, nn.Tanh()),
    "a layer more": lambda block: block.append(nn.Tanh()),
    **hooks(0, 4),
}
# One for each condition: after these, it has to do what PyTorch does.
SLOW = {
    "no bias of the norm": lambda block: block[1].register_parameter("bias", None),
    "no parameters": replace(1, nn.BatchNorm2d(6, affine=False)),
    "no statistics": replace(1, nn.BatchNorm2d(6, track_running_stats=False)),
    "statistics not updated": assign(1, track_running_stats=False),
    "no statistics to update": lambda block: (
        replace(1, nn.BatchNorm2d(6, track_running_stats=False))(block),
        assign(1, track_running_stats=True)(block),
    ),
    "momentum None": assign(1, momentum=None),
    "negative scale": lambda block: block[1].weight.data[:2].fill_(-1),
    # All values of a channel are equal, and the first of them gets the gradient.
    "scale 0": lambda block: block[1].weight.data[:2].zero_(),
    "pruned norm": lambda block: prune.l1_unstructured(block[1], "bias", 0.5),
    "own norm": replace(1, OwnNorm(6)),
    "another norm": replace(1, nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
    "another activation": replace(2, nn.GELU()),  # It falls, and then rises.
    "another pool": replace(3, nn.AvgPool2d(2)),
    "another order": lambda block: block.insert(1, block.pop(3)),
    "few layers": lambda block: [block.pop(-1) for _ in range(3)],
    **{f"forward on {place}": assign(place, forward=torch.abs) for place in (1, 2, 3)},
    **hooks(1, 2, 3),
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
    blocks = []
    for types in ((nn.Sequential, nn.Dropout), (main.FasterConvBN, main.FasterDropout)):
        torch.manual_seed(3)
        blocks.append(guides_block(*types).double())
        (FAST | SLOW)[name](blocks[-1])
    plain, block = blocks
    assert [*plain.state_dict()] == [*block.state_dict()]
    with SHORT_CUT as calls:
        for training in (True, False, True):
            x = torch.randn(4, 2, 9, 9).double()
            expected = compute(plain.train(training), x)
            found = compute(block.train(training), x)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            # Statistics with a graph would keep all of it alive.
            assert not any(buffer.requires_grad for buffer in block.buffers())
        assert calls.call_count == (3 if name in FAST else 0)


@pytest.mark.parametrize(
    "x, dtype",
    [
        (torch.randn(1, 2, 9, 9), torch.float32),  # A channel may have a single value.
        (torch.randn(0, 2, 9, 9), torch.float32),
        (torch.randn(4, 2, 9, 9), torch.bfloat16),
        (torch.randn(4, 2, 9, 9), "autocast"),
    ],
)
def test_other_inputs_are_left_to_pytorch(x, dtype):
    plain = guides_block(nn.Sequential, nn.Dropout)
    block = guides_block(main.FasterConvBN, main.FasterDropout)
    block.load_state_dict(plain.state_dict())
    if dtype != "autocast":
        plain, block, x = plain.to(dtype), block.to(dtype), x.to(dtype)
    with torch.autocast("cpu", enabled=dtype == "autocast"), SHORT_CUT as calls:
        for _ in range(2):
            torch.testing.assert_close(block(x), plain(x))
        assert not calls.called
    torch.testing.assert_close(block.state_dict(), plain.state_dict())
    with pytest.raises(ValueError, match="expected 4D input"):
        block.float()(torch.randn(2, 9, 9))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_is_random_everywhere(layout):
    layer = main.FasterDropout(0.1)
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
    # and anew each time.
    assert (centred * again).mean().abs() < 5 * 0.1 * 0.9 / centred.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_is_the_faster_one_and_scales(dtype):
    layer = main.FasterDropout(0.25)
    x = torch.ones(9, 8, 4, dtype=dtype)[:, ::2]
    with mock.patch.object(nn.functional, "dropout", side_effect=nn.functional.dropout) as calls:
        output = layer(x)
        assert not calls.called and output.dtype == dtype and output.shape == x.shape
        assert torch.equal(output.unique(), torch.tensor([0, 4 / 3], dtype=dtype))
        assert torch.equal(layer.eval()(x), x) and calls.called
    assert torch.equal(main.FasterDropout(0.0)(x), x) and not main.FasterDropout(1.0)(x).any()
