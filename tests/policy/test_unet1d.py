"""The U-Net: published size, lengths of its levels, an oracle of its blocks, nothing computed in vain."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.unet1d import FEW_ROWS, ConditionalUnet1D, Conv1d, FiLMBlock, Lengthen


def small(**options: Any) -> ConditionalUnet1D:
    torch.manual_seed(0)
    return ConditionalUnet1D(2, 5, obs_steps=2, **({"channels": (16, 32, 64), "step_dim": 16} | options))


def inputs(horizon: int = 16, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, horizon, 2), torch.zeros(batch), torch.randn(batch, 2, 5)


def expected_parameters(action_dim: int, cond: int, channels: tuple[int, ...], step_dim: int) -> int:
    """Counted from the description: 5-wide convolutions with bias, group norms, FiLM, shortcuts, resampling."""

    def block(i: int, o: int) -> int:
        convolutions = 5 * i * o + o + 5 * o * o + o
        return convolutions + 4 * o + (cond + 1) * 2 * o + (0 if i == o else i * o + o)

    def level(i: int, o: int) -> int:
        return block(i, o) + block(o, o)

    ways = list(zip((action_dim, *channels), channels, strict=False))
    total = step_dim * 4 * step_dim + 4 * step_dim + 4 * step_dim * step_dim + step_dim
    total += sum(level(i, o) for i, o in ways) + sum(3 * c * c + c for c in channels[:-1])
    total += level(channels[-1], channels[-1])
    total += sum(level(2 * o, i) + 4 * i * i + i for i, o in ways[1:])
    first = channels[0]
    return total + 5 * first * first + first + 2 * first + first * action_dim + action_dim


@pytest.mark.parametrize(
    ("action_dim", "cond_dim", "channels", "step_dim", "millions"),
    [
        (2, 20, (256, 512, 1024), 256, (64, 66)),  # PushT's state
        (10, 19, (256, 512, 1024), 256, (64, 66)),  # Lift's state, absolute actions
        (10, 137, (512, 1024, 2048), 128, (250, 260)),  # Lift's images
    ],
)
def test_the_parameters_are_those_of_diffusion_policy(
    action_dim: int, cond_dim: int, channels: tuple[int, ...], step_dim: int, millions: tuple[int, int]
) -> None:
    with torch.device("meta"):
        network = ConditionalUnet1D(action_dim, cond_dim, 2, channels=channels, step_dim=step_dim)
    found = sum(parameter.numel() for parameter in network.parameters())
    assert found == expected_parameters(action_dim, step_dim + 2 * cond_dim, channels, step_dim)
    assert millions[0] <= found / 1e6 <= millions[1]


def test_the_defaults_are_the_published_ones() -> None:
    with torch.device("meta"):
        network = ConditionalUnet1D(2, 20, 2)
    assert sum(p.numel() for p in network.parameters()) == expected_parameters(2, 296, (256, 512, 1024), 256)
    assert {m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)} == {8}


def test_the_lengths_are_16_8_4_8_16() -> None:
    network = small()
    lengths: list[int] = []
    for level in [*network.down, network.middle, *network.up]:
        level.register_forward_hook(lambda _, given, out: lengths.append(out.shape[2]))
    assert network(*inputs()).shape == (3, 16, 2)
    assert lengths == [16, 8, 4, 4, 4, 8]
    assert network.out[0][0].in_channels == 16


@pytest.mark.parametrize(
    ("channels", "horizon"), [((32, 64), 8), ((32, 64), 2), ((16, 32, 64), 4), ((16,), 5), ((8, 16, 16, 32), 24)]
)
def test_other_depths_and_horizons_work(channels: tuple[int, ...], horizon: int) -> None:
    x, step, cond = inputs(horizon)
    assert small(channels=channels)(x, step, cond).shape == x.shape


def test_every_parameter_and_every_input_is_used() -> None:
    network = small()
    x, step, cond = inputs()
    x.requires_grad_(), cond.requires_grad_()
    network(x, step + 3, cond).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert x.grad is not None and x.grad.ne(0).all() and cond.grad is not None and cond.grad.ne(0).all()


def test_the_skip_at_full_length_is_not_kept() -> None:
    """The full-length map is freed as soon as it is shortened, so that fewer of them are alive at the bottom."""
    network = small().eval()
    alive: list[Any] = []
    network.down[0].register_forward_hook(lambda _, given, out: alive.append(_weak(out)))
    seen_at_the_bottom: list[bool] = []
    network.middle.register_forward_hook(lambda *_: seen_at_the_bottom.append(alive[0]() is not None))
    with torch.no_grad():
        network(*inputs())
    assert seen_at_the_bottom == [False]


def _weak(tensor: Tensor) -> Any:
    import weakref

    return weakref.ref(tensor)


def test_a_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = FiLMBlock(4, 8, cond_size=3, kernel_size=5, groups=2).double()
    x, condition = torch.randn(2, 4, 6).double(), torch.randn(2, 3).double()

    def conv_norm_mish(part: nn.Sequential, value: Tensor) -> Tensor:
        weight, bias = part[0].weight, part[0].bias
        padded = F.pad(value, (2, 2))
        windows = torch.stack([padded[:, :, t : t + 5] for t in range(6)], dim=2)  # [B, in, T, 5]
        out = torch.einsum("bitk,oik->bot", windows, weight) + bias[:, None]
        grouped = out.reshape(2, 2, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        normed = (centred / (centred.square().mean(2, keepdim=True) + part[1].eps).sqrt()).reshape(out.shape)
        affine = normed * part[1].weight[:, None] + part[1].bias[:, None]
        return affine * torch.tanh(torch.log1p(affine.exp()))

    film = condition @ block.film.weight.T + block.film.bias
    hidden = film[:, :8, None] * conv_norm_mish(block.first, x) + film[:, 8:, None]
    shortcut = torch.einsum("bit,oi->bot", x, block.shortcut.weight[:, :, 0]) + block.shortcut.bias[:, None]
    torch.testing.assert_close(block(x, condition), conv_norm_mish(block.second, hidden) + shortcut)


@pytest.mark.parametrize(("size", "stride"), [(5, 1), (3, 2), (1, 1), (3, 1)])
@pytest.mark.parametrize("length", [2, 4, 16])
def test_few_rows_are_convolved_as_many_are(size: int, stride: int, length: int) -> None:
    torch.manual_seed(0)
    convolution = Conv1d(6, 8, size, stride=stride, padding=size // 2).double()
    _is_its_base(convolution, nn.Conv1d, torch.randn(3, 6, length).double())


@pytest.mark.parametrize("length", [1, 4, 8])
def test_few_rows_are_lengthened_as_many_are(length: int) -> None:
    torch.manual_seed(0)
    _is_its_base(Lengthen(6).double(), nn.ConvTranspose1d, torch.randn(3, 6, length).double())


def _is_its_base(convolution: nn.Module, base: Any, x: Tensor) -> None:
    """Values and gradients are those of PyTorch's own, for few rows and for many."""
    for rows in (x, x.repeat(FEW_ROWS, 1, 1)):
        given = [rows.clone().requires_grad_(), *convolution.parameters()]
        out, expected = convolution(given[0]), base.forward(convolution, given[0])
        torch.testing.assert_close(out, expected)
        weights = torch.randn(expected.shape, dtype=torch.float64)
        found = torch.autograd.grad((out * weights).sum(), given)
        torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), given))


