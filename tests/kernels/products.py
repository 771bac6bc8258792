"""Matrix products to compare with: random operands, and the formula in float64."""

import itertools

import torch

EPS = 1e-5


def squares_of(x, parts=5):
    """Sums of squares of the rows of x in unequal parts, [parts, rows]."""
    cuts = [x.shape[-1] * part**2 // parts**2 for part in range(parts + 1)]
    return torch.stack([x[:, a:b].float().square().sum(-1) for a, b in itertools.pairwise(cuts)])


def make_product(m, n, k, dtype, device, bias=True):
    x = torch.randn(m, k, device=device).to(dtype)
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    return x, weight, torch.randn(n, device=device).to(dtype) if bias else None


def expected_product(x, weight, bias=None, gated=False, normed=False):
    x = x.double()
    if normed:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    both = x @ weight.double().T
    if bias is not None:
        both = both + bias.double()
    if not gated:
        return both
    gate, up = both.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up
