from .attribution import plot_comparison as plot_comparison
from .attribution import plot_convergence as plot_convergence
from .attribution import plot_curves as plot_curves
from .building import plot_learning_curve as plot_learning_curve
from .building import plot_transfer as plot_transfer
from .circuits import plot_circuit as plot_circuit
from .effects import plot_controls as plot_controls
from .effects import plot_layers as plot_layers
from .freezing import plot_mechanism as plot_mechanism
from .generated import plot_generation_kl as plot_generation_kl
from .hallucination import plot_captions as plot_captions
from .hallucination import plot_yes_no as plot_yes_no
from .images import attribution_share as attribution_share
from .images import plot_image_attribution as plot_image_attribution
from .records import plot_records as plot_records
from .records import plot_token_logprobs as plot_token_logprobs
from .style import figure_png as figure_png
from .sweeps import plot_cost as plot_cost
from .sweeps import plot_heatmap as plot_heatmap
from .tokens import plot_tokens as plot_tokens
from .tokens import show_tokens as show_tokens
from .vectors import plot_cosines as plot_cosines
from .vectors import plot_patching as plot_patching
from .vectors import plot_probes as plot_probes
from .vectors import plot_writers as plot_writers
from .vectors import show_vectors as show_vectors

__all__: list[str]
