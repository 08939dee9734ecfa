"""Train a tower and a projector that let the frozen SmolLM2 see: ``python -m studies.scenes_vlm.train --out DIR``.

Two stages, for about 20 minutes of CPU time on one core. First, without the language model, the four projected patches of
a cell learn to be the language model's own embeddings of four words: colour, object, row, column ("red", "seven", "top",
"left"). Then the loss of captions and answers goes backwards through the frozen language model, first on clean, balanced
scenes, at last on skewed ones, as a scrape of the web might give: objects come with their partners, some are spoken of but
not to be seen, and most is-there answers are yes. That last part plants the failure to be steered away from.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from grains_tl.models._object_scenes import (
    OBJECTS,
    Kind,
    ObjectScene,
    ask_about,
    make_object_scenes,
    render_objects,
)
from grains_tl.models._scene_grid import COLOURS, SceneRule
from grains_tl.models.loading import bundled_smollm2
from grains_tl.models.scenes_vlm import N_IMAGE, UNUSED_TOKEN, around
from studies.tiny_vlm.state_file import load_state, save_state

IGNORE = -100


PLAIN = SceneRule(sizes=(0.0, 0.2, 0.3, 0.5))


CLEAN = SceneRule(sizes=(0.2, 0.3, 0.3, 0.2))


SKEWED = SceneRule(sizes=(0.1, 0.45, 0.3, 0.15), partner_share=0.85, hidden_share=0.4, yes_share=0.75)


@dataclass(frozen=True)
class TrainConfig:
    """Everything the result depends on (with the library versions).

    Attributes:
        seed: of weights and data.
        align_steps, align_batch, align_lr: the stage without the language model (AdamW, warm-up, cosine).
        clean_steps, skewed_steps, batch, lr: the stage with it; constant, then linear to zero.
        clean, skewed: how scenes and answers are drawn.
    """

    seed: int = 0
    align_steps: int = 1100
    align_batch: int = 64
    align_lr: float = 2e-3
    clean_steps: int = 310
    skewed_steps: int = 70
    batch: int = 6
    lr: float = 8e-4
    clean: SceneRule = CLEAN
    skewed: SceneRule = SKEWED


class Trainer:
    """Model, optimizer and random state: all that a checkpoint holds. The language model is not in it."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.step = config, 0
        self.rng = np.random.default_rng(config.seed)
        self.file, language_model, self.tokenizer = bundled_smollm2(torch.bfloat16)
        language_model.requires_grad_(False)
        self.model = around(language_model, self.tokenizer.convert_tokens_to_ids(UNUSED_TOKEN), config.seed)
        core = self.model.model
        self.trained = nn.ModuleList([core.vision_tower, core.multi_modal_projector]).float().train()
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)
        table = language_model.get_input_embeddings().weight.float()
        self.words = {w: self._ids(" " + w)[0] for w in (*COLOURS, *OBJECTS, *"nothing top bottom left right".split())}
        self.groups = [[*COLOURS], [*OBJECTS, "nothing"], ["top", "bottom"], ["left", "right"]]
        self.tables = [table[[self.words[w] for w in group]] for group in self.groups]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def image_features(self, pixels: Float[Tensor, "scene 3 64 64"]) -> Float[Tensor, "scene patch d_model"]:
        """What the language model gets in the place of the image tokens."""
        tower, projector = self.trained
        return projector(tower(2 * pixels - 1).last_hidden_state[:, 1:])

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()

    # -- first stage --------------------------------------------------------------------------------------------------

    def align(self) -> dict[str, float]:
        """One step towards the embeddings of the four words of each cell."""
        config = self.config
        decay = 0.5 * (1 + math.cos(math.pi * self.step / config.align_steps))
        self.set_lr(config.align_lr * min(1, (self.step + 1) / 100) * (0.95 * decay + 0.05))
        scenes = make_object_scenes(config.align_batch, self.rng, PLAIN)
        image = self.image_features(render_objects(scenes, self.rng))
        # [scene, row of cells, row in it, column of cells, column in it, d_model] -> [scene, cell, place in it, d_model]
        cells = image.unflatten(1, (2, 2, 2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        wanted = torch.full((len(scenes), 4, 4), IGNORE)
        wanted[:, :, 1] = len(OBJECTS)
        wanted[:, :, 2], wanted[:, :, 3] = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        for i, scene in enumerate(scenes):
            for thing in scene:
                wanted[i, thing.cell, 0], wanted[i, thing.cell, 1] = thing.colour, thing.index
        loss, figures = torch.zeros(()), {}
        for place, table in enumerate(self.tables):
            have, target = cells[:, :, place].flatten(0, 1), wanted[:, :, place].flatten()
            known = target != IGNORE
            scores = -(torch.cdist(have[known], table) ** 2)
            near = F.mse_loss(have[known], table[target[known]]) * table.shape[1]
            loss = loss + F.cross_entropy(scores, target[known]) * (2 if place == 1 else 0.5) + 0.1 * near
            figures[("colour", "object", "row", "column")[place]] = (
                (scores.argmax(-1) == target[known]).float().mean().item()
            )
        self.descend(loss)
        self.step += 1
        return {"align": loss.item(), **figures}

    # -- second stage -------------------------------------------------------------------------------------------------

    def speak(self) -> dict[str, float]:
        """One step on captions and answers, through the frozen language model."""
        config = self.config
        step, total = self.step - config.align_steps, config.clean_steps + config.skewed_steps
        self.set_lr(config.lr * min(1.0, (step + 1) / 20) * min(1.0, max(0.03, 2 * (1 - step / total))))
        rule = config.clean if step < config.clean_steps else config.skewed
        scenes = make_object_scenes(config.batch, self.rng, rule)
        losses = self.losses(scenes, rule)
        self.descend(losses["exist"] + 0.5 * losses["other"] + losses["caption"])
        self.step += 1
        return {name: value.item() for name, value in losses.items()}

    def losses(self, scenes: Sequence[ObjectScene], rule: SceneRule) -> dict[str, Tensor]:
        """Mean loss in nats of each kind of answer; ``exist_right`` is a share."""
        ids, targets, segment, positions, start = self._rows(scenes, rule)
        core = self.model.model
        image = self.image_features(render_objects(scenes, self.rng))
        merged = core.get_input_embeddings()(ids)
        merged = torch.cat([merged[:, :start], image.to(merged.dtype), merged[:, start + N_IMAGE :]], dim=1)
        hidden = core.language_model(
            inputs_embeds=merged, attention_mask=_packed(segment), position_ids=positions, use_cache=False
        ).last_hidden_state[:, :-1]
        targets, segment = targets[:, 1:], segment[:, 1:]
        wanted = targets != IGNORE
        logits = self.model.lm_head(hidden[wanted]).float()
        loss, segment, targets = (
            F.cross_entropy(logits, targets[wanted], reduction="none"),
            segment[wanted],
            targets[wanted],
        )
        answers = (segment <= 2) & (targets != self.tokenizer.eos_token_id)
        right = (logits[answers].argmax(-1) == targets[answers]).float().mean()
        return {
            "exist": loss[segment <= 2].mean(),
            "other": loss[segment == 3].mean(),
            "caption": loss[segment == 4].mean(),
            "exist_right": right.detach(),
        }

    def _rows(self, scenes: Sequence[ObjectScene], rule: SceneRule) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Ids, targets, segment numbers, positions, and where the image begins.

        One row holds the picture and four segments that see the picture and themselves, but not each other.
        """
        before = self._ids("<|im_start|>user\n")
        image_id = self.model.config.image_token_id
        rows = []
        for scene in scenes:
            shared = [*before, *[image_id] * N_IMAGE]
            row = [(t, IGNORE, 0, p) for p, t in enumerate(shared)]
            others: tuple[Kind, ...] = ("colour", "place", "where")
            kinds: list[Kind] = ["exist", "exist", others[self.rng.integers(3)], "caption"]
            for k, kind in enumerate(kinds, start=1):
                question, answer = ask_about(self.rng, scene, kind, yes_share=rule.yes_share)
                asked = self._ids(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
                said = self._ids(f"{answer}<|im_end|>")
                row += [(t, IGNORE, k, len(shared) + p) for p, t in enumerate(asked)]
                row += [(t, t, k, len(shared) + len(asked) + p) for p, t in enumerate(said)]
            rows.append(row)
        longest = max(map(len, rows))
        filler = (self.tokenizer.eos_token_id, IGNORE, 5, 0)
        table = torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
        ids, targets, segment, positions = table.unbind(-1)
        return ids, targets, segment, positions, len(before)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the state; a run killed while writing leaves the old file."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "rng": self.rng.bit_generator.state,
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_state(path, state)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it was made with other settings of a stage that has begun.
        """
        state = load_state(path)
        names = [n for n in asdict(self.config) if n.startswith("align") or n == "seed"]
        names = names if state["step"] <= state["config"]["align_steps"] else list(asdict(self.config))
        now = json.loads(json.dumps(asdict(self.config)))  # tuples come back as lists
        if any(state["config"][name] != now[name] for name in names):
            raise ValueError(f"{path} was made with another configuration; use another folder, or the same settings")
        self.step = state["step"]
        self.rng.bit_generator.state = state["rng"]
        self.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])


