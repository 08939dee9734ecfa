"""``grains-tl sweep``: the table, the cell that is chosen from it, and that cell on other records."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from grains_tl.hooks.steer import Positions

#: What fits on a screen; the csv has all columns.
SHOWN = "vector positions layer alpha effect effect_se low high verdict wrong_way accuracy kl perplexity n".split()


def add_sweep_options(
    parser: argparse.ArgumentParser, layers: Callable[[str], list[int]], numbers: Callable[[str], list[float]]
) -> None:
    """The options of ``sweep`` alone; ``layers`` and ``numbers`` read lists."""
    parser.add_argument("--vectors", required=True, action="append", help="file written by build (repeatable)")
    parser.add_argument(
        "--layers", type=layers, help="layers to sweep, e.g. 12,18 or 10-20 (default all that are stored)"
    )
    parser.add_argument(
        "--alphas", type=numbers, default=[-0.2, 0.1, 0.2, 0.4], help="step sizes (default --alphas=-0.2,0.1,0.2,0.4)"
    )
    parser.add_argument(
        "--positions",
        action="append",
        choices=get_args(Positions),
        help="which positions are steered (repeatable; default all)",
    )
    parser.add_argument(
        "--max-kl", type=float, default=0.1, help="KL that the chosen setting may cost, nats per token (default 0.1)"
    )
    parser.add_argument(
        "--neutral", type=int, default=8, help="neutral texts to measure the KL on (default 8; 0: none)"
    )
    parser.add_argument("--report-share", type=float, default=0.5, help="share of the records kept for the report")
    parser.add_argument("--test", metavar="FILE", help="records for the report; all of --pairs then serve to choose")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split of the records (default 0)")
    parser.add_argument("--out", "--csv", help="write the table to this csv file")
    parser.add_argument(
        "--checkpoint",
        help="file that keeps finished results, from which the same command resumes (default beside --out)",
    )


def sweep_checkpoint(args: argparse.Namespace) -> Path | None:
    """Where finished results are kept: the file that was asked for, else one beside the table."""
    named = args.checkpoint or (f"{args.out}.records.jsonl" if args.out else None)
    return Path(named) if named else None


def run_sweep(args: argparse.Namespace, pairs: Any, test: Any, load: Callable[[str | None], Any]) -> None:
    """Sweep on one part of the records, choose, report on the other."""
    from grains_tl._util.files import write_atomically
    from grains_tl._util.processes import finish, launched
    from grains_tl.evaluate.choosing import choose, report_choice
    from grains_tl.evaluate.parallel import shared_sweep
    from grains_tl.records.splits import record_id, split_records
    from grains_tl.vectors.files import load_vectors

    if args.out and Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a csv file in it")
    if not test and args.report_share > 0:
        pairs, test = split_records(pairs, args.report_share, seed=args.seed)
    stems = [Path(path).stem for path in args.vectors]
    if len(set(stems)) < len(stems):
        raise ValueError(f"--vectors: several files share a name ({', '.join(stems)}); rename one")
    vectors = {stem: load_vectors(path) for stem, path in zip(stems, args.vectors, strict=True)}
    for stem, one in vectors.items():
        lacking = sorted(set(args.layers or []) - set(one.layers))
        if lacking:
            raise ValueError(f"--layers: {stem} does not contain the layers {lacking}; it contains {list(one.layers)}")
    both = {record_id(pair) for pair in pairs} & {record_id(pair) for pair in test}
    if both:
        raise ValueError(
            f"--test: {len(both)} of its records are also in --pairs; give records that were not used to choose"
        )
    model = load(next(iter(vectors.values())).info.get("model", {}).get("name"))
    checkpoint = sweep_checkpoint(args)
    processes = launched()
    frame = shared_sweep(
        model,
        vectors,
        pairs,
        processes=processes,
        layers=args.layers,
        alphas=args.alphas,
        positions=args.positions or "all",
        neutral=args.neutral or None,
        checkpoint=checkpoint,
        progress=processes.rank == 0,
    )
    finish()
    if processes.rank > 0:
        return
    print(_table(frame))
    run, loop = frame.attrs["token_layers"], frame.attrs["naive_token_layers"]
    print(f"\ntoken-layers run: {run:,}; a loop over settings and responses: {loop:,} ({loop / max(run, 1):.1f} times)")
    if checkpoint:
        print(f"results in {checkpoint}: {frame.attrs['from_checkpoint']} were there before")
    if args.out:
        write_atomically(args.out, frame.to_csv(index=False).encode())
    if not (frame["alpha"] > 0).any():
        print("no cell is chosen: that needs positive alphas")
        return
    choice = choose(frame, max_kl=args.max_kl if args.neutral else None)
    print(f"\nchosen on {len(pairs)} records: {choice}")
    if not test:
        print("not reported: that needs other records (--test FILE, or --report-share)")
        return
    found = report_choice(model, vectors, choice, test, neutral=args.neutral or None, progress=True)
    print(f"on {len(test)} other records: {found['verdict'][0]}\n{_table(found)}")


def _table(frame: Any) -> str:
    return frame[[c for c in SHOWN if c in frame]].to_string(index=False, float_format=lambda x: f"{x:.3f}")
