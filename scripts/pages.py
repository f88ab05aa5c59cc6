"""Tables in documents, made from committed results: ``python scripts/pages.py [--check] PAGE.md ...``.

A table stands between ``<!-- table NAME: RESULTS.json [RESULTS.json ...] -->`` and ``<!-- end of table -->``; paths are relative to the
page, ``NAME`` is one of :data:`TABLES` or, for a sentence, of :data:`TEXTS`; the lists of several files are joined. Where the results do
not exist yet, it says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from collogue.tools.bench import report, tables
from collogue.tools.reliability import tables as reliability

Data = dict[str, Any]
_BLOCK = re.compile(
    r"(?P<head><!-- table (?P<name>[\w-]+): (?P<source>[^\n]*?) -->\n)(?P<table>.*?)(?P<end><!-- end of table -->\n)", re.DOTALL
)
#: In place of a table whose results are not there.
NOT_YET = "Not measured yet.\n"
_SCORES = ("perplexity", "difference", "standard error", "logits, rms", "logits, largest", "same choice")


def _scores(data: Data, row: Data) -> list[str]:
    difference = row["perplexity"] - data["expected_perplexity"]
    cells = [f"{row['perplexity']:.3f}", f"{difference:+.3f}", f"{row['standard_error']:.3f}", f"{row['logit_rms']:.3f}"]
    return [*cells, f"{row['logit_max']:.2f}", f"{100 * row['agreement']:.1f} %"]


def _orders(data: Data) -> Iterator[Sequence[str]]:
    yield ["order of accumulation", "ranks", "format", *_SCORES]
    for row in data["orders"]:
        yield [row["order"], str(row["world_size"]), row["format"], *_scores(data, row)]


def _formats(data: Data) -> Iterator[Sequence[str]]:
    yield ["format", *_SCORES, "SQNR, mean", "SQNR, worst"]
    for row in data["formats"]:
        each = [layer["sqnr_db"] for layer in data["layers"] if layer["format"] == row["format"]]
        errors = [f"{sum(each) / len(each):.1f} dB", f"{min(each):.1f} dB"] if each else ["-", "-"]
        yield [row["format"], *_scores(data, row), *errors]


def _noise(data: Data) -> Iterator[Sequence[str]]:
    """Of a model of random weights, whose perplexity means nothing."""
    yield ["format", "SQNR, mean", "SQNR, worst", "logits, rms", "same choice"]
    for row in data["formats"]:
        each = [layer["sqnr_db"] for layer in data["layers"] if layer["format"] == row["format"]]
        errors = [f"{sum(each) / len(each):.1f} dB", f"{min(each):.1f} dB"] if each else ["-", "-"]
        yield [row["format"], *errors, f"{row['logit_rms']:.3f}", f"{100 * row['agreement']:.1f} %"]


def _static(data: Data) -> Iterator[Sequence[str]]:
    yield ["format", "scale, x calibrated", *_SCORES, "SQNR, mean", "above range"]
    for row in data["static_scales"]:
        yield [row["format"], f"{row['factor']:g}", *_scores(data, row), f"{row['sqnr_mean_db']:.1f} dB", f"{100 * row['clipped']:.3f} %"]


def _layers(data: Data) -> Iterator[Sequence[str]]:
    yield ["`quant=`", *_SCORES]
    for row in data["quantized_layers"]:
        scores = [row["error"], *("" for _ in _SCORES[1:])] if "error" in row else _scores(data, row)
        yield [row["quant"], *scores]


def _resources(data: Data) -> Iterator[Sequence[str]]:
    yield ["architecture", "kernels", "registers, least", "median", "most", "with local memory"]
    for name in dict.fromkeys(row["choice"]["architecture"] for row in data["kernels"]):
        mine = [row for row in data["kernels"] if row["choice"]["architecture"] == name]
        used = sorted(row["registers"] for row in mine)
        local = sum(bool(row["stack_bytes"] or row["spilled_bytes"]) for row in mine)
        yield [name, str(len(mine)), str(used[0]), str(used[len(used) // 2]), str(used[-1]), str(local)]


def _compiled(data: Data) -> Iterator[Sequence[str]]:
    formats, architectures = (list(dict.fromkeys(row[key] for row in data["compiled"])) for key in ("format", "architecture"))
    columns = [(a, f) for a in architectures for f in formats]
    yield ["switch", *(f"{a}, {f}" for a, f in columns), "bits"]
    cells = {(row["switch"], row["architecture"], row["format"]): row for row in data["compiled"]}
    for name in dict.fromkeys(row["switch"] for row in data["compiled"]):
        found = (cells.get((name, *column)) for column in columns)
        said = {row["by_emulator"] for row in data["bits"] if row["switch"] == name}
        word = "changed" if True in said else "same" if False in said else "-"
        yield [name, *("-" if row is None else f"{row['registers']} / {row['code_bytes']}" for row in found), word]


def _times(data: Data) -> Iterator[Sequence[str]]:
    columns = list(dict.fromkeys((row["format"], row["tokens"]) for row in data["times"]))
    yield ["switch", *(f"{format}, T = {tokens}" for format, tokens in columns), "bits"]
    cells = {(row["switch"], row["format"], row["tokens"]): row for row in data["times"]}
    for name in dict.fromkeys(row["switch"] for row in data["times"]):
        found = [cells.get((name, *column)) for column in columns]
        changed = any(row["bits_changed"] for row in found if row is not None)
        yield [name, *("-" if row is None or row["us"] is None else f"{row['us']:.2f}" for row in found), "changed" if changed else "same"]


def _nvrtc(data: Data) -> Iterator[Sequence[str]]:
    yield ["architecture", *(f"NVRTC {version}" for version in data)]
    for rows in zip(*(entry["architectures"] for entry in data.values()), strict=True):
        yield [rows[0]["architecture"], *map(_compiled_as, rows)]


def _compiled_as(row: Data) -> str:
    if row["error"]:
        return "does not compile"
    hardware = [name for name in ("E4M3", "E2M1") if row[name.lower()]]
    fallback = "" if row["compiled"] == row["architecture"] else f"{row['compiled']}: "
    return fallback + (" and ".join(hardware) + " in hardware" if hardware else "by integers")


def _gpus(data: Data) -> Iterator[Sequence[str]]:
    yield ["GPU", "architecture", "link", "GB/s each way", "latency of a hop", "memory, GB/s", "source", "to other hosts, Gb/s each way"]
    for gpu in data["gpus"]:
        hop = "as measured" if gpu["name"] == "H200" else f"{gpu['latency']:g} x H200, assumed"
        hosts = f"{gpu['host_gbps']:g}, {gpu['host_link']}"
        rates = f"{gpu['link_rate']:g}", hop, f"{gpu['memory_rate']:g}"
        yield [gpu["name"], gpu["architecture"], gpu["link"], *rates, gpu["source"], hosts]


def _errors(data: Data) -> Iterator[Sequence[str]]:
    yield ["half", "rows", "largest error", "mean error", "rows beyond 10 %"]
    for half in ("fit", "test"):
        errors = [abs(row["error"]) for row in data[half]]
        far = sum(error > 0.1 for error in errors)
        yield [half, str(len(errors)), f"{100 * max(errors):.0f} %", f"{100 * sum(errors) / len(errors):.1f} %", str(far)]


def _examples(data: Data) -> Iterator[Sequence[str]]:
    tokens = list(dict.fromkeys(row["tokens"] for row in data["examples"]))
    yield ["GPU", *(f"T = {count}" for count in tokens)]
    for gpu in data["gpus"]:
        mine = {row["tokens"]: row["predicted_us"] for row in data["examples"] if row["gpu"] == gpu["name"]}
        yield [gpu["name"], *(f"{mine[count]:.1f}" for count in tokens)]


def _flashinfer(data: Data) -> Iterator[Sequence[str]]:
    """FlashInfer's fastest way beside Collogue, of the calls that both do."""
    yield ["H", "T", "norm", "FlashInfer", "ratio", "FP8 static", "FlashInfer", "ratio", "one-word exchange"]
    calls: dict[tuple[int, int], dict[str, list[float]]] = {}
    for row in data["cases"]:
        call, what = calls.setdefault((row["hidden_size"], row["tokens"]), {}), row["what"]
        if row["us"] is None:
            continue
        if what == "one-word exchange":
            call.setdefault(what, []).append(row["us"])
        elif what == "collogue" or (what.startswith("flashinfer") and row.get("norm")):
            call.setdefault(f"{what.partition(' ')[0]} {row['format']}", []).append(row["us"])
    for (hidden, tokens), call in calls.items():
        cells = [str(hidden), str(tokens)]
        for label in ("none", "fp8_static"):
            ours, theirs = min(call[f"collogue {label}"]), min(call[f"flashinfer {label}"])
            cells += [f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}"]
        yield [*cells, f"{call['one-word exchange'][0]:.2f}"]


