"""Pictures: a tidy frame in, matplotlib Axes out.

The only package that imports seaborn, a module a subject, one function a picture. They compute
nothing but positions on the page: frames come from the measuring modules and the notebooks. Each
takes `ax=None`, draws into the current Axes where none is given, and returns the Axes; none sets a
style or opens a figure of its own. The study's look is study.mplstyle: `plt.style.use(STYLE)`; what
pictures share (labels with units, the colours of recipes) is common.py's. To add one, write it in
the module of its subject, name it here, and compare what it draws in tests/test_plots_*.py.
"""

from nvfp4lab.plots.blocks import block as block
from nvfp4lab.plots.blocks import explained_block as explained_block
from nvfp4lab.plots.common import LABELS as LABELS
from nvfp4lab.plots.common import STYLE as STYLE
from nvfp4lab.plots.common import recipe_colors as recipe_colors
from nvfp4lab.plots.layers import qsnr_by_layer as qsnr_by_layer
from nvfp4lab.plots.layers import share_by_layer as share_by_layer
from nvfp4lab.plots.scales import scale_histogram as scale_histogram
from nvfp4lab.plots.speed import speed_over_tokens as speed_over_tokens
from nvfp4lab.plots.theory import curves as curves
from nvfp4lab.plots.theory import deviations as deviations
