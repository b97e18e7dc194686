"""A user's own module as potential: what it may hold and do, and what is said where it cannot work."""

import copy
import sys
import threading

import pytest
import torch
from cases import GRADIENTS, Users, rk4
from torch import nn
from torch.utils.checkpoint import checkpoint

import cflow
from cflow import PotentialFlow, Solver

pytestmark = pytest.mark.usefixtures("float64")

B, D, K = 5, 3, 2


class Net(Users):
    def __init__(self, middle=None):
        super().__init__(D, K, middle)


def gradients(flow, z, log_density=False):
    path = flow.solve(z, torch.tensor([0, 1, 1, 0, 1])[: len(z)], (0.0, 1.0), log_density=log_density)
    loss = path.z[-1].square().sum() + (path.log_density_change[-1].sum() if log_density else 0)
    return torch.autograd.grad(loss, [z, *flow.parameters()], materialize_grads=True, allow_unused=True)


def assert_equal(found, wanted, tolerance=1e-10):
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


@pytest.mark.parametrize("mode", ["discrete", "adjoint"])
def test_threads_that_take_gradients_through_one_flow_do_not_meet(mode):
    flow = PotentialFlow(Net(), solver=rk4(mode))
    starts = [torch.randn(B, D, requires_grad=True) for _ in range(2)]
    wanted = [gradients(flow, z) for z in starts]
    failures = []

    def work(z, exact):
        for _ in range(12):
            try:
                assert_equal(gradients(flow, z), exact)
            except Exception as error:
                failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=pair) for pair in zip(starts, wanted, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures
    assert all(isinstance(p, nn.Parameter) for p in flow.parameters())
    assert all(isinstance(p, nn.Parameter) for m in flow.modules() for p in m._parameters.values())


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("mode", GRADIENTS)
def test_checkpoint_around_a_flow(mode, reentrant):
    for net in (Net(), cflow.MLPPotential(D, K)):
        flow, z = PotentialFlow(net, solver=rk4(mode)), torch.randn(B, D, requires_grad=True)
        wanted = torch.autograd.grad(
            flow(z, 1, (0.0, 1.0)).square().sum(), [z, *flow.parameters()], allow_unused=True, materialize_grads=True
        )
        out = checkpoint(flow, z, 1, (0.0, 1.0), use_reentrant=reentrant)
        out.square().sum().backward()
        found = [torch.zeros_like(x) if x.grad is None else x.grad for x in (z, *flow.parameters())]
        assert_equal(found, wanted)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_checkpoint_around_a_vae(mode):
    flow = PotentialFlow(Net(), solver=rk4(mode))
    vae = cflow.FlowVAE(cflow.nets.MLPEncoder((1, 4, 4), D), cflow.nets.MLPDecoder((1, 4, 4), D), flow)
    x = torch.rand(B, 3, 1, 4, 4)

    def grads(function):
        torch.manual_seed(0)
        return torch.autograd.grad(function(), list(vae.parameters()), allow_unused=True, materialize_grads=True)

    wanted = grads(lambda: vae.elbo(x, 1).loss)
    found = grads(lambda: checkpoint(lambda x: vae.elbo(x, 1).loss, x, use_reentrant=False))
    assert_equal(found, wanted)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_hooks_on_saved_tensors_inside_the_potential(mode):
    class Checkpointed(Net):
        def forward(self, z, t):
            return checkpoint(super().forward, z, t, use_reentrant=False)

    net = Checkpointed()
    plain = Net()
    plain.load_state_dict(net.state_dict())
    z = torch.randn(B, D, requires_grad=True)
    found, wanted = (gradients(PotentialFlow(u, solver=rk4(mode)), z) for u in (net, plain))
    assert_equal(found, wanted)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(
            gradients(PotentialFlow(plain, solver=rk4("direct")), z),
            gradients(PotentialFlow(plain, solver=rk4("discrete")), z),
        )


@pytest.mark.parametrize("mode", ["discrete", "direct"])
def test_batch_norm_in_training(mode):
    """Its statistics couple the rows, and its buffers move; gradients are those of backpropagation all the same."""
    net = Net(nn.BatchNorm1d(8))
    z = torch.randn(B, D, requires_grad=True)
    twin = copy.deepcopy(net)
    found = gradients(PotentialFlow(net, solver=rk4(mode)), z)
    wanted = gradients(PotentialFlow(twin, solver=rk4("direct")), z)
    assert_equal(found, wanted)


class Noisy(Net):
    def forward(self, z, t):
        return super().forward(nn.functional.dropout(z, 0.5, self.training), t)


class SlightlyNoisy(Net):
    def forward(self, z, t):
        return super().forward(z + 1e-6 * torch.randn_like(z), t)


class Drifting(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, z, t):
        self.calls += 1
        return super().forward(z, t) * self.calls


@pytest.mark.parametrize("net", [Noisy, SlightlyNoisy, Drifting])
@pytest.mark.parametrize("mode", GRADIENTS)
def test_another_u_at_every_call_is_an_error(net, mode):
    flow, z = PotentialFlow(net(), solver=Solver("dopri5", gradient=mode)), torch.randn(B, D, requires_grad=True)
    with pytest.raises(cflow.ArgumentError, match=r"potential: .* another u when it is called again .*context="):
        flow(z, 0, (0.0, 1.0))
    if net is Noisy:
        flow.eval()
        assert flow(z, 0, (0.0, 1.0)).requires_grad


def test_a_mask_drawn_once_is_a_context():
    class Masked(Net):
        def forward(self, z, t, context):
            return super().forward(z * context, t)

    net, mask = Masked(), (torch.rand(B, D) > 0.5).double()
    z = torch.randn(B, D, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(PotentialFlow(net, solver=rk4(mode))(z, 0, (0.0, 1.0), mask).sum(), z)
        for mode in ("discrete", "direct")
    )
    assert_equal(found, wanted)


class Attention(nn.Module):
    dim, num_flows = 4, 1

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True)

    def forward(self, z, t):
        return self.layer(z[:, None].expand(-1, 3, -1) * torch.arange(1.0, 4.0)[:, None]).sum((1, 2))