def _flashinfer_headline(data: Data) -> str:
    rows = list(_flashinfer(data))[1:]
    ratios, tokens = [float(row[column]) for row in rows for column in (4, 7)], [int(row[1]) for row in rows]
    return (
        f"FlashInfer 0.7.2's fused kernels take **{min(ratios):.2f} to {max(ratios):.2f} times** Collogue's time in one run on two H200: "
        f"norm, FP8 static, {min(tokens)} to {max(tokens)} tokens ([table](docs/evidence.md)).\n"
    )


def _experts(data: Data) -> Iterator[Sequence[str]]:
    yield [
        "tokens",
        "in the call's kernel",
        "by a kernel in front",
        "torch.compile in front",
        "as planned / torch.compile",
        "the plain call",
    ]
    for tokens, us in data["us"].items():
        ours, theirs = (us["inside"], us["in_front"]), us["unfused"]
        yield [tokens, *(f"{value:.2f}" for value in (*ours, theirs, us["ratio"], us["plain"]))]


def _experts_alone(data: Data) -> Iterator[Sequence[str]]:
    ways = list(next(iter(data["us"].values())))
    yield "tokens", "H", "slots", *ways
    for case, us in data["us"].items():
        yield *case.split(), *(f"{us[way]:.2f}" for way in ways)


