"""Sites: the activations of a block that vectors can be built from and added to."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl.types import FwdHooks, HookedModel, HookFn

#: The residual stream before a block, between attention and MLP, and after the block; what attention and the MLP add to it;
#: and what the attention heads put out (``hook_z``, all heads of a layer as one vector of ``n_heads * d_head``).
Site = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]


def require_site(site: Any) -> Site:
    """Refuse an unknown site (OptionError)."""
    if site not in get_args(Site):
        raise OptionError(f"site={site!r}; expected one of {', '.join(get_args(Site))}")
    return site


def residual_stream_only(what: str, site: Site) -> None:
    """Refuse another site than the residual stream after a block (OptionError).

    Args:
        what: names the function or recipe that knows no other.
        site: of the vectors or of the building records.
    """
    if site != "resid_post":
        raise OptionError(
            f"{what} works on the residual stream after a block (site='resid_post'), and these vectors are for site={site!r}"
        )


def residual_space_only(what: str, site: Site) -> None:
    """Refuse vectors of attention heads, which are not in the residual stream's coordinates (OptionError)."""
    if site == "z":
        raise OptionError(f"{what} reads vectors of length d_model, and these are for attention heads (site='z')")


def site_point(site: Site, layer: int | str) -> str:
    """TransformerLens' name of the hook point where a site is read.

    Examples:
        >>> site_point("z", 3), site_point("mlp_out", 3)
        ('blocks.3.attn.hook_z', 'blocks.3.hook_mlp_out')
    """
    return f"blocks.{layer}.attn.hook_z" if site == "z" else f"blocks.{layer}.hook_{site}"


def site_of_point(hook_point: str) -> Site:
    """The site of a hook point as ``SteeringVectors.save`` writes it, with ``{layer}`` in the number's place.

    Raises:
        ValueError: a hook point that is none of the sites.

    Examples:
        >>> site_of_point("blocks.{layer}.attn.hook_z")
        'z'
    """
    for site in get_args(Site):
        if hook_point == site_point(site, "{layer}"):
            return site
    raise ValueError(f"hook point {hook_point!r} is none that vectors are steered at")


def site_width(model: HookedModel, site: Site) -> int:
    """Length of a vector at a site: ``d_model``, of ``"z"`` ``n_heads * d_head``."""
    return int(model.cfg.n_heads) * int(model.cfg.d_head) if site == "z" else int(model.cfg.d_model)


def flat(act: Float[Tensor, "batch pos *shape"]) -> Float[Tensor, "batch pos width"]:
    """An activation as one vector per position: the heads of ``hook_z`` side by side."""
    return act.flatten(2)


def edit_hooks(site: Site, layer: int, fn: HookFn) -> FwdHooks:
    """Hooks that change a site of one block by ``fn``, with the same meaning on both classes of TransformerLens.

    At ``"resid_mid"`` a ``TransformerBridge`` shows what the MLP's norm reads: a change there would miss the path around the
    MLP. The change is made to the attention output instead, which reaches both, and the residual that comes out is compared
    with what was wanted.

    Args:
        site: where.
        layer: in which block, counted from 0.
        fn: ``fn(act, hook)``, as for ``run_with_hooks``.

    Returns:
        ``[(name, fn)]``.

    Raises:
        ValueError: during the run, a model whose residual between attention and MLP is not the sum of the residual before
            the block and the attention output.
    """
    if site != "resid_mid":
        return [(site_point(site, layer), fn)]
    kept: dict[str, Tensor] = {}

    def before(act: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        kept["pre"] = act

    def change(act: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
        pre = kept.pop("pre")
        mid = pre + act
        wanted = fn(mid, hook=hook)
        unchanged = wanted is None or wanted is mid
        kept["mid"] = (mid if unchanged else wanted).detach()
        return act if unchanged else wanted - pre

    def check(act: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        wanted = kept.pop("mid").float()
        size = float(torch.nan_to_num(wanted).abs().amax())
        error = float(torch.nan_to_num(act.detach().float() - wanted).abs().amax())
        if error > (1e-3 if act.dtype == torch.float32 else 5e-2) * max(size, 1e-6):
            raise ValueError(
                f"block {layer}: the residual between attention and MLP is not the residual before the block plus the "
                f"attention output (difference {error:.2g} of {size:.2g}), so it cannot be steered at site='resid_mid'; "
                "use 'attn_out', 'resid_pre' or 'resid_post'"
            )

    return [
        (site_point("resid_pre", layer), before),
        (site_point("attn_out", layer), change),
        (site_point(site, layer), check),
    ]
