"""Pictures: coloured tokens, effects over layers, a vector beside its controls. Nothing global in matplotlib changes.

Figures are made without pyplot, so no window opens and nothing stays open; they show themselves in notebooks all the
same. Tokens and names are data: they are drawn as they stand, never read as math text or markup.
"""

from grains_tl.plotting.analysis import plot_cosines, plot_patching, plot_probes
from grains_tl.plotting.effects import plot_controls, plot_layers
from grains_tl.plotting.style import figure_png
from grains_tl.plotting.tokens import plot_tokens, show_tokens

__all__ = [
    "figure_png",
    "plot_controls",
    "plot_cosines",
    "plot_layers",
    "plot_patching",
    "plot_probes",
    "plot_tokens",
    "show_tokens",
]