def _branch(data: Data) -> Iterator[Sequence[str]]:
    yield ["call", "one call", "two calls and an addition", "ratio"]
    for call, us in data["us"].items():
        yield [call, *(f"{us[name]:.2f}" for name in ("fused", "two_calls", "ratio"))]


def _generate(data: Data) -> Iterator[Sequence[str]]:
    yield [
        "model",
        "batch",
        "scheme",
        "Collogue, tokens/s",
        "over bfloat16",
        "over torch.compile",
        "ms to first token",
        "step, µs",
        "products, µs",
        "bound, µs",
    ]
    for row in data["rows"]:
        if row["way"] == "collogue" and row["us_per_step"] is not None:
            cells = [row["model"], str(row["batch"]), row["scheme"], f"{row['tokens_per_second']:.0f}"]
            cells += [f"{row[name]:.2f}" for name in ("over_bfloat16", "over_compiled")]
            yield [*cells, f"{row['ms_to_first_token']:.1f}", *(f"{row[name]:.0f}" for name in ("us_per_step", "gemms_us", "bound_us"))]


def _sizes(data: Data) -> Iterator[Sequence[str]]:
    yield ["model", "scheme", "quantized layers, GB", "of bfloat16", "whole model, GB", "of bfloat16"]
    for row in data["sizes"]:
        layers, whole = row["quantized_bytes"], row["model_bytes"]
        ratios = [f"{row[name]:.4f}" for name in ("quantized_ratio", "model_ratio")]
        yield [row["model"], row["scheme"], f"{layers / 1e9:.3f}", ratios[0], f"{whole / 1e9:.3f}", ratios[1]]


def _ahead(data: Data) -> Iterator[Sequence[str]]:
    yield ["tokens, format", *next(iter(data["us"].values()))]
    for call, us in data["us"].items():
        if not call.endswith("fp8_static"):  # as without a format
            yield [call, *(f"{value:.2f}" for value in us.values())]


def _few_sms(data: Data) -> Iterator[Sequence[str]]:
    yield [
        "operation, format, tokens",
        *(way.replace("all", "all SMs").replace("plan", "as planned") for way in data["us"]["all_reduce none 2048"]),
    ]
    for call, us in data["us"].items():
        yield [call, *(f"{value:.0f}" for value in us.values())]


def _products(data: Data) -> Iterator[Sequence[str]]:
    ways = {"bfloat16": "bfloat16", "tensor_wise": "one scale", "row_wise": "per row, PyTorch's", "scaled": "per row, scaled by a kernel"}
    ways |= {"block_row": "blocks, scales by rows", "block_column": "blocks, scales by columns"}
    yield ["rows", *ways.values()]
    for rows in next(iter(data["us"].values())):
        yield [rows, *(f"{sum(of_shape[rows][way] for of_shape in data['us'].values()):.0f}" for way in ways)]


def _host_path(data: Data) -> Iterator[Sequence[str]]:
    yield ["tokens", "host path", "all_reduce, compiled epilogue", "ratio"]
    for tokens, us in data["calls, us"].items():
        ours, theirs = us["host path"], us["all_reduce and compiled epilogue"]
        yield [tokens, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}"]


def _host_kernels(data: Data) -> Iterator[Sequence[str]]:
    yield ["terms", "kernel", "copy of as many bytes", "of the copy's rate"]
    for row in data["kernels"]:
        yield [str(row["terms"]), f"{row['kernel us']:.1f}", f"{row['copy us']:.1f}", f"{row['of copy']:.2f}"]


def _overlap(data: Data) -> Iterator[Sequence[str]]:
    """Microseconds of a layer in each way."""
    ways = list(dict.fromkeys(way for row in data["rows"] for way in row["ways"]))
    yield "model", "tokens", *ways
    for row in data["rows"]:
        yield row["model"], str(row["tokens"]), *(f"{row['ways'][way]['us_per_layer']:.0f}" for way in ways)