def test_fused_attention_says_what_to_use():
    flow, z = PotentialFlow(Attention(), solver=rk4()), torch.randn(2, 4, requires_grad=True)
    with pytest.raises(cflow.ArgumentError, match=r"sdpa_kernel\(torch.nn.attention.SDPBackend.MATH\)"):
        flow(z, t=(0.0, 0.5))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found, wanted = (
            torch.autograd.grad(PotentialFlow(flow.net, solver=rk4(mode))(z, t=(0.0, 0.5)).sum(), z)
            for mode in ("discrete", "direct")
        )
    assert_equal(found, wanted)


@pytest.mark.parametrize("mode", ["discrete", "adjoint"])
def test_parameters_that_a_plain_list_holds_too(mode):
    class Listed(Net):
        def __init__(self):
            super().__init__()
            self.weights = [self.a.weight, self.b.weight]

        def forward(self, z, t):
            first, last = self.weights
            return torch.tanh(z @ first.mT + t[:, None]) @ last.mT

    net, z = Listed(), torch.randn(B, D, requires_grad=True)
    found, wanted = (gradients(PotentialFlow(net, solver=rk4(m)), z) for m in (mode, "direct"))
    assert_equal(found, wanted, 1e-10 if mode == "discrete" else 1e-3)
    assert all(w.any() for w in (found[1], found[3]))  # of the two weights


def test_recurrent_layers_bound_methods_and_compiled_modules():
    class Recurrent(nn.Module):
        dim, num_flows = D, 1

        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.GRU(D, 4), self.bent
            self.scale = nn.Parameter(torch.tensor(1.5))

        def bent(self, x):
            return self.scale * torch.sin(x)

        def forward(self, z, t):
            return self.act(self.layer(z[None])[0][0]).sum(-1)

    net, z = Recurrent(), torch.randn(B, D, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(
            PotentialFlow(net, solver=rk4(mode))(z, t=(0.0, 0.5)).square().sum(),
            [z, *net.parameters()],
            allow_unused=True,
            materialize_grads=True,
        )
        for mode in ("discrete", "direct")
    )
    assert_equal(found, wanted)


