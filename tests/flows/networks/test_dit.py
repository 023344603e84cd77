"""The transformer of patches against diffusers' DiT, and its fused attention against products."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from flows.block import Block
from flows.errors import FlowError
from flows.net2net import widening_factor
from flows.networks.config import VelocityConfig
from flows.networks.dit import DitVelocity, attend
from flows.networks.layers import ContextFeatures
from flows.networks.registry import make_velocity
from flows.objectives.losses import jko_loss
from flows.solving.estimators import Exact, FiniteDifference, Hutchinson
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block

CONFIG = VelocityConfig("dit", 16, 2, heads=2, patch=2, classes=5, time_features=8)
SHAPE = (3, 8, 8)


def build(shape: tuple[int, ...] = SHAPE, **changes) -> DitVelocity:
    """A network in float64, none of whose weights are zero."""
    config = VelocityConfig(**{**vars(CONFIG), **changes})
    network = make_velocity(config, shape, torch.Generator().manual_seed(0)).double()
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=source).double()
    assert isinstance(network, DitVelocity)
    return network


def draw(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


class Features(nn.Module):
    """Our features of the time in place of diffusers'."""

    def __init__(self, ours: ContextFeatures) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, t: Tensor) -> Tensor:
        features = self.ours(t)
        assert features is not None
        return features


_NAMES = (
    (r"^input\.", "pos_embed.proj."),
    (r"^output\.", "proj_out_2."),
    (r"^modulation\.linear\.", "proj_out_1."),
    (r"^blocks\.(\d+)\.modulation\.linear\.", r"transformer_blocks.\1.norm1.linear."),
    (r"^blocks\.(\d+)\.out\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"^blocks\.(\d+)\.up\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"^blocks\.(\d+)\.down\.", r"transformer_blocks.\1.ff.net.2."),
)


def theirs(network: DitVelocity, config: VelocityConfig) -> nn.Module:
    """diffusers' model with the same weights; each of its blocks has a copy of the embeddings."""
    models = pytest.importorskip(
        "diffusers", reason="the optional extra diffusers is not installed"
    )
    (width,) = config.widths
    model = models.DiTTransformer2DModel(
        num_attention_heads=config.heads, attention_head_dim=width // config.heads,
        in_channels=SHAPE[0], out_channels=SHAPE[0], num_layers=config.depth,
        sample_size=SHAPE[1], patch_size=config.patch, num_embeds_ada_norm=config.classes,
        norm_eps=1e-6,
    ).double().eval()  # fmt: skip
    state = {}
    for name, value in network.state_dict().items():
        if match := re.match(r"blocks\.(\d+)\.qkv\.(.*)", name):
            for part, third in zip("qkv", value.chunk(3), strict=True):
                state[f"transformer_blocks.{match[1]}.attn1.to_{part}.{match[2]}"] = third
            continue
        for index in range(config.depth):
            embeddings = f"transformer_blocks.{index}.norm1.emb."
            if match := re.match(r"time\.([02])\.(.*)", name):
                part = f"timestep_embedder.linear_{1 if match[1] == '0' else 2}.{match[2]}"
                state[embeddings + part] = value
            if name == "label.embedding.weight":
                state[embeddings + "class_embedder.embedding_table.weight"] = value
        for pattern, new in _NAMES:
            if re.match(pattern, name):
                state[re.sub(pattern, new, name)] = value
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj = Features(network.features)
        first = nn.Linear(config.time_features, width, dtype=torch.float64)
        block.norm1.emb.timestep_embedder.linear_1 = first
    assert set(state) == set(model.state_dict())
    model.load_state_dict(state)
    return model


def test_it_equals_the_dit_of_diffusers_with_the_same_weights() -> None:
    network = build()
    model = theirs(network, CONFIG)
    z, t, labels = draw(6, *SHAPE), torch.linspace(0, 1, 6).double(), torch.arange(6)
    with torch.no_grad():
        ours, expected = network(t, z, labels), model(z, t, labels).sample
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.1


def test_the_gradients_equal_those_of_diffusers() -> None:
    network = build()
    model = theirs(network, CONFIG)
    z, t, labels = draw(4, *SHAPE), torch.full((4,), 0.3).double(), torch.arange(4)
    network(t, z, labels).square().sum().backward()
    model(z, t, labels).sample.square().sum().backward()
    for ours, expected in (
        (network.input.weight, model.pos_embed.proj.weight),
        (network.blocks[1].out.weight, model.transformer_blocks[1].attn1.to_out[0].weight),
        (network.output.weight, model.proj_out_2.weight),
    ):
        scale = float(expected.grad.abs().max())
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-5 * scale)


