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

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
