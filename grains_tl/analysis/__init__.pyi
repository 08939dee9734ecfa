from .ablation import ablate_hooks as ablate_hooks
from .ablation import ablation_table as ablation_table
from .building_curves import learning_curve as learning_curve
from .direct_writers import writers as writers
from .freezing import mechanism as mechanism
from .geometry import building_records as building_records
from .geometry import building_tokens as building_tokens
from .geometry import cosine_map as cosine_map
from .geometry import stability as stability
from .geometry import vector_table as vector_table
from .lens import embedding_neighbours as embedding_neighbours
from .lens import lens_logits as lens_logits
from .lens import logit_lens as logit_lens
from .patching import compare_patching as compare_patching
from .patching import patch as patch
from .patching import patch_hook as patch_hook
from .probes import Probes as Probes
from .probes import fit_probes as fit_probes
from .probes import residuals as residuals
from .probes import separation as separation
from .sparse import decoder_cosines as decoder_cosines
from .sparse import feature_vectors as feature_vectors
from .sparse import load_sae as load_sae
from .sparse import sparse_decomposition as sparse_decomposition
from .transfers import transfer as transfer

__all__: list[str]