def test_fused_attention_is_that_of_plain_products() -> None:
    query, key, value = draw(3, 2, 2, 9, 4)
    torch.testing.assert_close(
        attend(query, key, value, True), attend(query, key, value, False), rtol=1e-10, atol=1e-10
    )


def test_only_derivatives_in_z_take_plain_products(monkeypatch) -> None:
    """Training by regression and sampling are fused; both ways have the same field."""
    network, z, labels = build(), draw(2, *SHAPE), torch.arange(2)
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a: calls.append(1) or fused(*a),
    )
    t = torch.tensor(0.4, dtype=torch.float64)
    plain = network(t, z.clone().requires_grad_(), labels)
    assert not calls
    torch.testing.assert_close(network(t, z, labels), plain, rtol=1e-9, atol=1e-9)
    assert len(calls) == CONFIG.depth
    network.directional(t, z, draw(1, 2, *SHAPE), labels)
    assert len(calls) == CONFIG.depth


@pytest.mark.parametrize("autonomous", [True, False])
@pytest.mark.parametrize("estimator", [Exact(), Hutchinson(), FiniteDifference(sigma0=1e-3)])
def test_every_divergence_of_jko_has_the_gradient_of_the_exact_one(estimator, autonomous) -> None:
    """With all basis vectors as probes, each estimator is exact up to its step."""
    shape = (1, 2, 2)
    network = build(shape, patch=1, classes=0, autonomous=autonomous, depth=1)
    block = Block(network, SolverConfig("midpoint", steps=1))
    z = draw(3, *shape)
    basis = torch.eye(4).double().view(4, 1, *shape).expand(4, 3, *shape) * 2
    probes = None if isinstance(estimator, Exact) else basis
    if isinstance(estimator, Hutchinson):
        estimator = Hutchinson(probes=4)
    elif isinstance(estimator, FiniteDifference):
        estimator = FiniteDifference(sigma0=1e-4, probes=4)
    given = {} if probes is None else {"eps": probes}
    gradients = []
    for divergence, extra in ((Exact(), {}), (estimator, given)):
        block.zero_grad()
        jko_loss(block, z, 0.5, divergence, **extra).total.backward()
        gradients.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
    expected, ours = (torch.cat([g.flatten() for g in side]) for side in gradients)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_grid_of_any_sides_and_positions_of_row_and_column() -> None:
    """Equal tokens differ by their positions alone, so no two outputs are equal."""
    network = build((1, 2, 6), patch=1, classes=0)
    out = network(torch.tensor(0.2).double(), torch.ones(1, 1, 2, 6).double())
    assert len(out.flatten().unique()) == 12
    assert float(network.positions.square().sum(1).std()) < 1e-6  # sin² + cos²


@pytest.mark.parametrize(
    ("changes", "shape", "words"),
    [
        ({"patch": 3}, SHAPE, "velocity.patch=3 does not divide a grid of 8x8"),
        ({"heads": 3}, SHAPE, "velocity.heads 3 .* multiple of 12"),
        ({"heads": 0}, SHAPE, "at least 1 head"),
        ({"width": 6, "heads": 1}, SHAPE, "velocity.width is 6 .* multiple of 4"),
        ({"width": (16, 32)}, SHAPE, "velocity.width is .16, 32. for the kind dit"),
        ({}, (12,), r"a dit velocity needs samples of shape \(C, H, W\)"),
    ],
)
def test_a_size_that_does_not_fit_is_one_sentence(changes, shape, words) -> None:
    with pytest.raises(FlowError, match=words):
        make_velocity(VelocityConfig(**{**vars(CONFIG), **changes}), shape)


def test_it_cannot_be_widened_because_its_positions_depend_on_the_width() -> None:
    assert widening_factor(CONFIG, CONFIG.widened(2)) is None
    assert widening_factor(CONFIG, CONFIG) == 1


def test_a_specification_survives_json() -> None:
    import json

    spec = BlockSpec(CONFIG)
    again = BlockSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and isinstance(build_block(again, SHAPE).velocity, DitVelocity)
