"""How much a small step after each block changes the next-token distribution: Fisher matrices, estimated from samples.

1. For every predicted token t of ordinary texts, KL(steered || base) of a small step v is v'F_t v / 2, where F_t is the
   covariance of the score d log p(y) / dv over tokens y drawn from the model's own distribution p.
2. One backward pass of sum_t e_t log p(y_t), with y_t drawn and random signs e_t, gives one vector s for every layer at once
   whose expected outer product is sum_t F_t: scores have mean zero and the draws are independent.
3. The samples themselves are kept, with the text that each comes from: they take less space than d_model x d_model matrices,
   and leaving out some texts estimates how good F is on others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError, numbered
from grains_tl._util.files import hash_of, write_atomically
from grains_tl._util.tensors import lasting
from grains_tl.attribution.field import require_finite
from grains_tl.hooks.steer import Positions
from grains_tl.models.identity import model_identity, same_fingerprint
from grains_tl.models.running import require_layers
from grains_tl.types import HookedModel
from grains_tl.vectors.fisher_samples import FisherStep, score_samples
from grains_tl.vectors.shrunken import ShrunkenInverse
from grains_tl.vectors.tensor_files import digest, read_tensors, with_checksum
from grains_tl.vectors.zero_steps import StepOperator, check_step

FORMAT = "grains_tl.fisher"
FORMAT_VERSION = 1
TENSORS = {"samples", "text", "n_tokens"}


@dataclass(frozen=True, eq=False, repr=False)
class Fisher:
    """Samples whose outer products average to the Fisher matrix of the next-token distribution, per layer.

    Attributes:
        samples: ``[sample, layer, d_model]``, gradients of the sampled log-probabilities of one text, nats per unit.
        text: ``[sample]``, which text each comes from.
        n_tokens: ``[text]``, predicted tokens of each text.
        layers: the layer of each column.
        info: model, texts (as hashes), scope, operator and seed.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, or a layer where every sample is zero.

    Examples:
        >>> fisher = Fisher.estimate(model, rows, layers=[18], n_samples=600)       # doctest: +SKIP
        >>> fisher.solve(gradient, 0.5).shape                                       # doctest: +SKIP
        torch.Size([1, 576])
    """

    samples: Float[Tensor, "sample layer d_model"]
    text: Int[Tensor, "sample"]
    n_tokens: Int[Tensor, "texts"]
    layers: tuple[int, ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("samples", "text", "n_tokens"):
            object.__setattr__(self, name, lasting(getattr(self, name)))
        shape = tuple(self.samples.shape)
        if self.samples.ndim != 3 or shape[1] != len(self.layers) or self.text.shape != self.samples.shape[:1]:
            raise ValueError(
                f"expected samples [sample, layer, d_model], one text per sample and one number per layer; got samples "
                f"{list(shape)}, {len(self.text)} texts and layers {list(self.layers)}"
            )
        require_finite(self.samples, "the Fisher samples")
        zero = [n for n, size in zip(self.layers, self.samples.abs().amax((0, 2)).tolist(), strict=True) if size == 0]
        if zero:
            raise ValueError(
                f"the Fisher matrix is zero at layers {zero}: a step there changes no prediction on these texts. Use longer "
                "texts, or another scope"
            )

    def __repr__(self) -> str:
        return f"Fisher({len(self.samples)} samples from {len(self.n_tokens)} texts, layers {list(self.layers)})"

    @classmethod
    def estimate(
        cls,
        model: HookedModel,
        rows: Sequence[Sequence[int]],
        *,
        layers: Sequence[int],
        n_samples: int = 600,
        scope: Positions = "all",
        operator: StepOperator = "add",
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> Fisher:
        """Samples from texts, given as token ids; every text gives the same number of samples.

        A scope such as ``"prompt"`` takes the first half of a text as the prompt, as ``text_costs`` does.

        Args:
            model: a ``TransformerBridge`` or ``HookedTransformer``.
            rows: the texts' token ids, two or more each.
            layers: which layers.
            n_samples: in all, rounded up to a multiple of the number of texts; one backward pass of a text each.
            scope: where the step acts (see ``MarginGradient``).
            operator: ``"add"`` or ``"add_renorm"`` (see ``MarginGradient``).
            seed: of the drawn tokens and signs; each text has draws of its own, whatever its batch.
            checkpoint: a ``.jsonl`` file that receives the samples of each text when they are there; a later call takes
                them from it.

        Returns:
            The samples.

        Raises:
            ValueError: no texts, one of fewer than two tokens, options that are not known, or gradients that are not
                finite.
        """
        check_step(scope, operator)
        each = -(-whole("n_samples", n_samples, 1) // max(1, len(rows)))
        layers = require_layers(model, layers)
        if not rows:
            raise OptionError("no neutral texts; expected at least one to estimate the Fisher matrix")
        for number, row in enumerate(rows, start=1):
            with numbered("text", number):
                if len(row) < 2:
                    raise ValueError("it has fewer than two tokens, so nothing in it is predicted")
        step = FisherStep(scope, operator)
        samples = score_samples(model, rows, layers, each, step=step, seed=seed, checkpoint=checkpoint)
        info = {
            "model": model_identity(model, bare=True),
            "texts": [hash_of(list(row)) for row in rows],
            "scope": scope,
            "operator": operator,
            "seed": seed,
        }
        text = torch.arange(len(rows)).repeat_interleave(each)
        n_tokens = torch.tensor([len(row) - 1 for row in rows])
        return cls(samples, text, n_tokens, tuple(layers), info)

    def at(self, layers: Sequence[int]) -> Fisher:
        """The same for some of the layers.

        Args:
            layers: which, in the order wanted.

        Returns:
            The samples at these layers.

        Raises:
            ValueError: a layer that it does not have.
        """
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise ValueError(f"the Fisher samples are of layers {list(self.layers)}; {missing} are missing")
        columns = [self.layers.index(layer) for layer in layers]
        return Fisher(self.samples[:, columns], self.text, self.n_tokens, tuple(layers), self.info)

    def of_texts(self, texts: Sequence[int]) -> Fisher:
        """The same from some of the texts (by their places)."""
        rows = torch.isin(self.text, torch.tensor(list(texts)))
        kept = torch.zeros_like(self.n_tokens).index_fill(0, torch.tensor(list(texts)), 1) * self.n_tokens
        return Fisher(self.samples[rows], self.text[rows], kept, self.layers, self.info)

    def factor(self, layer: int) -> Float[Tensor, "sample d_model"]:
        """X with F = X'X, the mean over the texts' predicted tokens, in float64."""
        each = torch.bincount(self.text, minlength=len(self.n_tokens))[self.text]
        weight = (1.0 / (each.double() * self.n_tokens.sum())).sqrt()
        return self.samples[:, self.layers.index(layer)].double() * weight[:, None]

    def matrix(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """F, nats per token per squared unit; its rank is at most the number of samples."""
        return self.factor(layer).T @ self.factor(layer)

    def predicted_kl(self, vectors: Float[Tensor, "layer d_model"]) -> Float[Tensor, "layer"]:
        """v'Fv / 2, nats per token, of one vector per layer (in residual units); right for small ones."""
        pairs = zip(self.layers, vectors.double(), strict=True)
        return torch.stack([(self.factor(layer) @ v).square().sum() / 2 for layer, v in pairs]).float()

    def solve(
        self, gradient: Float[Tensor, "layer d_model"], shrinkage: float | Float[Tensor, "layer"]
    ) -> Float[Tensor, "layer d_model"]:
        """F_s^-1 g with F_s = (1 - shrinkage) F + shrinkage * (mean eigenvalue of F) * identity.

        Args:
            gradient: one vector per layer.
            shrinkage: above 0 and at most 1 (1 leaves the gradient's direction), one for all layers or one each. A ridge of
                r mean eigenvalues is the direction of a shrinkage of r / (1 + r).

        Returns:
            ``[layer, d_model]`` in float64.
        """
        per_layer = torch.as_tensor(shrinkage, dtype=torch.float64).expand(len(self.layers))
        if not bool(((per_layer > 0) & (per_layer <= 1)).all()):
            raise OptionError(f"shrinkage={shrinkage}; expected above 0 and at most 1 (F alone is singular)")
        parts = zip(self.layers, gradient, per_layer.tolist(), strict=True)
        return torch.stack([ShrunkenInverse.of(self.factor(layer)).times(g, s) for layer, g, s in parts])

    def ceiling(
        self, gradient: Float[Tensor, "layer d_model"], kl: float, shrinkage: float | Float[Tensor, "layer"]
    ) -> Float[Tensor, "layer"]:
        """sqrt(2 kl g'F_s^-1 g): to first order, the largest change of the margin by any vector that costs ``kl``.

        An estimate and not a bound: margin and KL are taken as linear and quadratic, g and F come from samples, and the
        number depends on the shrinkage, so state it. On SmolLM2, layer 18, 20 sentiment records and 608 samples, it is 9.4
        nats at a shrinkage of 0.1, 7.4 at 0.5 and 8.1 at 0.9 for a KL of 0.05, where 4.0 were reached on test records. The
        recipe's held-out prediction was nearer (4.6), and still too high.

        Args:
            gradient: the mean gradient of the margin per layer.
            kl: the budget, nats per token.
            shrinkage: see ``solve``.

        Returns:
            ``[layer]``, nats.
        """
        gain = (gradient.double() * self.solve(gradient, shrinkage)).sum(-1)
        return (2 * kl * gain).sqrt().float()

    # -- files --

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file; complete or not at all."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        about = {**self.info, "layers": list(self.layers)}
        return write_atomically(path, with_checksum(FORMAT, FORMAT_VERSION, about, tensors))

    @classmethod
    def load(cls, path: str | Path, model: HookedModel | None = None) -> Fisher:
        """Read a file of ``save``; nothing in it is executed.

        Args:
            path: the file.
            model: if given, refuse samples of another model.

        Returns:
            The samples.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, a newer version, damaged content, or samples of another model.
        """
        header, tensors = read_tensors(path, "Fisher.save(path)")
        if header.get("format") != FORMAT or header.get("version") != str(FORMAT_VERSION) or set(tensors) != TENSORS:
            raise ValueError(
                f"{path} holds {header.get('format')!r} version {header.get('version')!r} with {sorted(tensors)}; expected "
                f"{FORMAT!r} version {FORMAT_VERSION} with {sorted(TENSORS)}, as Fisher.save(path) writes it"
            )
        if header.get("sha256") != digest(header.get("manifest", ""), tensors):
            raise ValueError(
                f"{path} is damaged (its checksum does not fit what it holds); delete it and estimate again"
            )
        info = json.loads(header["manifest"])
        fisher = cls(layers=tuple(info.pop("layers")), info=info, **tensors)
        if model is not None:
            fisher.require_match(model)
        return fisher

    def require_match(self, model: HookedModel) -> None:
        """Refuse a model that the samples are not of.

        Args:
            model: the model to build vectors for.

        Raises:
            ValueError: another shape or other weights.
        """
        of, have = self.info.get("model", {}), model_identity(model, bare=True)
        keys = ("d_model", "n_layers", "n_heads", "d_vocab")
        if any(of.get(k) != have[k] for k in keys) or not same_fingerprint(of.get("fingerprint"), have["fingerprint"]):
            raise ValueError(
                f"these Fisher samples are of {of.get('name')}, the model is {have['name']} with other weights or another "
                "shape; estimate them for this model"
            )
