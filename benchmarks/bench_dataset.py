"""Times building and reading the dataset, compared with the necessary work on the same bytes.

The data are 5,000 synthetic images of about 200 kB in the published layout. The necessary work is timed in plain Python,
step by step: stream the archives, hash, decode if images are decoded, write the Parquet file once.
ECHO4O_BENCH_IMAGES changes the number; ECHO4O_BENCH_LARGE=1 also builds four times as many for the peak of memory.
"""

import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGES = int(os.environ.get("ECHO4O_BENCH_IMAGES", "5000"))
PER_ARCHIVE = 500
FOLDER = "Surrel-Fantasy-Image"

_BUILD = """
import json, resource, sys, time
from echo4o.dataset_scripts.build import BuildOptions, build
from echo4o.dataset_scripts.upstream import ReadOptions
src, out, verify, workers = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF)
start = time.perf_counter()
build(src, out, BuildOptions(), ReadOptions(verify=verify, workers=int(workers)))
seconds = time.perf_counter() - start
after = resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # ru_maxrss would begin at the parent's
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mb": int(status["VmHWM"].split()[0]) / 1024}))
"""


def base_images(count: int = 16, size: int = 1024) -> list[bytes]:
    """JPEGs of about 200 kB: smooth colours with some grain, as photographs have."""
    images = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        smooth = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 9, (size, size, 1))
        pixels = np.clip(np.asarray(smooth, np.float32) + grain, 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=80)
        images.append(stream.getvalue())
    return images


