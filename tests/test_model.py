"""LeNet, and the faster layers that stand in for some of its own on a CPU."""

import copy

import pytest
import torch
from conftest import PlainLeNet, plain_with
from torch import nn

import main

CPU = torch.device("cpu")


def networks(negative=False, faster=False, dropout=0.0):
    """Main's LeNet and the plain one with the same, somewhat random state."""
    torch.manual_seed(5)
    network = main.LeNet(dropout)
    for norm in network.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            if negative:
                norm.weight.data[::3] *= -1
    plain = plain_with([value.numpy() for value in network.state_dict().values()])
    if faster:
        network = main.prepare(network, CPU)
        layers = [type(layer) for layer in network.m]
        assert layers.count(main.FasterConvBN) == 2
        assert layers.count(main.FasterDropout) == 1
    return network, plain


@pytest.fixture
def batches(digits):
    """Two batches of 100 normalised images and their labels."""
    pixels, labels = digits
    images = torch.tensor(pixels[:200], dtype=torch.float32).unsqueeze(1)
    images = (images / 255 - 0.1307) / 0.3081
    labels = torch.tensor(labels[:200]).long()
    return list(zip(images.split(100), labels.split(100), strict=True))


# LeNet


def test_has_the_guides_parameters():
    ours, plain = main.LeNet(), PlainLeNet()
    shapes = [parameter.shape for parameter in ours.parameters()]
    assert shapes == [parameter.shape for parameter in plain.parameters()]
    assert sum(shape.numel() for shape in shapes) == 132_220
    dropouts = [m.p for m in main.LeNet(0.4).modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [0.4] * 3


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_computes_what_the_plain_lenet_computes(batches, training, negative, faster):
    network, plain = networks(negative, faster)
    exact = copy.deepcopy(plain).double()
    initial = copy.deepcopy(list(plain.state_dict().values()))
    for images, labels in batches:
        outputs = []
        losses = []
        for model in (network, plain, exact):
            model.train(training).zero_grad()
            output = model(images.to(next(model.parameters()).dtype))
            loss = nn.functional.cross_entropy(output, labels)
            loss.backward()
            outputs.append(output)
            losses.append(loss)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        parameters = [model.parameters() for model in (network, plain, exact)]
        for ours, theirs, true in zip(*parameters, strict=True):
            # As exact as float32 is here: some gradients cancel out, nearly or wholly.
            error = (ours.grad - true.grad).norm()
            usual = (theirs.grad - true.grad).norm()
            assert error <= 3 * usual + 3e-6 * true.grad.norm() + 1e-7
    final = list(network.state_dict().values())
    for ours, theirs in zip(final, plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    changed = [
        not torch.equal(old, new) for old, new in zip(initial, final, strict=True)
    ]
    assert sum(changed) == (9 if training else 0)  # mean, variance, count of 3 norms


# The statistics of a batch


@pytest.mark.parametrize("count", [2, 15, 16, 17, 48, 63])
def test_moments_and_their_gradient(count):
    torch.manual_seed(3)
    values = torch.randn(count, 5, dtype=torch.float64, requires_grad=True)
    mean, variance = main.ChannelMoments.apply(values)
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(variance, values.var(0, unbiased=False))
    assert torch.autograd.gradcheck(main.ChannelMoments.apply, values)


def test_moments_are_exact_where_the_mean_is_large():
    torch.manual_seed(4)
    values = 1000 + torch.randn(4096, 3)
    _, variance = main.ChannelMoments.apply(values)
    expected = values.double().var(0, unbiased=False)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [5, 6])  # 2 x 3 x 3 pixels, and 2 x 4 x 4
@pytest.mark.parametrize("negative", [False, True])
def test_gradients_of_a_faster_block(size, negative):
    torch.manual_seed(6)
    block = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=2),
        nn.Dropout(0.0),
    ).double()
    assert main.is_convbn(block)
    if negative:
        block[1].weight.data[1] = -0.7
    faster = main.FasterConvBN(*copy.deepcopy(block)).train()
    x = torch.randn(2, 2, size, size, dtype=torch.float64, requires_grad=True)
    parameters = list(faster.parameters())
    torch.testing.assert_close(faster(x), block.train()(x))
    assert torch.autograd.gradcheck(lambda x, *_: faster(x), (x, *parameters))


@pytest.mark.parametrize(
    "place, layer",
    [
        (0, nn.Conv2d(20, 50, 5, bias=False)),
        (1, nn.BatchNorm2d(50, affine=False)),
        (1, nn.BatchNorm2d(50, momentum=None)),
        (2, nn.LeakyReLU()),
        (3, nn.AvgPool2d(2)),
    ],
)
def test_a_block_that_was_edited_stays_as_it_is(place, layer):
    model = main.LeNet()
    edited = model.m[1]
    edited[place] = layer
    prepared = main.prepare(model, CPU)
    assert prepared.m[1] is edited
    assert prepared(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# Dropout


def five_sigma(share, count):
    return 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_dropout_keeps_and_scales(p, layout):
    torch.manual_seed(7)
    dropout = main.FasterDropout(p).train()
    ones = torch.ones(200, 50, 10, 10).to(memory_format=layout).requires_grad_()
    output = dropout(ones)
    assert output.shape == ones.shape
    assert output.is_contiguous(memory_format=layout)
    kept = output.detach() != 0
    values = output.detach()[kept]
    expected = torch.full_like(values, 1 / (1 - p))
    torch.testing.assert_close(values, expected, rtol=2e-5, atol=0)
    assert abs(output.mean().item() - 1) < five_sigma(p, kept.numel()) / (1 - p)
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
    assert torch.equal(ones.grad, output.detach())
    again = dropout(ones)
    both = ((again != 0) & kept).double().mean().item()
    assert abs(both - (1 - p) ** 2) < five_sigma((1 - p) ** 2, kept.numel())


def test_dropout_scales_values_and_gradients_alike():
    torch.manual_seed(8)
    x = torch.randn(33, 7, requires_grad=True)  # not a multiple of four
    upstream = torch.randn(33, 7)
    output = main.FasterDropout(0.25).train()(x)
    output.backward(upstream)
    mask = torch.where(output == 0, 0.0, 1 / 0.75)
    assert 0 < (output == 0).sum() < x.numel()
    torch.testing.assert_close(output, x * mask)
    torch.testing.assert_close(x.grad, upstream * mask)


def test_dropout_is_the_identity_where_it_is_off():
    x = torch.randn(64, 3, 5, 5)
    assert torch.equal(main.FasterDropout(0.5).eval()(x), x)
    assert torch.equal(main.FasterDropout(0.0).train()(x), x)
    network, plain = networks(dropout=0.5, faster=True)
    images = torch.randn(8, 1, 28, 28)
    torch.testing.assert_close(network.eval()(images), plain.eval()(images))
    network.train()
    assert not torch.equal(network(images), network(images))