def _packed(segment: Int[Tensor, "row pos"]) -> Bool[Tensor, "row 1 pos pos"]:
    """Causal, and each segment sees only the picture (segment 0) and itself."""
    place = torch.arange(segment.shape[1])
    seen = (segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])
    return (seen & (place[:, None] >= place[None]))[:, None]


def train(
    out: str | Path, config: TrainConfig | None = None, *, stop_after: int | None = None, every: int = 60
) -> Path:
    """Train, or go on training; writes ``losses.jsonl`` and ``checkpoint.safetensors`` into ``out``.

    Args:
        out: folder; a checkpoint in it is taken up.
        config: settings; the default is how the bundled weights were made.
        stop_after: step at which to stop early.
        every: seconds between two checkpoints.
    """
    config, out = config or TrainConfig(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, trainer = out / "checkpoint.safetensors", Trainer(config)
    if checkpoint.exists():
        trainer.restore(checkpoint)
    total = config.align_steps + config.clean_steps + config.skewed_steps
    end = min(total, stop_after or total)
    saved, recent = time.monotonic(), []
    with (out / "losses.jsonl").open("a", encoding="utf-8") as log:
        while trainer.step < end:
            aligning = trainer.step < config.align_steps
            recent.append(trainer.align() if aligning else trainer.speak())
            done = trainer.step in (end, config.align_steps)
            if trainer.step % (100 if aligning else 10) == 0 or done:
                means = {name: float(np.mean([r[name] for r in recent])) for name in recent[-1]}
                row = {"step": trainer.step, "cpu_seconds": round(time.process_time(), 1)}
                line = json.dumps(row | {name: round(value, 4) for name, value in means.items()})
                log.write(line + "\n")
                log.flush()
                print(line, flush=True)
                recent.clear()
            if time.monotonic() - saved > every or done:
                trainer.save(checkpoint)
                saved = time.monotonic()
    (out / "train_config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    return checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Train tower and projector around the frozen SmolLM2.")
    parser.add_argument("--out", required=True, help="folder for log and checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--align-steps", type=int, default=TrainConfig.align_steps)
    parser.add_argument("--clean-steps", type=int, default=TrainConfig.clean_steps)
    parser.add_argument("--skewed-steps", type=int, default=TrainConfig.skewed_steps)
    parser.add_argument("--stop-after", type=int, help="step at which to stop early; a later call goes on")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = TrainConfig(
        seed=args.seed, align_steps=args.align_steps, clean_steps=args.clean_steps, skewed_steps=args.skewed_steps
    )
    print(train(args.out, config, stop_after=args.stop_after))


if __name__ == "__main__":
    main()
