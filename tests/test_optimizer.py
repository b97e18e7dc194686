"""Muon for hidden layers and Adam for the rest, against PyTorch's own."""

import copy

import pytest
import torch
from torch import nn

import cflow
from cflow import nets
from cflow.training.optimizer import BETAS, MuonAdam, hidden_weights, make_optimizer, orthogonal, set_learning_rate


def gradients(net: nn.Module, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=draws)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_steps_are_those_of_pytorch(shape):
    ours = nn.Linear(*shape)
    theirs = copy.deepcopy(ours)
    optimizer = MuonAdam([ours.weight], [ours.bias], lr=0.01, dtype=torch.bfloat16)
    muon = torch.optim.Muon(
        [theirs.weight],
        lr=0.02,  # our steps are twice as long
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.Adam([theirs.bias], lr=0.01, betas=BETAS, fused=True)
    for seed in range(4):
        for net in (ours, theirs):
            gradients(net, seed)
        optimizer.step()
        muon.step()
        adam.step()
    assert torch.equal(ours.bias, theirs.bias)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-3)  # of steps of 0.01 · 0.2 · 3 each


def test_singular_values_come_close_to_one():
    torch.manual_seed(0)
    for rows, columns in ((8, 30), (30, 8), (16, 16)):
        u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
        s = torch.logspace(0, -2, u.shape[1])
        made = orthogonal(u * s @ v)
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.6
        assert values.max() < 1.3
        # the directions stay: U' made V is diagonal
        rotated = u.mT @ made @ v.mT
        assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-4


def test_a_saved_state_goes_on_bit_for_bit():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = MuonAdam([net[1].weight], [net[0].weight, net[0].bias, net[1].bias], lr=0.01)
    for seed in range(2):
        gradients(net, seed)
        optimizer.step()
    other, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    resumed = MuonAdam([other[1].weight], [other[0].weight, other[0].bias, other[1].bias], lr=0.5)
    resumed.load_state_dict(state)
    for seed in (2, 3):
        for each, steps in ((net, optimizer), (other, resumed)):
            gradients(each, seed)
            for group in steps.param_groups:
                group["lr"] = 0.02
            steps.step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_convolution_is_a_matrix_with_a_row_for_each_channel():
    conv = nn.Conv2d(3, 4, 2)
    matrix = nn.Linear(12, 4)
    with torch.no_grad():
        matrix.weight.copy_(conv.weight.flatten(1))
    gradients(conv, 0)
    matrix.weight.grad = conv.weight.grad.flatten(1)
    MuonAdam([conv.weight, matrix.weight], [conv.bias], lr=0.1).step()
    torch.testing.assert_close(conv.weight.flatten(1), matrix.weight)


def test_every_parameter_is_learned_once():
    vae = nets.build_vae(latent_dim=4, width=16, potential="quadratic", solenoidal="skew")
    optimizer = make_optimizer("muon", vae, lr=0.01)
    muon, adam = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert sorted(muon + adam) == sorted(id(p) for p in vae.parameters())
    assert [tuple(p.shape) for p in hidden_weights(vae.encoder, vae.decoder)] == [(8, 16), (8, 8), (8, 4), (16, 8)]
    before = [p.clone() for p in vae.parameters()]
    vae.elbo(torch.rand(6, 3, 3, 28, 28), torch.tensor([0, 1, 2, 0, 1, 2])).loss.backward()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert all((p != old).any() for p, old in zip(vae.parameters(), before, strict=True))


def test_an_unknown_optimizer_is_named():
    vae = nets.build_vae(latent_dim=4, width=16)
    with pytest.raises(cflow.ArgumentError, match=r"model\.optimizer: expected adam or muon, got 'sgd'"):
        make_optimizer("sgd", vae, lr=0.01)


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_the_flow_learns_at_a_rate_of_its_own(name):
    """The first step of Adam is as long as its learning rate."""
    vae = nets.build_vae(latent_dim=4, width=16, potential="quadratic", solenoidal="skew")
    optimizer = make_optimizer(name, vae, lr=1.0, flow_lr=0.25)
    learned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(learned) == sorted(id(p) for p in vae.parameters())
    before = {id(p): p.detach().clone() for p in vae.parameters()}
    gradients(vae, 0)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    flow = {id(p) for p in vae.flow.parameters()}
    hidden = {id(p) for p in hidden_weights(vae.encoder, vae.decoder)} if name == "muon" else set()
    for p in vae.parameters():
        if id(p) not in hidden:
            moved = (p - before[id(p)]).abs()
            torch.testing.assert_close(
                moved, torch.full_like(p, 0.0025 if id(p) in flow else 0.01), rtol=1e-2, atol=1e-6
            )
