"""Pictures: coloured tokens, effects over layers and alphas, vectors beside their controls, effect against cost,
patches over their image.

Figures are made without pyplot, so no window opens and nothing stays open; they show themselves in notebooks all the
same. Nothing global in matplotlib changes. Tokens and names are data: they are drawn as they stand, never read as math
text or markup.
"""

from grains_tl.plotting.analysis import plot_cosines, plot_patching, plot_probes
from grains_tl.plotting.attribution import plot_convergence, plot_curves
from grains_tl.plotting.captions import plot_captions
from grains_tl.plotting.comparison import plot_comparison
from grains_tl.plotting.effects import plot_controls, plot_layers
from grains_tl.plotting.images import attribution_share, plot_image_attribution
from grains_tl.plotting.style import figure_png
from grains_tl.plotting.sweeps import plot_cost, plot_heatmap, plot_records, plot_token_logprobs
from grains_tl.plotting.tokens import plot_tokens, show_tokens
from grains_tl.plotting.yes_no import plot_yes_no

__all__ = [
    "attribution_share",
    "figure_png",
    "plot_captions",
    "plot_comparison",
    "plot_controls",
    "plot_convergence",
    "plot_cosines",
    "plot_cost",
    "plot_curves",
    "plot_heatmap",
    "plot_image_attribution",
    "plot_layers",
    "plot_patching",
    "plot_probes",
    "plot_records",
    "plot_token_logprobs",
    "plot_tokens",
    "plot_yes_no",
    "show_tokens",
]
