"""LeNet, and the faster layers that some of its own become on a CPU."""

import copy
from unittest import mock

import pytest
import torch
from conftest import PlainLeNet
from torch import nn

import main


def two_lenets(dropout=0.0):
    """Ours and the guide's in float64, from the same random numbers."""
    nets = []
    for make in (main.LeNet, PlainLeNet):
        torch.manual_seed(5)
        nets.append(make(dropout).double())
    return nets


def calls_of(layer_type):
    """Records the calls of PyTorch's own `forward`, which the faster layer does not need."""
    forward = layer_type.forward
    return mock.patch.object(layer_type, "forward", autospec=True, side_effect=forward)


def test_is_the_guides_lenet():
    ours, plain = two_lenets()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 132_220
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    main.make_faster(ours)
    images = torch.randn(8, 1, 28, 28).double()
    for training in (True, False):
        expected = plain.train(training)(images)
        with calls_of(nn.Conv2d) as calls:
            torch.testing.assert_close(ours.train(training)(images), expected)
        assert not calls.called


def test_can_be_compiled_whole():
    """And then drops what PyTorch's layers drop, in all three places."""
    model, plain = two_lenets(dropout=0.5)
    main.make_faster(model)
    images = torch.randn(4, 1, 28, 28).double()
    outputs = []
    for net in (torch.compile(model, backend="eager", fullgraph=True), plain):
        torch.manual_seed(2)
        outputs.append(net(images))
    torch.testing.assert_close(*outputs)


# The guide's convbn


def guides_block():
    layers = (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True))
    return nn.Sequential(*layers, nn.MaxPool2d(2, stride=2), nn.Dropout(0.0))


def replace(place, layer):
    """A change of a block: another layer in this place."""
    return lambda block: block.__setitem__(place, copy.deepcopy(layer).double())


def scale(value):
    """A change of a block: one channel is scaled by this value."""
    weight = torch.tensor([1, 1, value, 1, 1, 1]).double()
    return lambda block: block[1].load_state_dict({"weight": weight, "bias": 1 + weight}, False)


def hook(place, kind):
    """A change of a block: a hook notes the shapes of what a layer gets."""

    def change(block):
        block.seen = []
        register = getattr(block[place], f"register_{kind}_hook")
        register(lambda layer, tensors, *_: block.seen.append(tensors[0].shape))

    return change


# Changes after which a block is still the guide's, and so the faster one.
FAST = {
    "none": lambda block: None,
    "momentum": replace(1, nn.BatchNorm2d(6, momentum=0.3)),
    "eps": replace(1, nn.BatchNorm2d(6, eps=0.1)),
    "frozen convolution": lambda block: block[0].requires_grad_(False),
    "another max pool": replace(3, nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)),
}
# At least one for each condition: after these, it has to do what PyTorch does.
SLOW = {
    "padding": replace(0, nn.Conv2d(2, 6, 3, padding=1)),
    "stride": replace(0, nn.Conv2d(2, 6, 3, stride=2)),
    "dilation": replace(0, nn.Conv2d(2, 6, 3, dilation=2)),
    "groups": replace(0, nn.Conv2d(2, 6, 3, groups=2)),
    "no bias": replace(0, nn.Conv2d(2, 6, 3, bias=False)),
    "no affine": replace(1, nn.BatchNorm2d(6, affine=False)),
    "no bias of the norm": lambda block: block[1].register_parameter("bias", None),
    "no running statistics": replace(1, nn.BatchNorm2d(6, track_running_stats=False)),
    "statistics not updated": lambda block: setattr(block[1], "track_running_stats", False),
    "momentum None": replace(1, nn.BatchNorm2d(6, momentum=None)),
    "norm in another mode": lambda block: setattr(block[1], "train", lambda mode: None),
    "negative scale": scale(-1),
    "scale 0": scale(0),  # All values are equal, and the first of them gets the gradient.
    "another norm": replace(1, nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
    "another activation": replace(2, nn.GELU()),  # It falls, and then rises.
    "another pool": replace(3, nn.AvgPool2d(2)),
    "another last layer": replace(4, nn.Tanh()),
    "dropout in place": replace(4, nn.Dropout(0.5, inplace=True)),
    "a layer more": lambda block: block.append(nn.Tanh()),
    "a layer less": lambda block: block.pop(4),
    "forward of one's own": lambda block: setattr(block[2], "forward", torch.abs),
    "hook of the norm": hook(1, "forward"),
    "hook of ReLU": hook(2, "forward"),
    "hook of the pool": hook(3, "forward"),
    **{kind: hook(0, kind) for kind in ("forward", "forward_pre")},
    **{kind: hook(0, kind) for kind in ("full_backward", "full_backward_pre")},
}


def compute(block, x):
    """Everything that a pass forward and backward leaves behind."""
    torch.manual_seed(1)  # for dropout
    x = x.clone().requires_grad_()
    block.zero_grad()
    output = block(x)
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in block.parameters() if parameter.requires_grad]
    return [output.detach(), x.grad, *gradients, *map(torch.clone, block.buffers())]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_a_changed_block_is_the_same_function(name):
    torch.manual_seed(3)
    plain = guides_block().double()
    block = copy.deepcopy(plain)
    main.make_faster(block)
    for net in (plain, block):
        (FAST | SLOW)[name](net)
    for training in (True, False, True):
        x = torch.randn(4, 2, 9, 9).double()
        expected = compute(plain.train(training), x)
        with calls_of(nn.Conv2d) as calls:
            found = compute(block.train(training), x)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            assert not ours.requires_grad  # Statistics with a graph would keep all of it alive.
        assert vars(block).get("seen") == vars(plain).get("seen")
        assert name in SLOW or not calls.called