def test_a_function_that_has_captured_the_module_is_an_error():
    class Captured(Net):
        def __init__(self):
            super().__init__()
            self.function = lambda z: self.a(z)

        def forward(self, z, t):
            return self.b(torch.tanh(self.function(z)))

    z = torch.randn(B, D, requires_grad=True)
    with pytest.raises(cflow.ArgumentError, match=r"captured the module itself.*make it a method"):
        PotentialFlow(Captured(), solver=rk4())(z, 0, (0.0, 1.0))
    assert PotentialFlow(Captured(), solver=rk4("direct"))(z, 0, (0.0, 1.0)).requires_grad


class Swapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(D, 1)

    def forward(self, t, z):
        return self.a(z) * t


class WantsContext(Net):
    def forward(self, z, t, context):
        return super().forward(z + context, t)


@pytest.mark.parametrize(
    "net", [Swapped(), nn.ModuleList([Net(), Net()]), WantsContext(), nn.Sequential(nn.Linear(7, 1))],
    ids=["swapped", "several", "context", "dimension"],
)  # fmt: skip
def test_first_calls_that_fail_name_the_signature(net):
    net = net.double()
    with pytest.raises(cflow.ArgumentError, match=r"potential: .*net\(z \(B, D\), t \(B,\)\) -> \(B, K\)"):
        PotentialFlow(net, solver=rk4())(torch.randn(B, D), 0, (0.0, 1.0))


@pytest.mark.parametrize("bad", [torch.tensor([1.0, torch.nan]), torch.full((B, K), torch.inf)], ids=["nan", "inf"])
def test_weights_that_are_not_finite_are_an_error_everywhere(bad):
    flow, z, prior = (
        PotentialFlow(cflow.MLPPotential(D, K), solver=rk4()),
        torch.randn(B, D),
        cflow.DiffusionPrior(D, K),
    )
    calls = [
        lambda: flow.velocity(z, bad, 0.0),
        lambda: flow.divergence(z, bad, 0.0),
        lambda: flow(z, bad, (0.0, 1.0)),
        lambda: flow(z, bad, (1.0, 1.0)),
        lambda: prior(bad, 1.0),
        lambda: flow(z, cflow.Schedule([0.0, 1.0], [bad]), (0.0, 1.0)),
    ]
    for call in calls:
        with pytest.raises(cflow.ArgumentError, match="expected finite weights"):
            call()
    huge = torch.tensor([1e308, 1e308])  # their sum overflows
    assert flow.velocity(z, huge, 0.0).shape == (B, D)


def test_boundaries_that_changed_after_the_schedule_was_made():
    flow, z = PotentialFlow(cflow.MLPPotential(D, K), solver=rk4()), torch.randn(B, D)
    for value, word in ((3.0, "must not decrease"), (torch.nan, "NaN")):
        times = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
        schedule = cflow.Schedule(times, [0, 1])
        with torch.no_grad():
            times[1] = value
        for call in (lambda: flow(z, schedule, (0.0, 1.0)), lambda: flow.velocity(z, schedule, 0.2)):  # noqa: B023
            with pytest.raises(cflow.ArgumentError, match=word):
                call()


def test_devices_and_dtypes_without_values():
    flow = PotentialFlow(cflow.MLPPotential(D, K), solver=rk4())
    with pytest.raises(cflow.ArgumentError, match="meta"):
        copy.deepcopy(flow).to("meta")(torch.empty(B, D, device="meta"), 0, (0.0, 1.0))
    with pytest.raises(cflow.ArgumentTypeError, match=r"use z0.to\(torch.float64\)$"):
        flow(torch.zeros(B, D, dtype=torch.int64), 0, (0.0, 1.0))


def test_k_may_be_left_out_where_there_is_one_flow():
    flow, z = PotentialFlow(cflow.MLPPotential(D), solver=rk4()), torch.randn(B, D)
    z1 = flow(z, t=(0.0, 1.0))
    assert torch.equal(z1, flow(z, 0, (0.0, 1.0)))
    assert torch.equal(flow.trajectory(z, t=[0.0, 1.0])[-1], z1)
    assert torch.equal(flow.solve(z, t=[0.0, 1.0]).z[-1], z1)
    assert torch.allclose(flow.inverse(z1, t=(0.0, 1.0)), z, atol=1e-4)
    assert torch.equal(flow.velocity(z, t=0.5), flow.velocity(z, 0, 0.5))
    assert torch.equal(flow.divergence(z, t=0.5), flow.divergence(z, 0, 0.5))
    assert torch.equal(flow.transform(t=(0.0, 1.0))(z), z1)
    for call in (lambda: flow(z), lambda: flow(z, (0.0, 1.0)), lambda: flow.velocity(z, 0.5)):
        with pytest.raises(cflow.ArgumentTypeError, match=r"t: expected times in frames.*name the times"):
            call()
    with pytest.raises(cflow.ArgumentError, match="k: None selects the only flow, but there are 2"):
        PotentialFlow(cflow.MLPPotential(D, K))(z, t=(0.0, 1.0))


