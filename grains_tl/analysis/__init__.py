"""A steering vector as an object of study: look at it, probe for it, take it out, patch it, split it into features.

``import grains_tl as gr``, then ``gr.analysis.logit_lens(...)``. Everything takes a model the caller already holds (a
``TransformerBridge`` or ``HookedTransformer``) and returns tensors or DataFrames; ``grains_tl.plotting`` draws them.

==================  ====================================================================================
geometry            ``vector_table``, ``cosine_map``, ``stability``, ``building_records``, ``building_tokens``
lens                ``lens_logits``, ``logit_lens``, ``embedding_neighbours``
writers             ``writers``: which heads and MLPs write the vector (direct attribution)
probes              ``residuals``, ``fit_probes``, ``separation``
ablation            ``ablate_hooks``, ``ablation_table``
patching            ``patch_hook``, ``patch``, ``compare_patching``
sparse              ``load_sae``, ``decoder_cosines``, ``sparse_decomposition``, ``feature_vectors``
==================  ====================================================================================
"""

from grains_tl.analysis.ablation import ablate_hooks, ablation_table
from grains_tl.analysis.geometry import building_records, building_tokens, cosine_map, stability, vector_table
from grains_tl.analysis.lens import embedding_neighbours, lens_logits, logit_lens
from grains_tl.analysis.patching import compare_patching, patch, patch_hook
from grains_tl.analysis.probes import Probes, fit_probes, residuals, separation
from grains_tl.analysis.sparse import decoder_cosines, feature_vectors, load_sae, sparse_decomposition
from grains_tl.analysis.writers import writers

__all__ = [
    "Probes",
    "ablate_hooks",
    "ablation_table",
    "building_records",
    "building_tokens",
    "compare_patching",
    "cosine_map",
    "decoder_cosines",
    "embedding_neighbours",
    "feature_vectors",
    "fit_probes",
    "lens_logits",
    "load_sae",
    "logit_lens",
    "patch",
    "patch_hook",
    "residuals",
    "separation",
    "sparse_decomposition",
    "stability",
    "vector_table",
    "writers",
]
