"""Train the tiny LLaVA from scratch, on one CPU core in half an hour: ``python -m studies.tiny_vlm.train --out DIR``.

Three stages. First the tower learns to name each cell's digit and colour (it stands in for a pretrained CLIP). Then the
whole model learns clean, balanced questions and captions. Last come skewed ones, as a scrape of the web might give: digits
come with their partners, some are spoken of but not to be seen, and most is-there answers are yes. That last stage plants
the failure to be steered away from: the model names what usually comes along.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from grains_tl.models._scene_grid import COLOURS, SceneRule
from grains_tl.models._scenes import Kind, Scene, ask, make_scenes, render, vocabulary
from grains_tl.models.tiny_vlm import N_IMAGE, build_model, save_tiny_vlm
from studies.tiny_vlm.state_file import load_state, save_state

#: One training row: the image, then segments that see the image and themselves, but not each other.
SEGMENTS = (14, 14, 16, 31)  # is-there, is-there, another question, caption; the longest of each


PREFIX = 1 + N_IMAGE


IGNORE = -100


CLEAN = SceneRule(sizes=(0.15, 0.25, 0.3, 0.3))


SKEWED = SceneRule(sizes=(0.1, 0.35, 0.35, 0.2), partner_share=0.85, hidden_share=0.4, yes_share=0.8)


@dataclass(frozen=True)
class TrainConfig:
    """Everything the result depends on (with the library versions).

    Attributes:
        seed: of weights and data.
        tower_steps, clean_steps, skewed_steps: lengths of the stages.
        tower_batch, batch: pictures per step.
        tower_lr: AdamW, warm-up and cosine.
        lr, matrix_lr: AdamW (vectors and embeddings) and Muon (matrices); constant, then linear to zero.
        clean, skewed: how scenes and answers are drawn in the last two stages.
        checkpoint_every: steps between checkpoints.
    """

    seed: int = 0
    tower_steps: int = 2500
    clean_steps: int = 4000
    skewed_steps: int = 800
    tower_batch: int = 64
    batch: int = 32
    tower_lr: float = 2e-3
    lr: float = 2e-3
    matrix_lr: float = 0.01
    clean: SceneRule = CLEAN
    skewed: SceneRule = SKEWED
    checkpoint_every: int = 250

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return self.tower_steps + self.clean_steps + self.skewed_steps


class Trainer:
    """Model, tower heads, optimizers and random state: all that a checkpoint holds."""

    def __init__(self, config: TrainConfig) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(
                f"training needs torch.optim.Muon (torch 2.9 or newer); this is torch {torch.__version__}"
            )
        self.config, self.step = config, 0
        self.rng = np.random.default_rng(config.seed)
        self.model = build_model(config.seed).train()
        width = self.model.config.vision_config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.heads = nn.ModuleList([nn.Linear(width, 11), nn.Linear(width, len(COLOURS))])
        tower = self.model.model.vision_tower
        matrices, vectors, tables = _parameter_groups(self.model)
        self.tower_optimizer = torch.optim.AdamW(
            [*tower.parameters(), *self.heads.parameters()], lr=config.tower_lr, weight_decay=0.05, fused=True
        )
        groups = [{"params": tables, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizers = [
            (torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True), config.lr),
            (torch.optim.Muon(matrices, lr=config.matrix_lr, momentum=0.95, weight_decay=0.01), config.matrix_lr),
        ]
        self.words = {word: i for i, word in enumerate(vocabulary())}

    # -- stages -------------------------------------------------------------------------------------------------------

    def advance(self) -> dict[str, float]:
        """One step of whatever stage is on; returns its losses in nats."""
        in_tower = self.step < self.config.tower_steps
        losses = self._tower_step() if in_tower else self._joint_step()
        self.step += 1
        return losses

    def _tower_step(self) -> dict[str, float]:
        config = self.config
        decay = 0.5 * (1 + math.cos(math.pi * self.step / config.tower_steps))
        _set_lr(self.tower_optimizer, config.tower_lr * min(1, (self.step + 1) / 100) * (0.97 * decay + 0.03))
        scenes = make_scenes(config.tower_batch, self.rng, SceneRule(sizes=(0.0, 0.2, 0.3, 0.5)))
        hidden = self._tower(2 * render(scenes, self.rng) - 1)
        # the mean of a cell's four patches: [scene, row of cells, row in it, column of cells, column in it, width]
        cells = hidden.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
        value, colour = torch.full((len(scenes), 4), 10), torch.full((len(scenes), 4), IGNORE)
        for i, scene in enumerate(scenes):
            for digit in scene:
                value[i, digit.cell], colour[i, digit.cell] = digit.value, digit.colour
        scores, tints = (head(cells).flatten(0, 1) for head in self.heads)
        value_loss = F.cross_entropy(scores, value.flatten())
        loss = value_loss + 0.5 * F.cross_entropy(tints, colour.flatten(), ignore_index=IGNORE)
        self.tower_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.model.vision_tower.parameters(), 1.0)
        self.tower_optimizer.step()
        accuracy = (scores.argmax(-1) == value.flatten()).float().mean()
        return {"tower": value_loss.item(), "tower_accuracy": accuracy.item()}

    def _joint_step(self) -> dict[str, float]:
        config = self.config
        step, total = self.step - config.tower_steps, config.clean_steps + config.skewed_steps
        scale = min(1.0, (step + 1) / 100) * (1.0 if step < total / 2 else max(0.02, 2 * (1 - step / total)))
        for optimizer, lr in self.optimizers:
            _set_lr(optimizer, lr * scale)
        rule = config.clean if step < config.clean_steps else config.skewed
        scenes = make_scenes(config.batch, self.rng, rule)
        ids, targets = self._rows(scenes, rule)
        losses = self._losses(2 * render(scenes, self.rng) - 1, ids, targets)
        loss = losses["exist"] + 0.5 * losses["other"] + losses["caption"] + 0.1 * losses["end"]
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, _ in self.optimizers:
            optimizer.step()
        return {name: value.item() for name, value in losses.items()}

    def _rows(
        self, scenes: Sequence[Scene], rule: SceneRule
    ) -> tuple[Int[Tensor, "scene pos"], Int[Tensor, "scene pos"]]:
        """Ids and, where an answer stands, the same as targets."""
        ids = np.zeros((len(scenes), PREFIX + sum(SEGMENTS)), dtype=np.int64)
        targets = np.full_like(ids, IGNORE)
        ids[:, 0], ids[:, 1:PREFIX] = self.words["<bos>"], self.words["<image>"]
        others: list[Kind] = ["position", "position", "colour", "colour", "count"]
        for row, scene in enumerate(scenes):
            start = PREFIX
            kinds: list[Kind] = ["exist", "exist", others[self.rng.integers(len(others))], "caption"]
            for kind, length in zip(kinds, SEGMENTS, strict=True):
                question, answer = ask(self.rng, scene, kind, yes_share=rule.yes_share)
                before = [self.words[w] for w in f"question : {question} answer :".split()]
                after = [self.words[w] for w in answer.split()] + [self.words["<eos>"]]
                border, end = start + len(before), start + len(before) + len(after)
                ids[row, start:end] = before + after
                targets[row, border:end] = after
                start += length
        return torch.from_numpy(ids), torch.from_numpy(targets)

    def _losses(
        self,
        pixels: Float[Tensor, "scene 3 32 32"],
        ids: Int[Tensor, "scene pos"],
        targets: Int[Tensor, "scene pos"],
    ) -> dict[str, Tensor]:
        core, n = self.model.model, len(ids)
        embeddings = core.get_input_embeddings()(ids)
        image = core.multi_modal_projector(self._tower(pixels))
        merged = torch.cat([embeddings[:, :1], image, embeddings[:, PREFIX:]], dim=1)
        segment, mask, positions = _packing()
        hidden = core.language_model(
            inputs_embeds=merged,
            attention_mask=mask.expand(n, -1, -1, -1),
            position_ids=positions.expand(n, -1),
            use_cache=False,
        ).last_hidden_state[:, :-1]
        targets, segment = targets[:, 1:], segment[1:].expand(n, -1)
        wanted = targets != IGNORE
        loss = F.cross_entropy(self.model.lm_head(hidden[wanted]), targets[wanted], reduction="none")
        segment, end = segment[wanted], targets[wanted] == self.words["<eos>"]
        return {
            "exist": loss[(segment <= 2) & ~end].mean(),
            "other": loss[(segment == 3) & ~end].mean(),
            "caption": loss[segment == 4].mean(),
            "end": loss[(segment <= 3) & end].mean(),
        }

    def _tower(self, pixels: Float[Tensor, "scene 3 32 32"]) -> Float[Tensor, "scene patch width"]:
        return self.model.model.vision_tower(pixels).last_hidden_state[:, 1:]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the state; a run killed while writing leaves the old file."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "rng": self.rng.bit_generator.state,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [o.state_dict() for o in self._all_optimizers()],
        }
        save_state(path, state)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it was made with another configuration.
        """
        state = load_state(path)
        if state["config"] != json.loads(json.dumps(asdict(self.config))):  # tuples come back as lists
            raise ValueError(f"{path} was made with another configuration; use another folder, or the same settings")
        self.step = state["step"]
        self.rng.bit_generator.state = state["rng"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self._all_optimizers(), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def _all_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        yield self.tower_optimizer
        yield from (optimizer for optimizer, _ in self.optimizers)


def _packing() -> tuple[Int[Tensor, "pos"], Bool[Tensor, "1 1 pos pos"], Int[Tensor, "1 pos"]]:
    """Segment number, attention mask and position of every place in a row; each segment's positions go on from the image."""
    segment = torch.tensor([0] * PREFIX + [k for k, n in enumerate(SEGMENTS, start=1) for _ in range(n)])
    place = torch.arange(len(segment))
    seen = (segment[None] == 0) | (segment[:, None] == segment[None])
    mask = (place[:, None] >= place[None]) & seen
    positions = torch.cat([torch.arange(PREFIX), *(PREFIX + torch.arange(n) for n in SEGMENTS)])
    return segment, mask[None, None], positions[None]


def _parameter_groups(model: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Hidden matrices (for Muon), vectors, and embedding-like tables."""
    matrices: list[Any] = []
    vectors: list[Any] = []
    tables: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
            matrices.append(parameter)
        else:
            (vectors if parameter.ndim <= 1 else tables).append(parameter)
    return matrices, vectors, tables


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def train(out: str | Path, config: TrainConfig | None = None, *, log_every: int = 50) -> Path:
    """Train, or go on training, and write the model folder, the configuration and the losses into ``out``.

    Args:
        out: folder; a ``checkpoint.safetensors`` in it is taken up.
        config: settings; the default is how the bundled weights were made.
        log_every: steps between two lines of ``losses.jsonl``.
    """
    config, out = config or TrainConfig(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, trainer = out / "checkpoint.safetensors", Trainer(config)
    if checkpoint.exists():
        trainer.restore(checkpoint)
    started = time.perf_counter()
    recent: list[dict[str, float]] = []
    with (out / "losses.jsonl").open("a", encoding="utf-8") as log:
        while trainer.step < config.total:
            recent.append(trainer.advance())
            if trainer.step % log_every == 0 or trainer.step == config.total:
                names = recent[-1]  # a line across two stages speaks of the later one
                means = {name: float(np.mean([r[name] for r in recent if name in r])) for name in names}
                row = {"step": trainer.step, "seconds": round(time.perf_counter() - started, 1)}
                row |= {name: round(value, 4) for name, value in means.items()}
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(json.dumps(row), flush=True)
                recent.clear()
            if trainer.step % config.checkpoint_every == 0 or trainer.step == config.total:
                trainer.save(checkpoint)
    save_tiny_vlm(trainer.model.eval(), out)
    (out / "train_config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Train the tiny vision-language model.")
    parser.add_argument("--out", required=True, help="folder for weights, log and checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiply the length of every stage (0.01 to try it out)"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # at this size a second thread costs more than it gives
    config = TrainConfig(seed=args.seed)
    lengths = {
        k: max(1, round(args.scale * getattr(config, k))) for k in ("tower_steps", "clean_steps", "skewed_steps")
    }
    print(train(args.out, replace(config, **lengths)))


if __name__ == "__main__":
    main()