def test_the_shortcut_is_the_identity_where_the_channels_stay() -> None:
    assert isinstance(FiLMBlock(8, 8, cond_size=3, kernel_size=5, groups=2).shortcut, nn.Identity)


def test_rows_do_not_mix_and_the_step_matters() -> None:
    network = small().double()
    x, step, cond = (part.double() for part in inputs())
    out = network(x, step, cond)
    torch.testing.assert_close(network(x[1:2], step[1:2], cond[1:2]), out[1:2])
    assert (network(x, step + 1, cond) - out).abs().max() > 1e-4


def test_at_the_start_the_output_varies_little_with_the_noise() -> None:
    """The small spread in which a drifting policy starts: 0.07-0.09 over the noise, of a mean of some 0.2-0.35."""
    torch.manual_seed(0)
    network = ConditionalUnet1D(2, 20, 2, channels=(64, 128, 256))
    with torch.no_grad():
        out = network(torch.randn(64, 16, 2), torch.zeros(64), torch.randn(1, 2, 20).expand(64, -1, -1))
    assert 0.05 < out.std(0).mean() < 0.12
    assert out.mean(0).abs().mean() > out.std(0).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (16, 30)}, r"multiples of groups = 8, got \(16, 30\)"),
        ({"channels": ()}, "levels must be at least 1, got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd.* got 4"),
        ({"step_dim": 7}, "even and at least 4, got 7"),
    ],
)
def test_impossible_networks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_horizon_that_does_not_halve_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4 for 3 levels, got 10"):
        small()(*inputs(10))
