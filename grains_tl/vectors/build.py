"""From preference records to steering vectors: attribution, selection, caching and reduction in a row."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grains_tl._util.checks import whole
from grains_tl._util.processes import ALONE, Processes
from grains_tl._util.settings import with_settings
from grains_tl.attribution.groups import GroupBy, group, groups_of, select_groups
from grains_tl.attribution.methods import DRAWS, REMOVAL, Method, check_attribution_options
from grains_tl.attribution.reference import Baseline
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection, check_budget, select_tokens
from grains_tl.attribution.store import attribute_records
from grains_tl.hooks.mask import Masker, replacement_embedding
from grains_tl.hooks.stand_ins import ImageMasker, check_image_masker
from grains_tl.inference.objectives import Objective
from grains_tl.models.precision import autocast_dtype
from grains_tl.models.running import require_layers
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.types import HookedModel
from grains_tl.vectors.differences import shared_differences
from grains_tl.vectors.manifest import manifest
from grains_tl.vectors.readout import Readout, check_readout
from grains_tl.vectors.reduce import Reduce, Side, check_reduction, reduce_vectors
from grains_tl.vectors.steering_vectors import SteeringVectors


@with_settings
def build_vectors(
    model: HookedModel,
    pairs: Iterable[PreferencePair],
    *,
    top_k: int = 2,
    top_k_image: int | None = None,
    method: Method = "leave_one_out",
    reduce: Reduce = "mean",
    layers: Sequence[int] | None = None,
    side: Side = "both",
    objective: Objective = "sum",
    n_steps: int = 32,
    baseline: Baseline | None = None,
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    readout: Readout = "prompt_end",
    spare_end: bool = False,
    group_by: GroupBy | None = None,
    method_options: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    processes: Processes = ALONE,
) -> SteeringVectors:
    """Steering vectors from preference records (GrAInS, arXiv 2507.18043, sections 3.1 to 3.3).

    For every record the ``top_k`` content tokens that push the contrastive log-likelihood up, and those that push it
    down, are taken out of the prompt in turn; what that changes in the residual stream is reduced to one direction per
    layer. Defaults differ from the paper where its choice measured worse: leave-one-out instead of integrated
    gradients, the mean embedding instead of the end-of-text token as mask, the mean instead of centred PCA, and the
    whole response instead of its last token.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: the building records.
        top_k: tokens masked on each side (the paper: 10 for long prompts, 50 with an image; 1 and 2 measured best here).
        top_k_image: patches masked on each side, apart from ``top_k`` words; ``None`` lets both compete for ``top_k``.
        method: attribution method (see ``attribute``).
        reduce: ``"mean"``, ``"svd"`` or ``"pca"`` (see ``reduce_vectors``).
        layers: which layers, default all.
        side: ``"both"``, or one side's differences alone (see ``reduce_vectors``).
        objective: how response tokens are combined (see ``attribute``).
        n_steps: steps of path methods (see ``attribute``).
        baseline: where a path starts (see ``attribute``).
        masker: what replaces a masked token, in leave-one-out and in caching.
        image_masker: what replaces a masked patch, in the same two places.
        readout: where the residual is read.
        spare_end: keep the prompt's last token out of the selection, as in ``select_tokens``; for tokens, not for groups.
        group_by: choose ``"word"``, ``"sentence"`` or spans (see ``group``) instead of tokens; ``top_k`` then counts those.
        method_options: further arguments of ``attribute``: ``nodes``, ``layer``, ``noise``, ``k``, ``seed``.
        max_tokens: token budget of one pass.
        progress: show bars.
        checkpoint: a ``.jsonl`` file that receives each record's attribution when it is finished; a later call with the
            same model, record and settings takes them from there.
        processes: ``launched()`` under ``accelerate launch``: each process then does a share of the same records, and all
            return the same vectors.

    Returns:
        ``SteeringVectors``; ``vectors.info`` holds all settings, the share of converged attributions, and versions.

    Raises:
        ValueError: before anything runs, for bad options, bad records, ``top_k`` larger than a prompt's content, or
            layers that do not exist.

    Examples:
        >>> vectors = build_vectors(model, pairs, top_k=4, layers=[12, 18])           # doctest: +SKIP
        >>> logits = model.run_with_hooks(ids, fwd_hooks=vectors.hooks(0.2, [12]))    # doctest: +SKIP
    """
    top_k, n_steps = whole("top_k", top_k), whole("n_steps", n_steps)
    top_k_image = None if top_k_image is None else whole("top_k_image", top_k_image)
    tokenized = tokenize_pairs(model, pairs)
    layers = require_layers(model, range(model.cfg.n_layers) if layers is None else layers)
    extra = dict(method_options or {})
    _check_extra(extra)
    own = {key: value for key, value in extra.items() if key != "seed"}
    check_attribution_options(method, n_steps, baseline, objective, model=model, **own)
    check_reduction(reduce, side, len(tokenized))
    check_readout(readout)
    check_top_k(tokenized, top_k, top_k_image, group_by)
    if spare_end and group_by is not None:
        raise ValueError(f"spare_end is for single tokens and group_by={group_by!r} for groups; choose one of them")
    check_image_masker(image_masker)
    if masker != "attention":
        replacement_embedding(model, masker)  # refuses an unknown masker now rather than after the attributions
    options = {"method": method, "n_steps": n_steps, "baseline": baseline, "objective": objective, "masker": masker}
    options |= extra
    if group_by is not None and method in REMOVAL:
        options["group_by"] = group_by  # whole groups are taken out: fewer passes
    if any(t.images is not None for t in tokenized):
        options["image_masker"] = image_masker
    mine = attribute_records(
        model,
        [tokenized[i] for i in processes.share(len(tokenized))],
        options,
        checkpoint=checkpoint,
        processes=processes,
    )
    attributions = processes.gather_shares(mine)
    _warn_of_gaps(attributions, method)
    selections = [select(a, top_k, top_k_image, group_by, spare_end) for a in attributions]
    differences = shared_differences(
        model,
        tokenized,
        selections,
        processes=processes,
        mean_only=reduce == "mean",
        layers=layers,
        masker=masker,
        image_masker=image_masker,
        readout=readout,
    )
    settings = {
        **options,
        "top_k": top_k,
        "top_k_image": top_k_image,
        "group_by": group_by,
        "spare_end": spare_end,
        "reduce": reduce,
        "side": side,
        "readout": readout,
        "autocast": autocast_dtype(model),
        "seed": extra.get("seed", 0) if method in DRAWS else None,
    }
    return reduce_vectors(
        differences, reduce=reduce, side=side, info=manifest(model, tokenized, settings, attributions)
    )


def select(
    attribution: Attribution,
    top_k: int,
    top_k_image: int | None = None,
    group_by: GroupBy | None = None,
    spare_end: bool = False,
) -> Selection:
    """``select_tokens``, or the tokens of the ``top_k`` words, sentences or spans with the largest scores."""
    if group_by is None:
        return select_tokens(attribution, top_k, top_k_image, spare_end=spare_end)
    return select_groups(group(attribution, by=group_by), top_k)


def check_top_k(
    tokenized: Sequence[TokenizedPair],
    top_k: int,
    top_k_image: int | None = None,
    group_by: GroupBy | None = None,
) -> None:
    """Refuse numbers of tokens that some prompt cannot give (ValueError naming the record)."""
    check_budget(top_k, top_k_image)
    if group_by is not None:
        _check_groups(tokenized, top_k, top_k_image, group_by)
        return
    for number, pair in enumerate(tokenized, start=1):
        n_text = pair.n_content - (0 if top_k_image is None else pair.n_patches)
        for name, wanted, there in (("top_k", top_k, n_text), ("top_k_image", top_k_image or 0, pair.n_patches)):
            if wanted > there:
                what = "content tokens" if name == "top_k" else "patches"
                raise ValueError(
                    f"record {number}: {name}={wanted}, but its prompt has {there} {what}; lower {name} or drop the "
                    "record"
                )


def _check_groups(tokenized: Sequence[TokenizedPair], top_k: int, top_k_image: int | None, group_by: GroupBy) -> None:
    if top_k_image is not None:
        raise ValueError(
            f"top_k_image={top_k_image} counts patches and group_by={group_by!r} words; choose one of them"
        )
    for number, pair in enumerate(tokenized, start=1):
        try:
            groups = groups_of(pair.strings, pair.starts_word, group_by)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from None
        n = sum(any(pair.content[p] for p in own) for own in groups)
        if top_k > n:
            raise ValueError(
                f"record {number}: top_k={top_k}, but its prompt has {n} content groups; lower top_k or drop the record"
            )


def _warn_of_gaps(attributions: Sequence[Attribution], method: str) -> None:
    """Say so when a path method did not keep its promise: the choice of tokens then rests on wrong numbers."""
    converged = [a.converged for a in attributions if a.converged is not None]
    if converged and not all(converged):
        warnings.warn(
            f"{converged.count(False)} of {len(converged)} records: the {method} scores miss completeness by 5 % of "
            "|f(x) - f(x')| or more, so they are not what they claim to be. Use more n_steps, nodes='adaptive' or another "
            "baseline, or a method without a path (leave_one_out)",
            UserWarning,
            stacklevel=3,
        )


def _check_extra(extra: Mapping[str, Any]) -> None:
    known = {"nodes", "layer", "noise", "k", "seed"}
    if not set(extra) <= known:
        raise ValueError(f"method_options has {sorted(set(extra) - known)}; known are {sorted(known)}")