@pytest.mark.parametrize("norm", [None, torch.float32, torch.bfloat16])
def test_half_precision_is_left_to_pytorch(norm):
    """That of autocast, and that of a block, whose norm may still be float32."""
    block = guides_block()
    main.make_faster(block)
    x = torch.randn(4, 2, 9, 9)
    if norm is not None:
        x, _ = x.bfloat16(), block.bfloat16()[1].to(norm)
    with torch.autocast("cpu", enabled=norm is None), calls_of(nn.Conv2d) as calls:
        assert block(x).dtype == torch.bfloat16
    assert calls.called


def test_global_hooks_see_every_layer():
    block = guides_block()
    main.make_faster(block)
    seen = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda layer, _: seen.append(layer))
    block(torch.randn(4, 2, 9, 9))
    handle.remove()
    assert seen == [block, *block]


def test_an_image_without_a_batch_is_refused():
    block = guides_block().eval()
    main.make_faster(block)
    with pytest.raises(ValueError, match="expected 4D input"):
        block(torch.randn(2, 9, 9))


def test_only_the_guides_layers_become_faster():
    own, own_dropout = type("Own", (nn.Sequential,), {}), type("OwnDropout", (nn.Dropout,), {})
    layers = [guides_block(), nn.Dropout(), nn.Sequential(), own(*guides_block()), own_dropout()]
    main.make_faster(nn.Sequential(nn.Identity(), nn.ModuleList(layers)))  # deep inside
    types = [main.FasterConvBN, main.DropoutFromBits, nn.Sequential, own, own_dropout]
    assert [type(layer) for layer in layers] == types


@pytest.mark.parametrize("count", [15, 16])
def test_moments_can_be_differentiated_twice(count):
    """As for a penalty on gradients."""
    torch.manual_seed(3)
    values = torch.randn(count, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(main.ChannelMoments.apply, values)
    assert torch.autograd.gradgradcheck(main.ChannelMoments.apply, values)


def test_moments_are_exact_where_the_mean_is_large():
    torch.manual_seed(4)
    values = 1000 + torch.randn(4096, 3, 1, 1)
    _, variance = main.ChannelMoments.apply(values)
    expected = values.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-3, atol=0)


# Dropout


def dropout(p, **options):
    layer = nn.Dropout(p, **options)
    main.make_faster(layer)
    return layer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.25])
def test_dropout_is_random_everywhere(p, layout):
    torch.manual_seed(7)
    ones = torch.ones(200, 50, 10, 10).to(memory_format=layout).requires_grad_()
    output = dropout(p)(ones)
    output.sum().backward()
    assert torch.equal(ones.grad, output.detach())  # which scales gradients as well
    kept = output.detach() != 0
    centred = kept.double() - (1 - p)
    # The same share for every image, every channel and every place, within five deviations,
    for part in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1)):
        means = centred.mean(part)
        assert means.abs().max() < 5 * (p * (1 - p) * means.numel() / kept.numel()) ** 0.5
    # each value for itself, in the order of memory and in that of the indices, and anew each time.
    again = (dropout(p)(ones) != 0).double() - (1 - p)
    products = [(centred * again).flatten()]
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        row = centred.permute(order).flatten()
        products += [row[lag:] * row[:-lag] for lag in (*range(1, 9), 50, 100, 5000, 500_000)]
    for product in products:
        assert product.mean().abs() < 5 * p * (1 - p) / len(product) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_is_the_faster_one_and_scales(dtype):
    for x in (torch.ones(33, 7, dtype=dtype), torch.ones(9, 8, 4, dtype=dtype)[:, ::2]):
        with calls_of(nn.Dropout) as calls:
            output = dropout(0.25)(x)
        assert output.dtype == dtype and output.shape == x.shape and not calls.called
        assert torch.equal(output.unique(), torch.tensor([0, 4 / 3], dtype=dtype))


@pytest.mark.parametrize(
    "p, inplace, training",
    [
        (0, False, True),
        (1e-6, False, True),
        (1, False, True),
        (0.5, True, True),
        (0.5, False, False),
    ],
)
def test_other_dropout_is_pytorchs(p, inplace, training):
    results = []
    for layer in (dropout(p, inplace=inplace), nn.Dropout(p, inplace=inplace)):
        torch.manual_seed(8)
        x = torch.ones(33, 7, dtype=torch.float64)
        results.append(torch.stack([layer.train(training)(x), x]))  # In place, x is changed, too.
    assert torch.equal(*results)
