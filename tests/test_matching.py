"""Learned flows beside true ones: up to order, sign and scale, with flows left over or missing."""

import math

import pytest
import torch

from cflow import ArgumentError, ArgumentTypeError, metrics


def test_order_sign_and_scale_are_found():
    truth = torch.randn(500, 3)
    factors = torch.tensor([-2.0, 0.1, 7.0])
    order = torch.tensor([4, 0, 3])
    found = torch.randn(500, 5)
    found[:, order] = truth * factors
    match = metrics.match_flows(found, truth)
    assert match.flows.tolist() == order.tolist()
    assert match.others.tolist() == [1, 2]
    torch.testing.assert_close(match.cosine, factors.sign())
    torch.testing.assert_close(match.scale, 1 / factors)


def test_the_assignment_is_the_best_together():
    # each for itself, both true ones would take the first; the second of them loses less by giving it up
    found = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    truth = torch.tensor([[1.0, 1.0], [0.1, 0.9]])
    match = metrics.match_flows(found, truth)
    assert match.flows.tolist() == [0, 1]
    assert match.cosine[1].item() == pytest.approx(0.9 / math.sqrt(1.81))
    # scale is least squares: what is left of truth is orthogonal to the flow
    noisy = torch.randn(200, 2, dtype=torch.float64)
    match = metrics.match_flows(noisy[:, :1], noisy[:, 1:])
    rest = noisy[:, 1] - match.scale * noisy[:, 0]
    assert abs(float(rest @ noisy[:, 0])) < 1e-9


def test_fewer_flows_than_true_ones_and_one_that_stands_still():
    truth = torch.randn(50, 3)
    match = metrics.match_flows(3 * truth[:, 2:], truth)
    assert match.flows.tolist() == [-1, -1, 0]
    assert match.cosine[:2].tolist() == match.scale[:2].tolist() == [0.0, 0.0]
    assert not len(match.others)
    still = metrics.match_flows(torch.stack([torch.zeros(50), truth[:, 0]], 1), truth[:, :1])
    assert still.flows.tolist() == [1]
    assert metrics.match_flows(torch.zeros(50, 1), truth[:, :1]).scale.tolist() == [0.0]


def test_f1_counts_false_alarms_of_all_flows_and_what_is_missed():
    truth = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1]], dtype=torch.bool)
    flows = torch.tensor([2, 0])
    on = torch.zeros(4, 3, dtype=torch.bool)
    on[:, flows] = truth
    assert metrics.spike_f1(on, truth, flows) == 1.0
    on[2, 1] = True  # of a flow without a counterpart
    assert metrics.spike_f1(on, truth, flows) == pytest.approx(8 / 9)
    on[0, 2] = False
    assert metrics.spike_f1(on, truth, flows) == pytest.approx(6 / 8)
    assert metrics.spike_f1(on, truth, torch.tensor([2, -1])) == pytest.approx(2 / 8)
    nothing = torch.zeros(4, 2, dtype=torch.bool)
    assert metrics.spike_f1(nothing, nothing, torch.tensor([0, 1])) == 1.0


@pytest.mark.parametrize(
    ("found", "truth", "error", "says"),
    [
        (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2), ArgumentTypeError, "found: .* got torch.int64"),
        (torch.zeros(3, 2), None, ArgumentTypeError, "truth: .* got NoneType"),
        (torch.zeros(3, 2), torch.zeros(4, 2), ArgumentError, r"same N ≥ 1, got \(3, 2\) and \(4, 2\)"),
        (torch.zeros(0, 2), torch.zeros(0, 2), ArgumentError, "N ≥ 1"),
        (torch.full((3, 2), math.nan), torch.zeros(3, 2), ArgumentError, "found: expected finite"),
    ],
)
def test_bad_columns(found, truth, error, says):
    with pytest.raises(error, match=says):
        metrics.match_flows(found, truth)


def test_bad_spikes():
    on = torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(ArgumentTypeError, match=r"on: expected booleans, such as q.probs > 0.5, got torch.float32"):
        metrics.spike_f1(on.float(), on, torch.tensor([0, 1]))
    with pytest.raises(ArgumentError, match=r"got \(3, 2\), \(3, 2\) and \(1,\)"):
        metrics.spike_f1(on, on, torch.tensor([0]))
