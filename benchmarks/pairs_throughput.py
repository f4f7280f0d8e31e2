"""Speed and memory of `build_pairs` on a synthetic million prompts, streamed, whose answers are columns.

    python benchmarks/pairs_throughput.py --prompts 1000000

The prompts are a Parquet file that is read as a stream. A fresh process builds the pairs with `teacher_wins`; its peak
memory is the kernel's VmHWM, imports and loading of the result included. Time is that of `build_pairs` alone, with card and
page. Results go to benchmarks/results/pairs_throughput.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


TARGET_RATE, TARGET_MEMORY = 20_000, 2**30


def write_prompts(path: Path, count: int) -> None:
    """Arithmetic questions; a third of the student's answers are the teacher's."""
    writer = None
    for start in range(0, count, 10_000):
        numbers = range(start, min(start + 10_000, count))
        teacher = [f"The sum of {i} and {7 * i} is {8 * i}, which one gets by adding the two." for i in numbers]
        table = pa.table(
            {
                "prompt": [f"What is {i} plus {7 * i}? Answer in one whole sentence." for i in numbers],
                "teacher_answer": teacher,
                "student_answer": [
                    text if i % 3 == 0 else f"I believe that it is {8 * i + i % 3}."
                    for i, text in zip(numbers, teacher, strict=True)
                ],
                "level": [i % 5 for i in numbers],
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def build(path: str, output_dir: str) -> None:
    """Runs in the fresh process, and prints what it measured as JSON."""
    from datasets import load_dataset

    from trl_kd.pairs import build_pairs
    from trl_kd.preferences.simple import TeacherWins
    from trl_kd.sampling.column import ColumnSampler

    prompts = load_dataset("parquet", data_files=path, split="train", streaming=True)
    start, cpu = time.perf_counter(), time.process_time()
    pairs = build_pairs(
        prompts,
        teacher=ColumnSampler("teacher_answer"),
        student=ColumnSampler("student_answer"),
        preference=TeacherWins(),
        output_dir=output_dir,
        show_progress=False,
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    print(json.dumps({"pairs": len(pairs), "seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "pairs_throughput.json")
    parser.add_argument("--child", nargs=2, metavar=("PROMPTS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return build(*options.child)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.parquet"
        write_prompts(path, options.prompts)
        command = [sys.executable, __file__, "--child", str(path), str(Path(folder) / "pairs")]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(folder) / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        measured = json.loads(done.stdout.splitlines()[-1])
        size = sum(file.stat().st_size for file in (Path(folder) / "pairs").rglob("*") if file.is_file())
    result = {
        "prompts": options.prompts,
        "pairs": measured["pairs"],
        "seconds": round(measured["seconds"], 2),
        "cpu_seconds": round(measured["cpu_seconds"], 2),
        "pairs_per_second": round(measured["pairs"] / measured["seconds"]),
        "pairs_per_cpu_second": round(measured["pairs"] / measured["cpu_seconds"]),
        "peak_memory_mib": round(measured["peak"] / 2**20, 1),
        "folder_mib": round(size / 2**20, 1),
        "targets": {"pairs_per_second": TARGET_RATE, "peak_memory_mib": TARGET_MEMORY // 2**20},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("trl-kd", "datasets", "pyarrow")},
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "load_before": round(os.getloadavg()[0], 1),
        },
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
