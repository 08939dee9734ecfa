"""``grains-tl demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from grains_tl.cli.options import add_model_options, load


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--quick", action="store_true", help="use fewer records and layers: two minutes instead of fifteen"
    )
    parser.add_argument("--out", default="grains-tl-demo", help="folder for report.html and results.json")
    parser.add_argument(
        "--set", action="append", choices=["sentiment", "misconceptions"], help="run only this set (repeatable)"
    )
    add_model_options(parser)


def run_demo_command(args: argparse.Namespace) -> None:
    """Run the demo of the model that was named."""
    if args.model == "tiny-vlm":
        _vision_demo(args)
        return
    from dataclasses import replace

    from grains_tl.demo.one_set import DemoSettings
    from grains_tl.demo.text import QUICK, run_demo, summary

    settings = QUICK if args.quick else DemoSettings()
    if args.set:
        settings = replace(settings, sets=tuple(args.set))
    results = run_demo(load(args), args.out, settings)
    print(summary(results))
    print(f"\n{results['seconds']:.0f} s; open {Path(args.out) / 'report.html'} (numbers in results.json beside it)")


def _vision_demo(args: argparse.Namespace) -> None:
    from grains_tl.demo.vision import VISION_QUICK, VisionDemoSettings, run_vision_demo, vision_summary

    if args.set:
        raise ValueError("--set cannot be used with tiny-vlm, whose demo makes its own scenes; leave it out")
    results = run_vision_demo(load(args), args.out, VISION_QUICK if args.quick else VisionDemoSettings())
    print(vision_summary(results))
    print(f"\n{results['seconds']:.0f} s; open {Path(args.out) / 'report.html'} (numbers in results.json beside it)")
