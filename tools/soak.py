"""Random calls of a cache against a plain NumPy model, a fixed number of them: `make soak`.

Everything held is compared after every step (tests/model_steps.py). Steps go in runs of one cache each; run 12 of
seed 1 makes the same calls everywhere, whatever is run beside it, and `--run 12` repeats it alone.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from backends import CPU_BACKENDS, Backend, Unavailable, built_emulator, using
from model_steps import Failure, seeded_run, shrunk

from kvcache_ext import build_info

_kept = ExitStack()  # what a worker has chosen, for as long as it lives
_backend: Backend


def begin_worker(device: str, emulator: str) -> None:
    global _backend
    faulthandler.enable()
    torch.set_num_threads(1)  # small tensors are no work to share out
    torch.manual_seed(0)
    _backend = _kept.enter_context(using(device, Path(emulator)))


def take_run(seed: str, steps: int) -> tuple[Counter[str], str]:
    """How many steps of each kind were taken, and what failed."""
    try:
        return seeded_run(seed, range(steps), _backend.device, small=_backend.slow), ""
    except Failure as failure:
        lines = traceback.format_exception(failure.__cause__, limit=-4)
        lines.append(f"\nThe first of {len(failure.numbers)} steps that fails: {failure}\nFewer steps that fail:\n")
        smaller = shrunk(seed, failure, _backend.device, small=_backend.slow)
        lines += [f"  {line}\n" for line in smaller.log]
        lines.append(f"  -> {smaller}\n")
        return Counter(), "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="how many calls (default: 100,000)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", *CPU_BACKENDS))
    parser.add_argument("--seed", type=int, help="default: another one every time; it is printed")
    parser.add_argument("--run", type=int, help="this run of the seed alone")
    parser.add_argument("--steps-per-run", type=int, default=60, help="calls of one cache (default: 60)")
    parser.add_argument("--jobs", type=int, help="processes (default: one on a GPU, else one a core)")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    size = options.steps_per_run
    if size < 1 or options.steps < 1:
        parser.error("--steps and --steps-per-run must be at least 1")
    runs = list(range(-(-options.steps // size))) if options.run is None else [options.run]
    steps = options.steps if options.run is None else size
    jobs = options.jobs or (1 if options.device == "cuda" else len(os.sched_getaffinity(0)))
    try:
        if options.device == "cuda" and not (build_info.with_cuda and torch.cuda.is_available()):
            raise Unavailable(f"there is no GPU to use ({build_info.reason})")
        if options.device != "emulated":
            with using(options.device):
                pass
    except Unavailable as reason:
        raise SystemExit(f"soak: {reason}") from None
    again = f"--device {options.device} --seed {seed}" + (f" --steps-per-run {size}" if size != 60 else "")
    print(f"soak: seed {seed}, {steps:,} steps on {options.device}, {size} to a cache, {jobs} processes", flush=True)
    if options.device == "cuda":
        print(f"soak: {torch.cuda.get_device_name()}", flush=True)

    started = said = time.monotonic()
    taken: Counter[str] = Counter()
    failed: dict[int, str] = {}
    emulator = ""
    if options.device == "emulated":
        try:
            emulator = str(built_emulator())
        except Unavailable as reason:
            raise SystemExit(f"soak: {reason}") from None
    # Processes of their own also on a GPU: one that crashes is reported like any other failure.
    pool = ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=begin_worker, initargs=(options.device, emulator)
    )
    waiting = iter(runs)
    running: dict[Future[tuple[Counter[str], str]], int] = {}
    with pool:
        while not failed:
            for run in waiting:
                left = steps - run * size if options.run is None else size
                running[pool.submit(take_run, f"{seed}/{run}", min(size, left))] = run
                if len(running) >= 2 * jobs:
                    break
            if not running:
                break
            try:
                for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                    counts, failure = future.result()
                    taken += counts
                    if failure:
                        failed[running[future]] = failure
                    del running[future]
            except BrokenProcessPool:
                text = "A process ended, in one of these runs or before its first (what it said is above).\n"
                failed = dict.fromkeys(sorted(running.values()), text)
            now = time.monotonic()
            if now - said > 10:
                said, done = now, sum(taken.values())
                print(f"soak: {done:,} of {steps:,} steps, {done / (now - started):,.0f} a second", flush=True)
        for future in running:
            future.cancel()
    done, seconds = sum(taken.values()), time.monotonic() - started
    print("soak: " + ", ".join(f"{count:,} {name}" for name, count in taken.most_common()))
    if failed:
        for failure in dict.fromkeys(failed.values()):
            print(failure, end="")
        for run in failed:
            print(f'soak: run {run} failed; again: make soak ARGS="{again} --run {run}"')
        print(f"soak: FAILED after {done:,} steps, seed {seed}, {seconds:.0f} s")
        return 1
    if done != steps:
        print(f"soak: FAILED: {done:,} of {steps:,} steps were taken, seed {seed}")
        return 1
    print(f"soak: PASSED: {done:,} steps on {options.device}, {len(runs):,} caches, 0 differences, seed {seed}, "
          f"{seconds:.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