def _serving(data: Data) -> Iterator[Sequence[str]]:
    """A server's runs with and without Collogue, in the order in which they ran."""
    yield "run", "COLLOGUE_VLLM", "output tokens/s", "median ms per output token", "median ms to the first token", "requests", "perplexity"
    for i, run in enumerate(data["runs"], 1):
        bench = run["bench"]
        times = f"{bench['median_tpot_ms']:.2f}", f"{bench['median_ttft_ms']:.0f}"
        yield str(i), run["COLLOGUE_VLLM"], f"{bench['output_throughput']:.0f}", *times, str(bench["completed"]), f"{run['perplexity']:.3f}"


def _serving_headline(data: Data) -> str:
    """One sentence: throughput and time per token over the mean of stock's runs."""

    def mean(switch: str, name: str) -> float:
        found = [run["bench"][name] for run in data["runs"] if (run["COLLOGUE_VLLM"] == "0") == (switch == "0")]
        return float(sum(found) / len(found))

    more = mean("1", "output_throughput") / mean("0", "output_throughput") - 1
    less = 1 - mean("1", "median_tpot_ms") / mean("0", "median_tpot_ms")
    return (
        f"vLLM {data['vllm']} on two H200, an 8B Llama, {data['load']['concurrency']} requests at a time: "
        f"**{more:.1%}** more output tokens a second with Collogue, {less:.1%} less time per token ([runs](docs/engines.md#vllm)).\n"
    )


TABLES: dict[str, Callable[[Data], Iterator[Sequence[str]]]] = {
    "accuracy-orders": _orders,
    "accuracy-formats": _formats,
    "accuracy-static": _static,
    "accuracy-layers": _layers,
    "accuracy-noise": _noise,
    "resources": _resources,
    "ablation-compiled": _compiled,
    "ablation-times": _times,
    "serving": _serving,
    "overlap": _overlap,
    "reliability-faults": reliability.faults,
    "reliability-soak": reliability.soak,
    "reliability-mutants": reliability.mutants,
    "reliability-cost": reliability.cost,
    "bench-model": tables.model,
    "bench-speedups": tables.speedups,
    "bench-serving": tables.serving,
    "bench-host": tables.host,
    "bench-eager": tables.eager,
    "bench-epilogues": tables.epilogues,
    "one-shot-ahead": _ahead,
    "few-sms": _few_sms,
    "products": _products,
    "experts": _experts,
    "experts-alone": _experts_alone,
    "branch-norm": _branch,
    "generate": _generate,
    "generate-sizes": _sizes,
    "flashinfer": _flashinfer,
    "host-path": _host_path,
    "host-kernels": _host_kernels,
    "bench-virtual": tables.virtual,
    "nvrtc": _nvrtc,
    "gpus": _gpus,
    "prediction-errors": _errors,
    "prediction-examples": _examples,
}


#: What is not a table but a text.
TEXTS: dict[str, Callable[[Data], str]] = {
    "headline": tables.headline,
    "latency": report.latency_table,
    "flashinfer-headline": _flashinfer_headline,
    "serving-headline": _serving_headline,
}


def _joined(sources: Sequence[Path]) -> Data:
    """What the files hold; lists of the same name one behind the other."""
    data: Data = {}
    for source in sources:
        for name, value in json.loads(source.read_text(encoding="utf-8")).items():
            data[name] = data[name] + value if isinstance(value, list) and name in data else value
    return data


def filled(page: str, folder: Path) -> str:
    """``page``, which lies in ``folder``, with every table made anew. Raises :class:`ValueError` for a table that there is not."""

    def made(match: re.Match[str]) -> str:
        if match["name"] not in {**TABLES, **TEXTS}:
            raise ValueError(f"there is no table {match['name']!r}; there are {', '.join({**TABLES, **TEXTS})}")
        sources = [folder / name for name in match["source"].split()]
        if not all(source.exists() for source in sources):
            return match["head"] + NOT_YET + match["end"]
        data = _joined(sources)
        if match["name"] in TEXTS:
            return match["head"] + TEXTS[match["name"]](data) + match["end"]
        return match["head"] + "\n".join(tables.lines(TABLES[match["name"]](data))) + "\n" + match["end"]

    return _BLOCK.sub(made, page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the tables, or with ``--check`` say whether they are up to date (exit code 1 if not)."""
    parser = argparse.ArgumentParser(prog="python scripts/pages.py", description="Fill the tables of documents from their results.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is not that of its results")
    parser.add_argument("pages", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    stale = False
    for file in given.pages:
        before = file.read_text(encoding="utf-8")
        after = filled(before, file.parent)
        if given.check and after != before:
            print(f"{file}: a table is not that of its results", file=sys.stderr)
            stale = True
        elif not given.check:
            file.write_text(after, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
