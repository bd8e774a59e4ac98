"""LeNet, and the faster layers that some of its own become on a CPU."""

import copy

import pytest
import torch
from conftest import PlainLeNet, plain_with
from torch import nn, optim
from torch.nn.utils import parametrizations, prune, spectral_norm

import main


def test_has_the_guides_parameters():
    ours, plain = main.LeNet(), PlainLeNet()
    shapes = [parameter.shape for parameter in ours.parameters()]
    assert shapes == [parameter.shape for parameter in plain.parameters()]
    assert sum(shape.numel() for shape in shapes) == 132_220
    dropouts = [m.p for m in main.LeNet(0.4).modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [0.4] * 3


@pytest.mark.parametrize("faster", [False, True])
def test_thirty_steps_have_the_losses_of_plain_sgd(faster):
    torch.manual_seed(5)
    model = main.LeNet(dropout=0).double()
    for block in model.m[:2]:  # Some scales are negative: then pooling cannot go first.
        block[1].weight.data[::3] *= -1
    plain = plain_with([value.numpy() for value in model.state_dict().values()]).double()
    if faster:
        main.make_faster(model)
        assert [type(layer) for layer in model.m[:2]] == [main.FasterConvBN] * 2
    images = torch.randn(30, 32, 1, 28, 28).double()
    labels = torch.randint(10, (30, 32))
    optimizers = [optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (model, plain)]
    for data, target in zip(images, labels, strict=True):
        losses = []
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(data), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model.eval()(images[0]), plain.eval()(images[0]))


# Blocks that were changed


def replace(place, layer):
    """A change of a block: another layer in this place."""

    def change(block):
        block[place] = copy.deepcopy(layer)

    return change


def negate_scales(block):
    block[1].weight.data[::2] *= -1


def freeze_norm(block):
    block[1].eval()
    block[1].train = lambda mode: block[1]  # stays frozen when the block is set to training


def double_through_hook(place):
    def change(block):
        block[place].register_forward_hook(lambda layer, inputs, output: 2 * output)

    return change


CHANGES = {
    "none": lambda block: None,
    "padding": replace(0, nn.Conv2d(2, 6, 3, padding=1)),
    "padding same": replace(0, nn.Conv2d(2, 6, 3, padding="same")),
    "stride": replace(0, nn.Conv2d(2, 6, 3, stride=2)),
    "dilation": replace(0, nn.Conv2d(2, 6, 3, dilation=2)),
    "groups": replace(0, nn.Conv2d(2, 6, 3, groups=2)),
    "no bias": replace(0, nn.Conv2d(2, 6, 3, bias=False)),
    "circular": replace(0, nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular")),
    "no affine": replace(1, nn.BatchNorm2d(6, affine=False)),
    "no running statistics": replace(1, nn.BatchNorm2d(6, track_running_stats=False)),
    "momentum None": replace(1, nn.BatchNorm2d(6, momentum=None)),
    "momentum": replace(1, nn.BatchNorm2d(6, momentum=0.3)),
    "eps": replace(1, nn.BatchNorm2d(6, eps=0.1)),
    "instance norm": replace(1, nn.InstanceNorm2d(6, affine=True)),
    "leaky": replace(2, nn.LeakyReLU(0.1)),
    "sigmoid": replace(2, nn.Sigmoid()),
    "pool stride": replace(3, nn.MaxPool2d(3, stride=1)),
    "pool padding": replace(3, nn.MaxPool2d(3, stride=2, padding=1)),
    "pool ceil": replace(3, nn.MaxPool2d(3, stride=2, ceil_mode=True)),
    "average pool": replace(3, nn.AvgPool2d(2)),
    "dropout 2d": replace(4, nn.Dropout2d(0.0)),
    "a layer more": lambda block: block.append(nn.Tanh()),
    "a layer less": lambda block: block.pop(4),
    "negative scales": negate_scales,
    "frozen norm": freeze_norm,
    "frozen weight": lambda block: block[0].weight.requires_grad_(False),
    "pruned": lambda block: prune.l1_unstructured(block[0], "weight", 0.5),
    "spectral norm": lambda block: spectral_norm(block[0], eps=1e-3),
    "parametrized": lambda block: parametrizations.weight_norm(block[0]),
    **{f"hook {place}": double_through_hook(place) for place in range(5)},
}


def compute(block, x, autocast):
    """Everything that a pass forward and backward leaves behind."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = block(x)
    loss = output.double().square().sum()
    loss.backward()
    gradients = [parameter.grad for parameter in block.parameters() if parameter.requires_grad]
    return [loss.detach(), output.detach(), x.grad, *gradients, *map(torch.clone, block.buffers())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_block_is_the_same_function(name, when, training, autocast):
    """Whether it is changed before or after make_faster."""
    torch.manual_seed(3)
    layers = (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True))
    plain = nn.Sequential(*layers, nn.MaxPool2d(2, stride=2), nn.Dropout(0.0))
    faster = nn.Sequential(nn.Identity(), nn.ModuleList([copy.deepcopy(plain)]))  # deep inside
    block = faster[1][0]
    steps = [CHANGES[name], lambda block: main.make_faster(faster)]
    for step in steps if when == "before" else reversed(steps):
        step(block)
    CHANGES[name](plain)
    plain.load_state_dict(block.state_dict())
    dtype = torch.float32 if autocast else torch.float64
    for net in (plain, block):
        net.to(dtype).train(training)
    x = torch.randn(4, 2, 9, 9, dtype=dtype)
    # Where memory is in another order, a product of bfloat16, of 8 bits, is rounded otherwise.
    tolerance = {"rtol": 0.05, "atol": 0.5} if autocast else {"rtol": 1e-9, "atol": 1e-9}
    for _ in range(2):  # The second time with other running statistics.
        torch.manual_seed(1)  # for the vectors of spectral norm
        expected = compute(plain, x, autocast)
        torch.manual_seed(1)
        for ours, theirs in zip(compute(block, x, autocast), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)


def test_the_guides_block_is_faster():
    """That is, the test above has not compared PyTorch's layers with themselves."""
    model = main.LeNet()
    main.make_faster(model)
    seen = []
    for block in model.m[:2]:
        block[4].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs))
        assert not main.is_guides_convbn(block)
        block[4]._forward_pre_hooks.clear()
        assert main.is_guides_convbn(block) and type(block[4]) is main.FasterDropout


