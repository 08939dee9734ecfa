"""Tower and projector of a run as the package ships them: ``python -m studies.scenes_vlm.export RUN FOLDER [NOTE]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grains_tl.models.scenes_vlm import save_scenes_vlm
from studies.scenes_vlm.train import TrainConfig, Trainer
from studies.tiny_vlm.state_file import load_state


def main(argv: Sequence[str] | None = None) -> None:
    """Read the run's checkpoint, write weights and manifest."""
    run, folder, *note = sys.argv[1:] if argv is None else argv
    state = load_state(Path(run) / "checkpoint.safetensors")
    trainer = Trainer(TrainConfig(seed=state["config"]["seed"]))
    trainer.trained.load_state_dict(state["trained"])
    training = {"script": "studies/scenes_vlm/train.py", "steps_done": state["step"], **state["config"]}
    training |= {"note": note[0]} if note else {}
    print(save_scenes_vlm(trainer.model, folder, trainer.file, json.loads(json.dumps(training))))


if __name__ == "__main__":
    main()
