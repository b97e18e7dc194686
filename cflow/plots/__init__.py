"""Pictures of what a flow does. matplotlib and Pillow are imported only when a picture is drawn, and where one is not
installed the error is a `DependencyError` that says what to install.

Figures are made without pyplot: nothing is kept alive, no window opens and no backend is chosen. `traversal_grid`
returns a Figure; the other functions draw into a matplotlib Axes and return it, and make a Figure of their own
(``ax.figure``) where none is given. `PALETTE` has their colours, for what you add to a picture.
"""

from .animation import traversal_animation
from .curves import training_curves, work_precision
from .grids import traversal_grid
from .plane import density, potential_surface, trajectories, velocity_field
from .populations import population_animation, population_landscape, population_marginals
from .style import GENERATED_COLOUR as GENERATED_COLOUR
from .style import PALETTE as PALETTE
from .style import TRUE_COLOUR as TRUE_COLOUR

__all__ = [
    "density",
    "population_animation",
    "population_landscape",
    "population_marginals",
    "potential_surface",
    "training_curves",
    "trajectories",
    "traversal_animation",
    "traversal_grid",
    "velocity_field",
    "work_precision",
]

traversal_gif = traversal_animation  # its name in 0.1