def vary(image: bytes, number: int) -> bytes:
    """The same image with different bytes: a comment after the start mark."""
    return image[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + image[2:]


def write_release(root: Path, count: int, bases: list[bytes]) -> None:
    """The published layout with `count` images."""
    images = root / FOLDER / "images"
    images.mkdir(parents=True)
    with open(root / FOLDER / "conflict.jsonl", "w") as rows:
        for start in range(0, count, PER_ARCHIVE):
            with tarfile.open(images / f"{start}-{start + PER_ARCHIVE}.tar.gz", "w:gz", compresslevel=1) as archive:
                for number in range(start, min(start + PER_ARCHIVE, count)):
                    info = tarfile.TarInfo(f"images/{number:05d}.jpg")
                    data = vary(bases[number % len(bases)], number)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                    path = f"/Echo-4o-Image/{FOLDER}/images/{number:05d}.jpg"
                    text = f"number {number}: a lighthouse made of glass beside {number % 97} paper boats at dusk"
                    rows.write(json.dumps({"task_type": "t2i", "instruction": text, "output_image": path}) + "\n")


def time_necessary_work(root: Path, out: Path) -> dict[str, float]:
    """Seconds of each step that every build must do, in plain Python."""
    times = dict.fromkeys(("stream", "sha256", "decode", "write"), 0.0)
    writer = None
    for archive in sorted((root / FOLDER / "images").iterdir()):
        start = time.perf_counter()
        with tarfile.open(archive, "r|gz") as tar:
            images = [tar.extractfile(member).read() for member in tar]
        times["stream"] += time.perf_counter() - start
        start = time.perf_counter()
        for data in images:
            hashlib.sha256(data).digest()
        times["sha256"] += time.perf_counter() - start
        start = time.perf_counter()
        for data in images:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        times["decode"] += time.perf_counter() - start
        start = time.perf_counter()
        for group in range(0, len(images), 160):
            table = pa.table({"image": images[group : group + 160]})
            writer = writer or pq.ParquetWriter(out, table.schema, compression="none", use_dictionary=False)
            writer.write_table(table)
        times["write"] += time.perf_counter() - start
    start = time.perf_counter()
    writer.close()
    with open(out, "rb") as stream:  # a build also waits until the file is on the disk
        os.fsync(stream.fileno())
    times["write"] += time.perf_counter() - start
    out.unlink()
    return times


def build(root: Path, out: Path, verify: str, workers: int) -> dict:
    """Build in a new process; returns seconds, processor seconds and the peak of memory."""
    command = [sys.executable, "-c", _BUILD, str(root), str(out), verify, str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main(options) -> None:
    """Print rates, ratios and peaks."""
    with tempfile.TemporaryDirectory(prefix="echo4o-bench-") as folder:
        work = Path(folder)
        bases = base_images()
        write_release(work / "release", IMAGES, bases)
        size = sum(f.stat().st_size for f in (work / "release").rglob("*.gz")) / IMAGES
        print(f"{IMAGES} images, {size / 1000:.0f} kB each in the archives")
        built = measure_builds(work, max(1, min(options.repeats, 3)))
        measure_memory(work, bases, built)
        measure_reading(work / "built", max(1, min(options.repeats, 3)))


def measure_builds(work: Path, repeats: int) -> dict:
    """Time builds and the necessary work in turns."""
    import shutil

    ways = [(verify, workers) for verify in ("header", "full") for workers in (1, 2)]
    floors, runs = [], {way: [] for way in ways}
    for _ in range(repeats):
        floors.append(time_necessary_work(work / "release", work / "plain.parquet"))
        for way in ways:
            shutil.rmtree(work / "built", ignore_errors=True)
            runs[way].append(build(work / "release", work / "built", *way))
    floor = {name: statistics.median(f[name] for f in floors) for name in floors[0]}
    print("necessary work: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in floor.items()))
    for (verify, workers), results in runs.items():
        seconds = statistics.median(r["seconds"] for r in results)
        needed = [sum(f.values()) - (0 if verify == "full" else f["decode"]) for f in floors]
        ratio = statistics.median(n / r["seconds"] for n, r in zip(needed, results))
        cpu, peak = statistics.median(r["cpu"] for r in results), max(r["peak_mb"] for r in results)
        print(
            f"  build --verify {verify:<6} --workers {workers}: {IMAGES / seconds:6.0f} images/s, "
            f"{ratio:.2f} of the rate of the necessary work, {cpu / seconds:.1f} cores, peak {peak:.0f} MB"
        )
    return {"peak": max(r["peak_mb"] for r in runs["full", 1])}


def measure_memory(work: Path, bases: list[bytes], built: dict) -> None:
    """Print the peaks of memory for several numbers of images; they must not grow."""
    counts = [IMAGES // 4] + ([IMAGES * 4] if os.environ.get("ECHO4O_BENCH_LARGE") else [])
    peaks = {IMAGES: built["peak"]}
    for count in counts:
        write_release(work / f"release-{count}", count, bases)
        peaks[count] = build(work / f"release-{count}", work / f"built-{count}", "full", 1)["peak_mb"]
        for name in (f"release-{count}", f"built-{count}"):
            subprocess.run(["rm", "-r", str(work / name)], check=True)
    print("peak memory: " + ", ".join(f"{peaks[n]:.0f} MB for {n} images" for n in sorted(peaks)))


def measure_reading(built: Path, repeats: int) -> None:
    """Time iteration with decoding, compared with Pillow on the same bytes."""
    import datasets

    from echo4o.dataset_scripts.loading import training_rows

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="echo4o-bench-") as cache:
        table = datasets.load_dataset(str(built), split="train", cache_dir=cache)
        raw = table.cast_column("image", datasets.Image(decode=False))
        stored = [raw[i]["image"]["bytes"] for i in range(min(1000, len(raw)))]

        def pillow() -> int:
            for data in stored:
                Image.open(io.BytesIO(data)).load()
            return len(stored)

        def take(rows) -> int:
            return sum(1 for _ in zip(range(len(stored)), rows))

        ways = {
            "Pillow on the same bytes": pillow,
            "training_rows, map-style, 1 worker": lambda: take(training_rows(table, workers=1)),
            "training_rows, map-style, 2 workers": lambda: take(training_rows(table, workers=2)),
            "training_rows, streaming, 1 worker": lambda: take(training_rows(built, streaming=True, workers=1)),
            "training_rows, streaming, 2 workers": lambda: take(training_rows(built, streaming=True, workers=2)),
            "datasets: for row in dataset": lambda: take(table),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, run in ways.items():
                start = time.perf_counter()
                count = run()
                rates[name].append(count / (time.perf_counter() - start))
        base = rates["Pillow on the same bytes"]
        for name, values in rates.items():
            ratio = statistics.median(v / b for v, b in zip(values, base))
            print(f"  {name:<38} {statistics.median(values):6.0f} images/s, {ratio:.2f} of Pillow")
