"""Velocity fields on flat samples: a linear field, an MLP and a residual MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.layers import (
    ClassEmbedding,
    ContextFeatures,
    has_tangent,
    layer_norm,
    zero_,
)


class LinearVelocity(Velocity):
    """An affine field v(z) = A z + b, whose map has the Jacobian expm(A) and the log-det tr A.

    With classes, b depends on the class: v(z, y) = A z + b + e(y). Samples are flattened.
    """

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        super().__init__(shape, config.classes)
        self.affine = nn.Linear(self.dim, self.dim)
        self.label = ClassEmbedding(config.classes, self.dim, zero=config.zero_init)
        if config.zero_init:
            zero_(self.affine)

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate A z + b at z (B, *shape); the field does not depend on t."""
        return self.label(self.affine(z.flatten(1)), labels).view_as(z)


class MlpVelocity(Velocity):
    """A multilayer perceptron on (z, t), with ``depth`` hidden layers of ``width`` features.

    In the paper's two-dimensional experiments it has 3 layers of 128 features, with softplus of
    β = 20, and in the authors' released code it does not see t. With ``autonomous`` it does not
    see t here either.
    """

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        super().__init__(shape, config.classes)
        (width,) = config.widths
        self.autonomous = config.autonomous
        self.first = nn.Linear(self.dim + (not self.autonomous), width)
        self.label = ClassEmbedding(config.classes, width)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth - 1))
        self.last = nn.Linear(width, self.dim)
        self.activation = config.activation_or("softplus20")
        betas = {"default": 20.0, "softplus20": 20.0, "softplus": 1.0}
        self.beta = betas.get(config.activation)  # None if the activation is not a softplus
        if config.zero_init:
            zero_(self.last)

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the network at z (B, *shape); see :class:`Velocity`."""
        first = self.first
        bias = self.label(first.bias, labels)
        # W (z, t) = W_z z + t w_t: t enters the bias, so z and t need not be concatenated. A
        # contiguous transpose makes the matrix products of the backward pass several times faster
        # when D is small.
        weight = first.weight[:, : self.dim].t().contiguous()
        if self.autonomous:
            hidden = torch.addmm(bias, z.flatten(1), weight)
        elif t.dim() == 0:
            column = first.weight[:, self.dim]
            hidden = torch.addmm(bias + t * column, z.flatten(1), weight)
        else:
            column = first.weight[:, self.dim]
            hidden = torch.addmm(bias, z.flatten(1), weight) + t[:, None] * column
        for layer in self.middle:
            hidden = layer(self.activation(hidden))
        return self.last(self.activation(hidden)).view_as(z)

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the derivatives (n, B, *shape) by the chain rule; see :class:`Velocity`.

        The softplus with β is softplus(βx) / β. Moving the factors β into the first and the last
        weights and the biases leaves the plain softplus of p = βx. Its derivative is the sigmoid.
        """
        if self.beta is None:
            return super().directional(t, z, tangents, labels)
        beta, first, last = self.beta, self.first, self.last
        weight = (beta * first.weight[:, : self.dim]).t().contiguous()  # as in forward
        bias = self.label(first.bias, labels)
        if not self.autonomous:
            bias = bias + t * first.weight[:, self.dim]
        bias = beta * bias
        p = torch.addmm(bias, z.flatten(1), weight)
        q = torch.matmul(tangents.flatten(2), weight)
        for layer in self.middle:
            assert isinstance(layer, nn.Linear)
            y, r = SoftplusJvp.apply(p, q)
            p, q = F.linear(y, layer.weight, beta * layer.bias), F.linear(r, layer.weight)
        y, r = SoftplusJvp.apply(p, q)
        weight = last.weight / beta
        return F.linear(y, weight, last.bias).view_as(z), F.linear(r, weight).view_as(tangents)


class SoftplusJvp(torch.autograd.Function):
    """The softplus and its Jacobian-vector products: (p, q) → (softplus(p), q σ(p)).

    p is (B, W), the tangents q are (n, B, W). The value, the products and the gradient share one
    sigmoid, and buffers are reused in place.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Compute max(p, 0) − log max(σ(p), 1 − σ(p)), (B, W), and q σ(p), (n, B, W)."""
        s = torch.sigmoid(p)
        log_larger = torch.sub(s, 0.5).abs_().sub_(0.5).log1p_()
        ctx.save_for_backward(s, q)
        return torch.relu(p).sub_(log_larger), q * s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_r: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Compute dp = σ (dy + (1 − σ) Σ_n dr q), (B, W), and dq = dr σ, (n, B, W)."""
        s, q = ctx.saved_tensors
        product = grad_r * q
        grad_s = product[0] if len(q) == 1 else product.sum(dim=0)
        grad_p = torch.addcmul(grad_s, grad_s, s, value=-1).add_(grad_y).mul_(s)
        return grad_p, torch.mul(grad_r, s, out=product)


class ResidualLayer(nn.Module):
    """A residual layer x + W₂ σ(W₁ (LN(x) ⊙ (1 + a) + b) + c), with scale a and shift b."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        """Apply the layer to x (B, W), with a and b together, (1, 2W) or (B, 2W), or a = b = 0."""
        if modulation is None:
            scale = shift = x.new_zeros(1, x.shape[1])
        else:
            scale, shift = modulation.chunk(2, dim=1)
        branch = self.activation(self.up(_modulated_norm(x, scale, shift)))
        # addmm adds the branch to the stream inside the matrix product.
        return torch.addmm(x, branch, self.down.weight.t())


class ResidualMlpVelocity(Velocity):
    """A residual MLP whose normalised features are scaled and shifted by functions of t.

    ``depth`` residual layers lie between a linear input map and a linear output map. The residual
    stream is never normalised, so v may grow linearly in z, as the exact field of a Gaussian does.
    """

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        super().__init__(shape, config.classes)
        (width,) = config.widths
        self.activation = config.activation_or("silu")
        self.features = ContextFeatures(config)
        if not self.features.empty:
            self.time = nn.Linear(config.time_features, width)
            self.modulation = nn.Linear(width, 2 * width * config.depth)
            zero_(self.modulation)
        self.input = nn.Linear(self.dim, width)
        self.layers = nn.ModuleList(
            ResidualLayer(width, self.activation) for _ in range(config.depth)
        )
        self.output = nn.Linear(width, self.dim)
        if config.zero_init:
            zero_(self.output)

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the network at z (B, *shape); see :class:`Velocity`."""
        hidden = self.input(z.flatten(1))
        context = self.features(t, labels)
        modulations: Sequence[Tensor | None] = [None] * len(self.layers)
        if context is not None:
            embedding = self.activation(self.time(context))
            modulations = self.modulation(embedding).chunk(len(self.layers), dim=1)
        for layer, modulation in zip(self.layers, modulations, strict=True):
            hidden = layer(hidden, modulation)
        return self.output(hidden).view_as(z)


def _modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute LN(x) ⊙ (1 + scale) + shift for x (B, W), scale and shift (1, W) or (B, W)."""
    if scale.shape[0] == 1 and not has_tangent(x):  # all samples share the time: one kernel
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0])
    return torch.addcmul(shift, layer_norm(x), 1 + scale)
