"""From preference records to steering vectors, by any recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from grains_tl._util.processes import ALONE, Processes
from grains_tl._util.settings import settings
from grains_tl.attribution.method_base import Method
from grains_tl.attribution.top_k import TopK
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.hooks.sites import require_site, site_point
from grains_tl.models.running import require_hook_names, require_layers
from grains_tl.records.pairs import PairLike
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.gradients import GradientReduce
from grains_tl.vectors.recipes import Recipe, RecipeFunction, recipe_of
from grains_tl.vectors.reduce import Reduce
from grains_tl.vectors.steering_vectors import SteeringVectors


def build_vectors(
    model: HookedModel,
    pairs: Iterable[PairLike],
    *,
    recipe: Recipe | str | RecipeFunction = "grains",
    layers: Sequence[int] | None = None,
    method: Method | str | None = None,
    top_k: TopK | int | None = None,
    reduce: Reduce | GradientReduce | None = None,
    mask: Mask | Masker | None = None,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> SteeringVectors:
    """One steering vector per layer from preference records.

    The default recipe is the paper's (GrAInS, arXiv 2507.18043, sections 3.1 to 3.3; ``gr.vectors.Grains`` says where its
    defaults differ). ``"caa"`` and the other names in ``gr.vectors.RECIPES`` build other vectors from the same records.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: the building records.
        recipe: a name, a recipe as a value (``Grains(top_k=TopK(4))``), or a function of your own,
            ``fn(records, generator) -> [layer, d_model]``.
        layers: which layers, counted from 0; default all.
        method: of ``"grains"``: how tokens are scored, default leave-one-out; see ``attribute``.
        top_k: of ``"grains"``: tokens masked on each side, default 2; a ``TopK`` for words, patches and spans.
        reduce: of ``"grains"``: ``"mean"`` (default), ``"svd"`` or ``"pca"``; see ``reduce_vectors``. Of
            ``"margin_gradient"``: ``"mean"`` (default), ``"median"`` or ``"svd"``.
        mask: what replaces a masked token, default the vocabulary's mean embedding; a ``Mask`` for patches too.
        checkpoint: a ``.jsonl`` file that receives each record's result when it is finished; a later call with the same
            model, record and settings takes them from there.
        options: further fields of the recipe (of ``"grains"``: ``readout``, ``objective``, ``side``, ``top_k_image``,
            ``group_by``, ``spare_end``, and the fields of its method such as ``n_steps``); ``site``, where the vectors are
            read and will be added: ``"resid_post"`` (default), ``"resid_pre"``, ``"resid_mid"``, ``"attn_out"``,
            ``"mlp_out"`` or ``"z"`` (all heads of a layer; ``vectors.heads`` takes single ones out); and of the run:
            ``max_tokens``, ``progress``, ``processes=launched()`` under ``accelerate launch``.

    Returns:
        ``SteeringVectors``: unit directions ``[layer, d_model]``; ``vectors.info`` holds all settings, the share of
        converged attributions, and versions.

    Raises:
        ValueError: before anything runs, for options the recipe does not have, bad records, ``top_k`` larger than a
            prompt's content, or layers that do not exist.

    Examples:
        >>> vectors = build_vectors(model, pairs, top_k=4, layers=[12, 18])           # doctest: +SKIP
        >>> logits = model.run_with_hooks(ids, fwd_hooks=vectors.hooks(0.2, [12]))    # doctest: +SKIP
        >>> rival = build_vectors(model, pairs, recipe="caa", layers=[12, 18])        # doctest: +SKIP
    """
    run: dict[str, Any] = {name: options.pop(name, None) for name in ("max_tokens", "progress")}
    processes: Processes = options.pop("processes", None) or ALONE
    site = require_site(options.pop("site", "resid_post"))
    chosen = recipe_of(recipe, method=method, top_k=top_k, reduce=reduce, mask=mask, **options)
    tokenized = tokenize_pairs(model, pairs)
    wanted = require_layers(model, range(model.cfg.n_layers) if layers is None else layers)
    records = BuildingRecords(model, tokenized, tuple(wanted), checkpoint, processes, site)
    chosen.check_site(records)
    require_hook_names(model, [(site_point(site, layer), id) for layer in wanted])
    chosen.check(records)
    with settings(**run):
        return chosen.build(records)
