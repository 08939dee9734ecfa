"""What steering costs while the model writes: KL, entropy and likelihood at every generated token.

1. The steered model continues each prompt; its tokens are kept as they are.
2. The whole text runs once without and once with the hooks; both distributions are compared where each new token was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.files import hash_of
from grains_tl._util.progress import progress_bar
from grains_tl._util.settings import current
from grains_tl.evaluate.measuring import about_setting
from grains_tl.evaluate.settings import Setting
from grains_tl.evaluate.store import Checkpoint
from grains_tl.inference.batches import by_token_budget, image_inputs, pad_rows, prompt_key
from grains_tl.inference.continuations import Continuations
from grains_tl.inference.generation import Continued, GenerationHooks, encode_prompts, hooks_at
from grains_tl.inference.objectives import kl_divergence, token_logprobs
from grains_tl.models.running import device_of, forward_logits
from grains_tl.types import HookedModel, PromptHooks

#: What ``token_costs`` gives for every generated token, in this order; nats, and 0 or 1 for agreement.
TOKEN_MEASURES = ("kl", "entropy", "base_entropy", "nll", "base_nll", "agreement")

#: Logits of one pass, in numbers: 128 MB in float32.
MAX_LOGITS = 2**25

#: Nats by which greedy tokens may on average lie below the likeliest of a run over the whole text.
FAR = 0.1


def token_costs(
    model: HookedModel, continued: Sequence[Continued], fwd_hooks: GenerationHooks | None
) -> list[Float[Tensor, "measure token"]]:
    """Compare the steered with the base distribution at each token that was generated.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        continued: prompts and continuations, of this steering or of another model.
        fwd_hooks: what they are compared under; ``None`` or none for the base model alone.

    Returns:
        Per continuation ``[measure, token]``, see ``TOKEN_MEASURES``; the token that ended a text counts.
    """
    found = [torch.zeros(len(TOKEN_MEASURES), 0) for _ in continued]
    budget = max(1, min(current().max_tokens, MAX_LOGITS // int(model.cfg.d_vocab)))
    written = [i for i, one in enumerate(continued) if one.new]
    lengths = [len(continued[i].prompt) + len(continued[i].new) for i in written]
    with torch.no_grad():
        for group in by_token_budget(lengths, max_tokens=budget):
            members = [written[place] for place in group]
            for i, values in zip(members, _compared(model, [continued[i] for i in members], fwd_hooks), strict=True):
                found[i] = values
    return found


def _compared(
    model: HookedModel, rows: Sequence[Continued], fwd_hooks: GenerationHooks | None
) -> list[Float[Tensor, "measure token"]]:
    """One batch: prompts padded on the left, so that they end at one place as in generation, texts on the right."""
    prompts, mask, offset = pad_rows(model, [one.prompt for one in rows], padding_side="left", at_least=2)
    width = prompts.shape[1]
    new, new_mask, _ = pad_rows(model, [one.new for one in rows])
    ids = torch.cat([prompts, new[:, :-1]], dim=1)
    mask = torch.cat([mask, new_mask[:, :-1]], dim=1)
    inputs = image_inputs(model, [one.images for one in rows], ids, offset)
    keep = torch.arange(width - 1, ids.shape[1], device=ids.device)
    base = forward_logits(model, ids, mask, keep, None, inputs).float().log_softmax(-1)
    hooks = hooks_at(fwd_hooks, width, [prompt_key(one.prompt, one.images) for one in rows])
    steered = forward_logits(model, ids, mask, keep, hooks, inputs).float().log_softmax(-1) if hooks else base
    entropies = [-(x.exp() * x).sum(-1) for x in (steered, base)]
    nll = [-token_logprobs(x, new) for x in (steered, base)]
    same = (steered.argmax(-1) == base.argmax(-1)).float()
    values = torch.stack([kl_divergence(steered, base).clamp_min(0), *entropies, *nll, same], dim=1).cpu()
    return [values[i, :, : len(one.new)] for i, one in enumerate(rows)]


def require_same_hooks(model: HookedModel, continued: Sequence[Continued], fwd_hooks: GenerationHooks | None) -> None:
    """Refuse a plain list of hooks that acts otherwise in a run over the whole text than in generation.

    A list cannot be told where the prompt ends. Greedy tokens are the likeliest of the run that drew them; where they are
    not the likeliest of the whole run, the two differ.

    Raises:
        ValueError: saying what to give.
    """
    if not fwd_hooks or isinstance(fwd_hooks, PromptHooks) or callable(fwd_hooks):
        return
    behind = []
    for one in continued[:4]:
        ids = torch.tensor([[*one.prompt, *one.new[:-1]]], device=device_of(model))
        keep = torch.arange(len(one.prompt) - 1, ids.shape[1], device=ids.device)
        inputs = image_inputs(model, [one.images], ids, torch.zeros(1, dtype=torch.long, device=ids.device))
        with torch.no_grad():
            logits = forward_logits(model, ids, torch.ones_like(ids), keep, hooks_at(fwd_hooks, 0, []), inputs)[
                0
            ].float()
        drawn = logits.gather(-1, torch.tensor(one.new, device=logits.device)[:, None])[:, 0]
        behind += (logits.max(-1).values - drawn).tolist()
    if behind and float(np.mean(behind)) > FAR:
        raise ValueError(
            "these hooks act otherwise in a run over the whole text than token by token, so what they cost there cannot be "
            "measured; give a Steering (vectors.steering(...)) or a function prompt_len -> hooks"
        )


def generated_costs(
    model: HookedModel, settings: Sequence[Setting], texts: Continuations, store: Checkpoint
) -> pd.DataFrame:
    """``text_costs`` on what each setting writes itself: one row per setting and prompt.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        settings: what to measure.
        texts: prompts, and how they are continued.
        store: what it has is not measured again.

    Returns:
        The columns of ``text_costs``, and ``budget``: what ``kl`` is a number of. The samples of a prompt make one row.

    Raises:
        ValueError: a setting whose hooks are a function of a batch, which generation has not.
    """
    names = [
        hash_of([ids, "" if x is None else x.digest]) for ids, x in encode_prompts(model, texts.prompts, texts.images)
    ]
    how = [texts.max_new_tokens, texts.temperature, texts.n_samples, texts.seed]
    rows, n_tokens = [], 0
    with progress_bar(total=len(settings) * len(names), desc="generate", unit="text") as bar:
        for k, setting in enumerate(settings):
            hooks = setting.hooks
            if callable(hooks):
                raise ValueError(
                    f"setting {k + 1} makes its hooks from a batch, which there is none of in generation; give a Steering"
                )
            keys = [hash_of(["generated", setting.key or str(k), name, how]) for name in names]
            if any(key not in store.rows for key in keys):
                samples = texts.of(model, hooks)
                if texts.temperature == 0:
                    require_same_hooks(model, samples[0], hooks)
                measured = [token_costs(model, sample, hooks) for sample in samples]
                values = [_row(torch.cat([sample[i] for sample in measured], dim=1)) for i in range(len(names))]
                about = about_setting(setting)
                store.append(
                    [(key, v, {**about, "text": i}) for i, (key, v) in enumerate(zip(keys, values, strict=True))]
                )
            bar.update(len(names))
            for i, key in enumerate(keys):
                base_nll, nll, agreement, *kl = store.rows[key]
                spent = float(np.mean(kl) if texts.quantile is None else np.quantile(kl, texts.quantile)) if kl else 0.0
                n_tokens += len(kl)
                means = {"base_nll": base_nll, "nll": nll, "agreement": agreement}
                row = {**about_setting(setting), "text": i, "n_tokens": len(kl), "kl": spent, **means}
                rows.append({**row, "budget": texts.label})
    frame = pd.DataFrame(rows)
    frame.attrs = {"tokens": n_tokens}
    return frame


def _row(values: Float[Tensor, "measure token"]) -> list[float]:
    """What is kept of a prompt: means of nll and agreement, then the KL of every token."""
    named = dict(zip(TOKEN_MEASURES, values.tolist(), strict=True))
    means = [float(np.mean(named[name])) if named[name] else 0.0 for name in ("base_nll", "nll", "agreement")]
    return [*means, *named["kl"]]
