"""Velocity fields on flat samples: linear, plain MLP (the paper's), residual MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flows.networks.base import LabelShift, TimeFeatures, Velocity, VelocityConfig, zero_


class LinearVelocity(Velocity):
    """v(z) = A z + b: the field whose map and log-det are known, expm(A) and tr A.

    With classes every class has its own b.
    """

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        super().__init__(shape, config.classes)
        self.affine = nn.Linear(self.dim, self.dim)
        self.label = LabelShift(config.classes, self.dim, zero=config.zero_init)
        if config.zero_init:
            zero_(self.affine)

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`Velocity`; t is not used."""
        return self.label(self.affine(z.flatten(1)), labels).view_as(z)


class MlpVelocity(Velocity):
    """A plain MLP on (z, t), and the class, as in the paper's two-dimensional experiments."""

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        super().__init__(shape, config.classes)
        widths = config.hidden
        self.first = nn.Linear(self.dim + 1, widths[0])
        self.label = LabelShift(config.classes, widths[0])
        self.middle = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.last = nn.Linear(widths[-1], self.dim)
        self.activation = config.activation_or("softplus20")
        #: of the softplus; None for another activation
        betas = {"default": 20.0, "softplus20": 20.0, "softplus": 1.0}
        self.beta = betas.get(config.activation)
        if config.zero_init:
            zero_(self.last)

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`Velocity`."""
        first = self.first
        bias = self.label(first.bias, labels)
        # W (z, t) = W_z z + t w_t: the time goes into the bias and no concatenated copy is made.
        # The copy of the transpose lets the gradients' products run in the quick order: with few
        # inputs, BLAS takes several times longer in the other.
        weight, column = first.weight[:, : self.dim].t().contiguous(), first.weight[:, self.dim]
        if t.dim() == 0:
            hidden = torch.addmm(bias + t * column, z.flatten(1), weight)
        else:
            hidden = torch.addmm(bias, z.flatten(1), weight) + t[:, None] * column
        for layer in self.middle:
            hidden = layer(self.activation(hidden))
        return self.last(self.activation(hidden)).view_as(z)

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Velocity`; for softplus by hand: the derivative is the sigmoid's multiple.

        With p = βx, softplus_β(x) = softplus(p) / β, so β goes into the first and last weights
        and the biases, and activations are plain softplus.
        """
        if self.beta is None:
            return super().directional(t, z, tangents, labels)
        beta, first, last = self.beta, self.first, self.last
        weight = (beta * first.weight[:, : self.dim]).t().contiguous()  # as in forward
        bias = beta * (self.label(first.bias, labels) + t * first.weight[:, self.dim])
        p = torch.addmm(bias, z.flatten(1), weight)
        q = torch.matmul(tangents.flatten(2), weight)
        for layer in self.middle:
            assert isinstance(layer, nn.Linear)
            y, r = SoftplusPair.apply(p, q)
            p, q = F.linear(y, layer.weight, beta * layer.bias), F.linear(r, layer.weight)
        y, r = SoftplusPair.apply(p, q)
        weight = last.weight / beta
        return F.linear(y, weight, last.bias).view_as(z), F.linear(r, weight).view_as(tangents)


class SoftplusPair(torch.autograd.Function):
    """Softplus and the tangents it passes on: (p, q) → (softplus(p), q σ(p)).

    p is (B, W), q is (n, B, W). The sigmoid is computed once for value, tangents and gradient;
    the work is done in place wherever a buffer is free.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Computes softplus(p) = max(p, 0) − log max(σ(p), 1 − σ(p)), and q σ(p)."""
        s = torch.sigmoid(p)
        log_larger = torch.sub(s, 0.5).abs_().sub_(0.5).log1p_()
        ctx.save_for_backward(s, q)
        return torch.relu(p).sub_(log_larger), q * s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_r: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """By the chain rule, dp = σ (dy + (1 − σ) Σ_n dr q), dq = dr σ."""
        s, q = ctx.saved_tensors
        product = grad_r * q
        grad_s = product[0] if len(q) == 1 else product.sum(dim=0)
        grad_p = torch.addcmul(grad_s, grad_s, s, value=-1).add_(grad_y).mul_(s)
        return grad_p, torch.mul(grad_r, s, out=product)


class ResidualLayer(nn.Module):
    """x ← x + W₂ σ(W₁ (LN(x) ⊙ (1 + a(t)) + b(t)) + c)."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Maps x (B, W), with scale and shift (1 or B, W), to (B, W)."""
        branch = self.activation(self.up(_modulated_norm(x, scale, shift)))
        # addmm adds the branch to the stream inside the matrix product.
        return torch.addmm(x, branch, self.down.weight.t())


class ResidualMlpVelocity(Velocity):
    """A residual MLP whose normalisations are scaled and shifted by the time.

    ``depth`` residual layers between a linear map in and a linear map out. The residual stream is
    never normalised, so v may grow linearly in z, as the exact field of a Gaussian does.
    """

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        super().__init__(shape, config.classes)
        width = config.width
        self.activation = config.activation_or("silu")
        self.features = TimeFeatures(config.time_features, config.classes)
        self.time = nn.Linear(config.time_features, width)
        self.modulation = nn.Linear(width, 2 * width * config.depth)
        self.input = nn.Linear(self.dim, width)
        self.layers = nn.ModuleList(
            ResidualLayer(width, self.activation) for _ in range(config.depth)
        )
        self.output = nn.Linear(width, self.dim)
        zero_(self.modulation)
        if config.zero_init:
            zero_(self.output)

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`Velocity`."""
        hidden = self.input(z.flatten(1))
        embedding = self.activation(self.time(self.features(t, labels)))
        modulations = self.modulation(embedding).chunk(len(self.layers), dim=1)
        for layer, modulation in zip(self.layers, modulations, strict=True):
            hidden = layer(hidden, *modulation.chunk(2, dim=1))
        return self.output(hidden).view_as(z)


def _modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(x) ⊙ (1 + scale) + shift, in one kernel when all samples share the time."""
    width = (x.shape[-1],)
    if unpack_dual(x).tangent is not None:
        # Under forward mode, torch's own gradient of layer_norm's derivative is wrong (seen in
        # 2.13: it takes mean and deviation for constants), so the norm is spelled out.
        centred = x - x.mean(dim=-1, keepdim=True)
        normed = centred * (centred.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
        return torch.addcmul(shift, normed, 1 + scale)
    if scale.shape[0] == 1:
        return F.layer_norm(x, width, 1 + scale[0], shift[0])
    return torch.addcmul(shift, F.layer_norm(x, width), 1 + scale)
