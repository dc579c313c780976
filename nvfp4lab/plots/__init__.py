"""Pictures: a tidy frame in, matplotlib Axes out.

The only package that imports seaborn, a module a subject, one function a picture. They compute
nothing but positions on the page: frames come from the measuring modules and the notebooks. Each
takes `ax=None`, draws into the current Axes where none is given, and returns the Axes; none sets a
style or opens a figure of its own. The study's look is study.mplstyle: `plt.style.use(STYLE)`; what
pictures share (labels with units, colours and markers, legends, axes) is common.py's. To add one,
write it in the module of its subject, name it here, and compare what it draws in
tests/test_plots_*.py.
"""

from nvfp4lab.plots.blocks import block as block
from nvfp4lab.plots.blocks import explained_block as explained_block
from nvfp4lab.plots.common import LABELS as LABELS
from nvfp4lab.plots.common import STYLE as STYLE
from nvfp4lab.plots.common import legend_below as legend_below
from nvfp4lab.plots.common import recipe_colors as recipe_colors
from nvfp4lab.plots.distributions import channels_by_size as channels_by_size
from nvfp4lab.plots.distributions import code_shares as code_shares
from nvfp4lab.plots.distributions import qsnr_by_crest as qsnr_by_crest
from nvfp4lab.plots.distributions import qsnr_spread as qsnr_spread
from nvfp4lab.plots.downstream import error_by_operand as error_by_operand
from nvfp4lab.plots.downstream import error_by_stage as error_by_stage
from nvfp4lab.plots.layers import qsnr_by_layer as qsnr_by_layer
from nvfp4lab.plots.layers import share_by_layer as share_by_layer
from nvfp4lab.plots.recipes import codes_and_decibels as codes_and_decibels
from nvfp4lab.plots.recipes import dots as dots
from nvfp4lab.plots.recipes import pair_matrix as pair_matrix
from nvfp4lab.plots.recipes import scale_steps as scale_steps
from nvfp4lab.plots.rounding import error_by_quotient as error_by_quotient
from nvfp4lab.plots.rounding import tie_shares as tie_shares
from nvfp4lab.plots.scales import qsnr_by_amax as qsnr_by_amax
from nvfp4lab.plots.scales import scale_histogram as scale_histogram
from nvfp4lab.plots.scales import scale_over_amax as scale_over_amax
from nvfp4lab.plots.scales import share_by_amax as share_by_amax
from nvfp4lab.plots.speed import speed_over_tokens as speed_over_tokens
from nvfp4lab.plots.theory import curves as curves
from nvfp4lab.plots.theory import deviations as deviations