def test_weights_of_a_users_flows():
    flow, z, w = PotentialFlow(Net(), solver=rk4()), torch.randn(B, D), torch.randn(B, K)
    each = torch.stack([flow.velocity(z, k, 0.5) for k in range(K)], -1)
    torch.testing.assert_close(flow.velocity(z, w, 0.5), (each * w[:, None]).sum(-1))


class Squared(torch.autograd.Function):
    """x² by NumPy, of which `vmap` knows nothing."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return Twice.apply(gradient, x)


class Twice(torch.autograd.Function):
    """2 g x by NumPy."""

    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return torch.from_numpy(2 * g.detach().numpy() * x.detach().numpy())

    @staticmethod
    def backward(ctx, gradient):
        g, x = ctx.saved_tensors
        return Twice.apply(gradient, x), Twice.apply(gradient, g)


def test_divergence_through_operations_that_vmap_does_not_know():
    class Quartic(nn.Module):
        dim, num_flows = D, 1

        def forward(self, z, t):
            return Squared.apply(Squared.apply(z.sum(-1)))

    z = torch.randn(B, D)
    flow = PotentialFlow(Quartic())
    s = z.sum(-1)
    torch.testing.assert_close(flow.velocity(z, t=0.0), 4 * s[:, None].expand(-1, D) ** 3)
    torch.testing.assert_close(flow.divergence(z, t=0.0), 12 * D * s.square())


@pytest.mark.parametrize("mode", ["adjoint", "discrete", "direct"])
def test_a_potential_that_does_not_depend_on_the_state_moves_nothing(mode):
    class Level(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.tensor([2.0, 3.0]))

        def forward(self, z, t):
            return t[:, None] * self.level

    flow, z = PotentialFlow(Level(), solver=Solver("rk4", step_size=0.5, gradient=mode)), torch.randn(4, 3)
    assert torch.equal(flow.velocity(z, 1, 0.5), torch.zeros(4, 3))
    assert torch.equal(flow.divergence(z, 1, 0.5), torch.zeros(4))
    path = flow.solve(z.clone().requires_grad_(), 1, (0.0, 1.0), log_density=True)
    assert torch.equal(path.z[-1], z)
    assert torch.equal(path.log_density_change[-1], torch.zeros(4))
    (path.z.sum() + path.log_density_change.sum()).backward()
    assert flow.net.level.grad is None or torch.equal(flow.net.level.grad, torch.zeros(2))


def test_exact_divergence_of_more_dimensions_than_one_backward_pass_takes():
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.rates = nn.Parameter(torch.linspace(-1.0, 2.0, 150, dtype=torch.float64))

        def forward(self, z, t):
            return 0.5 * (self.rates * z.square()).sum(-1) + (z[:, 0] * z[:, 149]).square()

    flow, z = PotentialFlow(Bowl()), torch.randn(3, 150, dtype=torch.float64)
    truth = flow.net.rates.sum() + 2 * (z[:, 0].square() + z[:, 149].square())
    torch.testing.assert_close(flow.divergence(z, 0, 0.0), truth)
    with torch.no_grad():
        torch.testing.assert_close(flow.divergence(z, 0, 0.0), truth.detach())


def test_an_empty_batch_never_reaches_a_module_that_says_its_flows():
    class Whole(Net):
        def forward(self, z, t):
            assert len(z)
            return super().forward(z, t)

    flow = PotentialFlow(Whole(), solver=rk4())
    assert flow(torch.zeros(0, D), 0, (0.0, 1.0)).shape == (0, D)
    assert flow(torch.randn(B, D), 0, (0.0, 1.0)).shape == (B, D)
