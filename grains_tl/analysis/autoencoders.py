"""Sparse autoencoders from their published files, without SAELens: features read, clamped and taken out.

A file in SAELens' layout is a folder with ``cfg.json`` and ``sae_weights.safetensors``. What an autoencoder does not
reconstruct stays in the model: a hook adds the difference that changed features make, so changing nothing changes no bit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import finite, whole
from grains_tl._util.errors import OptionError
from grains_tl._util.files import write_atomically
from grains_tl.hooks.sites import Site, edit_hooks, flat
from grains_tl.types import FwdHooks
from grains_tl.vectors.tensor_files import read_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
POINT = re.compile(r"blocks\.(\d+)\.(?:hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)|attn\.hook_(z))")


@dataclass(frozen=True, eq=False, repr=False)
class SparseAutoencoder:
    """An autoencoder with ReLU, JumpReLU or top-k features, on one activation of a block.

    Attributes:
        W_enc: ``[d_in, d_sae]``.
        W_dec: ``[d_sae, d_in]``, the features' directions.
        b_enc: ``[d_sae]``.
        b_dec: ``[d_in]``.
        hook_name: TransformerLens' name of the hook point it was trained on.
        k: features that may be active at a position; ``None`` for all.
        threshold: ``[d_sae]`` of JumpReLU: smaller activations count as 0.
        input_bias: ``b_dec`` is taken off before encoding.
        layer_norm: activations are normalised before encoding, and the reconstruction is scaled back.
        decoder_norms: activations are in units of the length of each feature's row of ``W_dec``.

    Examples:
        >>> sae = SparseAutoencoder(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2), "blocks.4.hook_resid_pre")
        >>> sae.site, sae.layer, sae.features(torch.tensor([[1.0, -1.0]])).tolist()
        ('resid_pre', 4, [[1.0, 0.0]])
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, "d_sae"]
    b_dec: Float[Tensor, "d_in"]
    hook_name: str
    k: int | None = None
    threshold: Float[Tensor, "d_sae"] | None = None
    input_bias: bool = True
    layer_norm: bool = False
    decoder_norms: bool = False

    def __post_init__(self) -> None:
        d_sae, d_in = self.W_dec.shape
        shapes = {
            "W_enc": (self.W_enc, (d_in, d_sae)),
            "b_enc": (self.b_enc, (d_sae,)),
            "b_dec": (self.b_dec, (d_in,)),
            "threshold": (self.threshold, (d_sae,)),
        }
        bad = {name: list(t.shape) for name, (t, shape) in shapes.items() if t is not None and t.shape != shape}
        if bad:
            raise ValueError(f"an autoencoder with W_dec [{d_sae}, {d_in}] has {bad}")
        if not POINT.fullmatch(self.hook_name):
            raise ValueError(
                f"an autoencoder on {self.hook_name!r}; expected the residual stream, attn_out, mlp_out or z"
            )
        if self.k is not None and not 1 <= self.k <= d_sae:
            raise ValueError(f"k={self.k} of {d_sae} features")

    def __repr__(self) -> str:
        return f"SparseAutoencoder({self.hook_name}, {self.W_dec.shape[0]} features of width {self.W_dec.shape[1]})"

    @property
    def layer(self) -> int:
        """The block it is on, counted from 0."""
        return int(self._point[1])

    @property
    def site(self) -> Site:
        """The activation it is on, see ``build_vectors``."""
        site: Any = self._point[2] or self._point[3]
        return site

    @property
    def _point(self) -> re.Match[str]:
        found = POINT.fullmatch(self.hook_name)
        assert found is not None
        return found

    def features(self, acts: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_sae"]:
        """Activations of the features, 0 or above, float32.

        Args:
            acts: the model's activations; heads side by side.
        """
        x = acts.float()
        if self.layer_norm:
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.std(-1, keepdim=True) + 1e-5)
        x = x - self.b_dec.to(x) if self.input_bias else x
        pre = x @ self.W_enc.to(x) + self.b_enc.to(x)
        if self.decoder_norms:
            pre = pre * self._row_norms.to(x)
        if self.k is not None:
            top = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        active = pre.relu()
        return active if self.threshold is None else active * (pre > self.threshold.to(x))

    def reconstruct(self, acts: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_in"]:
        """What the features make of activations, float32; ``acts`` less this is the error that hooks keep."""
        scale, shift = self._scales(acts.float())
        return (self._decoded(self.features(acts)) + self.b_dec.to(acts.device).float()) * scale + shift

    def difference(
        self, acts: Float[Tensor, "*shape d_in"], change: Float[Tensor, "*shape d_sae"]
    ) -> Float[Tensor, "*shape d_in"]:
        """What a change of the features adds to activations, float32."""
        return self._decoded(change) * self._scales(acts.float())[0]

    def save(self, folder: str | Path) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` as SAELens does; ``read_sae`` reads them.

        Args:
            folder: a new or existing folder.

        Returns:
            The folder.
        """
        from safetensors.torch import save

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        kind = "topk" if self.k is not None else "standard" if self.threshold is None else "jumprelu"
        config = {
            "architecture": kind,
            "d_in": self.W_dec.shape[1],
            "d_sae": self.W_dec.shape[0],
            "dtype": str(self.W_dec.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.input_bias,
            "normalize_activations": "layer_norm" if self.layer_norm else "none",
            "reshape_activations": "hook_z" if self.site == "z" else "none",
            "metadata": {"hook_name": self.hook_name},
            **({} if self.k is None else {"k": self.k, "rescale_acts_by_decoder_norm": self.decoder_norms}),
        }
        names = ("W_enc", "W_dec", "b_enc", "b_dec", *([] if self.threshold is None else ["threshold"]))
        write_atomically(target / WEIGHTS, save({n: getattr(self, n).detach().cpu().contiguous() for n in names}))
        write_atomically(target / CONFIG, json.dumps(config, indent=1).encode())
        return target

    @property
    def _row_norms(self) -> Float[Tensor, "d_sae"]:
        return self.W_dec.float().norm(dim=-1)

    def _decoded(self, features: Float[Tensor, "*shape d_sae"]) -> Float[Tensor, "*shape d_in"]:
        own = features / self._row_norms.to(features) if self.decoder_norms else features
        return own @ self.W_dec.to(features)

    def _scales(self, acts: Float[Tensor, "*shape d_in"]) -> tuple[Any, Any]:
        if not self.layer_norm:
            return 1.0, 0.0
        return acts.std(-1, keepdim=True), acts.mean(-1, keepdim=True)


def read_sae(folder: str | Path, *, hook_name: str | None = None) -> SparseAutoencoder:
    """An autoencoder from a folder with ``cfg.json`` and ``sae_weights.safetensors``, SAELens' layout.

    Nothing is executed and nothing is downloaded. Features with ReLU (``"standard"``), JumpReLU (also what a batch-top-k
    autoencoder is saved as) and top-k are read.

    Args:
        folder: on this machine.
        hook_name: the hook point, for files that do not name one.

    Returns:
        ``SparseAutoencoder``; its ``W_dec`` is the decoder that ``sparse_decomposition`` and its like take.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of autoencoder, weights that do not fit each other or are not finite, no hook point.

    Examples:
        >>> sae = read_sae("sae/blocks.18.hook_resid_post")                             # doctest: +SKIP
        >>> sparse_decomposition(vectors, sae.W_dec, layer=sae.layer)                   # doctest: +SKIP
    """
    place = Path(folder)
    if not (place / CONFIG).is_file():
        raise FileNotFoundError(f"no file {place / CONFIG}; expected a folder with {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place / CONFIG} is not readable ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{place / CONFIG} holds no settings")
    _, tensors = read_tensors(place / WEIGHTS, "SparseAutoencoder.save(folder)")
    point = hook_name or (config.get("metadata") or {}).get("hook_name") or config.get("hook_name")
    if not isinstance(point, str):
        raise ValueError(
            f"{place / CONFIG} names no hook point; give hook_name='blocks.18.hook_resid_post', for example"
        )
    options = _options(config, place)
    wanted = {"W_enc", "W_dec", "b_enc", "b_dec"} | ({"threshold"} if options.pop("jumps") else set())
    if not wanted <= set(tensors):
        raise ValueError(f"{place / WEIGHTS} holds {sorted(tensors)}; {sorted(wanted)} are needed")
    bad = [name for name in sorted(wanted) if not bool(torch.isfinite(tensors[name]).all())]
    if bad:
        raise ValueError(f"{place / WEIGHTS}: {', '.join(bad)} hold NaN or infinite numbers")
    weights: dict[str, Any] = {name: tensors[name] for name in wanted}
    return SparseAutoencoder(**weights, hook_name=point, **options)


def _options(config: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The fields that a file's settings stand for, and whether it has thresholds; ValueError for what is not known."""
    kind = str(config.get("architecture", "standard"))
    function = str(config.get("activation_fn") or config.get("activation_fn_str") or "relu")  # of releases before 6
    k = config.get("k") if kind == "topk" else None
    if kind == "standard" and function == "topk":
        kind, k = "topk", (config.get("activation_fn_kwargs") or {}).get("k")
    norm = str(config.get("normalize_activations") or "none")
    known = kind in ("standard", "jumprelu", "topk") and function in ("relu", "topk") and norm in ("none", "layer_norm")
    if not known or (kind == "topk") != (k is not None) or config.get("finetuning_scaling_factor"):
        raise ValueError(
            f"{place / CONFIG}: architecture {kind!r} with activation {function!r} and normalization {norm!r}; expected "
            "'standard', 'jumprelu' or 'topk' (with k), and 'none' or 'layer_norm'"
        )
    return {
        "jumps": kind == "jumprelu",
        "k": None if k is None else int(k),
        "input_bias": bool(config.get("apply_b_dec_to_input", True)),
        "layer_norm": norm == "layer_norm",
        "decoder_norms": bool(config.get("rescale_acts_by_decoder_norm", False)),
    }


def sae_hooks(
    sae: SparseAutoencoder, *, clamp: Mapping[int, float] | None = None, ablate: Iterable[int] = ()
) -> FwdHooks:
    """Hooks that set features to a value or take them out, at every position.

    The model keeps its own activation, and the change that the features make is added to it: what the autoencoder does not
    reconstruct stays, and features that have their value already change nothing.

    Args:
        sae: from ``read_sae``.
        clamp: by feature, its activation afterwards, 0 or above.
        ablate: features that are set to 0.

    Returns:
        ``[(hook name, fn)]``, for ``run_with_hooks``, ``score_pairs``, ``generate``, ``evaluate.Setting``.

    Raises:
        ValueError: a feature that is not there or named twice, a value that is not finite or below 0; during the run,
            activations of another width.

    Examples:
        >>> sae = SparseAutoencoder(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2), "blocks.4.hook_resid_post")
        >>> name, fn = sae_hooks(sae, clamp={1: 5.0})[0]
        >>> fn(torch.tensor([[[-3.0, 1.0]]]), hook=None).tolist()
        [[[-3.0, 5.0]]]
    """
    wanted = {whole("feature", f, 0): finite("the value of a feature", value) for f, value in (clamp or {}).items()}
    out = [whole("feature", f, 0) for f in ablate]
    bad = [f for f in (*wanted, *out) if f >= sae.W_dec.shape[0]] + [f for f in out if f in wanted or out.count(f) > 1]
    if bad or any(value < 0 or not math.isfinite(value) for value in wanted.values()):
        raise OptionError(
            f"features {sorted(set(bad))} or values {list(wanted.values())}: expected different features below "
            f"{sae.W_dec.shape[0]} and values of 0 or above"
        )
    numbers = torch.tensor([*wanted, *out], dtype=torch.long)
    values = torch.tensor([*wanted.values(), *(0.0 for _ in out)])

    def hook_fn(act: Float[Tensor, "batch pos *shape"], hook: Any) -> Float[Tensor, "batch pos *shape"]:
        acts = flat(act)
        if acts.shape[-1] != sae.W_dec.shape[1]:
            raise ValueError(f"{sae} does not fit activations {tuple(act.shape)}")
        features, own = sae.features(acts), numbers.to(act.device)
        change = torch.zeros_like(features)
        change[..., own] = values.to(features) - features[..., own]
        moved = change.any(-1, keepdim=True)
        if not bool(moved.any()):
            return act
        new = (acts.float() + sae.difference(acts, change)).to(act.dtype)
        return torch.where(moved, new, acts).view(act.shape)

    return edit_hooks(sae.site, sae.layer, hook_fn)
