"""Populations of which only snapshots are seen: the potential that moves each snapshot into the next.

Cells are destroyed when they are measured, surveys ask other people every year: what one has are samples of a
population at a few times, `Snapshots`, and no pairs between them. `fit` learns a `cflow.PotentialFlow` from them, which
then is an ordinary one: `flow.trajectory(x0, t=times)` says where members go, `flow.potential` is the landscape that
they climb. `wasserstein` says how far two samples are from each other.

Snapshots do not determine everything. Of all velocities that move densities in the same way a gradient flow is the one
of least kinetic energy; a motion that leaves densities as they are, such as the turning of a round cloud, cannot be
seen in snapshots at all.
"""

from .annotate import annotate
from .cells import embryoid_bodies
from .fitting import History, Objective, fit
from .loss import Found, Loss, Task
from .matching import ActionMatching, Matching
from .simulated import Likelihood, Sinkhorn, Transport, gaussian
from .snapshots import Snapshots
from .transport import sinkhorn_divergence, transport_plan, wasserstein

__all__ = [
    "ActionMatching",
    "Found",
    "History",
    "Likelihood",
    "Loss",
    "Matching",
    "Objective",
    "Sinkhorn",
    "Snapshots",
    "Task",
    "Transport",
    "annotate",
    "embryoid_bodies",
    "fit",
    "gaussian",
    "sinkhorn_divergence",
    "transport_plan",
    "wasserstein",
]
