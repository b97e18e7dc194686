"""Grad modes, dtypes, copies, and what importing the library loads."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import cflow
from cflow import PotentialFlow, Solver


class Module(torch.nn.Module):
    num_flows = 2

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

    def forward(self, z, t):
        return self.net(torch.cat([z, t[:, None]], 1))


NETS = {
    "mlp": lambda: cflow.MLPPotential(3, 2),
    "ridge": lambda: cflow.RidgePotential(3, 2),
    "quadratic": lambda: cflow.QuadraticPotential(torch.randn(2, 3, 3)),
    "module": Module,
}
SOLVERS = [Solver("rk4", step_size=0.5), Solver("dopri5")]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.method)
def test_results_do_not_depend_on_the_grad_mode(name, solver):
    flow = PotentialFlow(NETS[name](), solver=solver)
    z0 = torch.randn(4, 3)

    def everything():
        path = flow.solve(z0.clone(), 1, [0.0, 1.0, 2.0], log_density=True, kinetic_energy=True)
        at = flow.velocity(z0, 1, 0.3), flow.divergence(z0, 1, 0.3), flow.potential(z0, 0.3)
        return [path.z, path.log_density_change, path.kinetic_energy, *at]

    recorded = everything()
    assert recorded[0].requires_grad
    assert recorded[3].abs().max() > 1e-4
    with torch.no_grad():
        plain = everything()
    with torch.inference_mode():
        inference = everything()
    with torch.inference_mode():
        path = flow.solve(torch.ones(2, 3) * z0[:2], 1, (0.0, 1.0))  # z0 itself is an inference tensor
    assert not torch.equal(path.z[-1], path.z[0])
    for a, b, c in zip(recorded, plain, inference, strict=True):
        assert not b.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NETS)
def test_autocast_and_half_precision_states(name):
    flow = PotentialFlow(NETS[name](), solver=Solver("rk4", step_size=0.5, gradient="adjoint"))
    z0 = torch.randn(4, 3).bfloat16()
    wanted = flow(z0.float(), 1, (0.0, 2.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flow(z0, 1, (0.0, 2.0))
        assert flow.velocity(z0, 1, 0.0).dtype == torch.float32
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in flow.parameters())


def test_dtypes_of_weights_and_times_are_cast():
    flow = PotentialFlow(cflow.MLPPotential(3, 2), solver="dopri5")
    z0 = torch.randn(4, 3)
    wanted = flow(z0, torch.tensor([0.0, 1.0]), (0.0, 1.0))
    assert wanted.dtype == torch.float32
    for k, t in [
        (torch.tensor([0.0, 1.0]).double(), torch.tensor([0, 1])),
        (torch.tensor([0.0, 1.0]).half(), [0, 1.0]),
    ]:
        torch.testing.assert_close(flow(z0, k, t), wanted)
    double = copy.deepcopy(flow).double()
    torch.testing.assert_close(double(z0.double(), 1, (0.0, 1.0)).float(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_copies(name):
    flow = PotentialFlow(NETS[name](), solver=Solver("rk4", step_size=0.5))
    z0 = torch.randn(2, 3)
    wanted = flow(z0, 1, (0.0, 1.0))
    other = PotentialFlow(NETS[name](), solver=flow.solver)
    other.load_state_dict(flow.state_dict())
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), other):
        torch.testing.assert_close(twin(z0, 1, (0.0, 1.0)), wanted)
    with torch.no_grad():
        next(iter(flow.parameters())).mul_(2)
    assert not torch.allclose(flow(z0, 1, (0.0, 1.0)), wanted)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_empty_batch(method):
    flow = PotentialFlow(cflow.MLPPotential(3, 2), solver=Solver(method, step_size=1.0 if method == "rk4" else None))
    path = flow.solve(torch.zeros(0, 3), 1, [0.0, 1.0, 2.0], log_density=True, kinetic_energy=True)
    assert (path.z.shape, path.log_density_change.shape, path.kinetic_energy.shape) == ((3, 0, 3), (3, 0), (3, 0))
    assert flow(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), (0.0, 1.0)).shape == (0, 3)


def test_a_users_module_gets_times_of_the_batch_in_the_potentials_dtype():
    class Strict(Module):
        def forward(self, z, t):
            assert t.shape == (len(z),)
            assert t.dtype == z.dtype
            return super().forward(z, t)

    for solver in SOLVERS:
        flow = PotentialFlow(Strict(), solver=solver)
        flow.solve(torch.randn(3, 3), 1, (0.0, 1.0), log_density=True).z.sum().backward()
        flow.potential(torch.randn(3, 3), 0)


def test_number_of_flows_is_read_from_the_first_output():
    class Unnamed(torch.nn.Module):
        def forward(self, z, t):
            return torch.stack([z.sum(1), z.square().sum(1)], 1)

    flow = PotentialFlow(Unnamed())
    with pytest.raises(cflow.ArgumentError, match="num_flows"):
        _ = flow.num_flows
    assert flow.velocity(torch.ones(2, 3), 0, 0.0).eq(1).all()
    assert flow.num_flows == 2


def test_importing_cflow_loads_no_optional_dependency():
    code = (
        "import sys, cflow, cflow.data, cflow.metrics\n"
        "heavy = {'torchvision', 'matplotlib', 'lightning', 'pytorch_lightning', 'sklearn', 'h5py'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