@pytest.mark.parametrize("count", [2, 15, 16, 48])
def test_moments_and_their_gradient(count):
    torch.manual_seed(3)
    values = torch.randn(count, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    mean, variance = main.ChannelMoments.apply(values)
    torch.testing.assert_close(mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(variance, values.var((0, 2, 3), unbiased=False))
    assert torch.autograd.gradcheck(main.ChannelMoments.apply, values)
    assert torch.autograd.gradgradcheck(main.ChannelMoments.apply, values)  # of a penalty, say


def test_moments_are_exact_where_the_mean_is_large():
    torch.manual_seed(4)
    values = 1000 + torch.randn(4096, 3, 1, 1)
    _, variance = main.ChannelMoments.apply(values)
    expected = values.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=0)


# Dropout


def five_sigma(share, count):
    return 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_dropout_keeps_and_scales(p, layout):
    torch.manual_seed(7)
    net = nn.Sequential(nn.Dropout(p))
    main.make_faster(net)
    ones = torch.ones(200, 50, 10, 10).to(memory_format=layout).requires_grad_()
    output = net(ones)
    kept = output.detach() != 0
    values = output.detach()[kept]
    torch.testing.assert_close(values, torch.full_like(values, 1 / (1 - p)), rtol=2e-5, atol=0)
    # The same share for every image, every channel and every place,
    for part in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1)):
        shares = kept.double().mean(part)
        count = kept.numel() / shares.numel()
        assert (shares - (1 - p)).abs().max() < five_sigma(p, count)
    # and each value for itself, in the order of memory and in that of the indices.
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        centred = kept.permute(order).flatten().double() - (1 - p)
        for lag in (*range(1, 9), 50, 100, 5000):
            correlation = (centred[lag:] * centred[:-lag]).mean() / (p * (1 - p))
            assert abs(correlation) < 5 / len(centred) ** 0.5, lag
    output.sum().backward()
    assert torch.equal(ones.grad, output.detach())  # which scales gradients as well
    both = ((net(ones) != 0) & kept).double().mean().item()
    assert abs(both - (1 - p) ** 2) < five_sigma((1 - p) ** 2, kept.numel())


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_at_the_ends_of_its_range(p):
    net = nn.Sequential(nn.Dropout(p))
    main.make_faster(net)
    x = torch.randn(33, 7)  # not a multiple of four
    assert torch.equal(net.eval()(x), x)
    dropped = (net.train()(x) == 0).double().mean().item()
    assert dropped == pytest.approx(p, abs=0.2)
