"""Run measurements: ``python -m tests.bench [name ...] [--quick] [--list]``; all of them if none is named."""

from __future__ import annotations

import argparse
import importlib

from rich.console import Console

BENCHMARKS = {
    "pass_scaling": "time per node of each cleanup pass and of the manager, from 1,000 to 100,000 nodes",
    "export_speed": "time to export and latency of the result, against torch.onnx.export",
    "control_flow_table": "Python branches and loops on values, against torch.export and torch.onnx.export",
    "blame_speed": "every intermediate value of a model against eager: time and memory, beside torch.onnx",
    "branch_scaling": "traces, nodes and time of nets of 8 to 64 branches",
    "distill_digits": "a small student of a larger teacher on 200 real digits: accuracy by loss",
    "distill_step": "a training step of student, teacher and losses in one graph, against hooks",
    "early_exit": "latency and accuracy of a CNN that leaves early, in ORT and in eager",
    "low_bit_digits": "weights of 1 to 4 bits on real digits: tables, signs, ternary, before and after training",
    "distill_mnist": "a student with masks and quantizers beside its teacher, then shrunk and in integers, in ORT",
    "float_results": "convolutions of integers whose result stays a float, beside rounded ones and floats",
    "float_layers": "layers among floats in integers and in floats: from how many products on integers are faster",
    "half_overflow": "small nets that float16 breaks: who misses it, and what ORT on a CPU hides",
    "half_precision": "float16 and bfloat16 beside onnxconverter-common: error in emulation, size, casts, islands",
    "mixed_precision_digits": "loss curves on real digits in float32 and half: graphs, autocast, adaptive precision",
    "ort_forms": "operators written as several where ORT's one kernel is slower: both in turn",
    "prune_tasks": "trained nets pruned to half and a quarter, fine-tuned, timed in ORT, beside Torch-Pruning",
    "prune_torchvision": "every torchvision classifier pruned to half of its channels, beside Torch-Pruning",
    "prune_latency": "pruned to budgets of time: what is predicted, and what the files take in ORT",
    "prune_certificate": "random masks of many nets, shrunk and compared with the masked graph",
    "prune_scaling": "time to find what can be pruned, to mask and to shrink, for 100 to 10,000 nodes",
    "qat_digits": "few bits on real digits: quantized after training, and trained with quantizers",
    "saturation_table": "what safety from 16-bit saturation costs real weights, against 7 bits for all",
    "saturation_in_ort": "trained nets in ORT on this CPU, with sums of 16 bits that can overflow and without",
    "select_cost": "a small branch in ORT against computing both sides and selecting",
    "quantization": "int8 beside the peers: score, error, latency, integer kernels, time and memory",
    "quantization_budget": "int8 where the score may fall by 0.003: layers that stay float, score, speed",
    "viewer": "pages of graphs of 1,000 to 10,000 nodes in Chromium: time until ready, time of a frame",
    "weight_only_minilm": "a sentence net with weights of 8 to 2 bits: size, error, ranking, time",
    "zoo_table": "every model of the zoo from capture to proof: time, nodes, error",
}

WITH_MODELS = (
    "half_precision", "quantization", "prune_certificate", "prune_latency", "prune_tasks", "prune_torchvision",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the measurements that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure fxopt.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of {', '.join(BENCHMARKS)}; all if not given")
    parser.add_argument("--quick", action="store_true", help="leave out the sizes that take minutes")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    only = parser.add_argument_group("of one benchmark")
    only.add_argument("--models", type=_names, default=(), metavar="a,b", help="these models; else those of real data")
    only.add_argument("--tools", type=_names, default=(), metavar="x,y", help="these tools; all if not given")
    only.add_argument("--random", action="store_true", help="architectures with random weights: latency and coverage")
    only.add_argument("--threads", type=int, default=0, help="of an ORT session for latency; ORT's own choice if 0")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there is {', '.join(BENCHMARKS)}")
    options = {name: getattr(chosen, name) for name in ("models", "tools", "random", "threads")}
    taken = {name: tuple(options) if name == "quantization" else ("models",) for name in WITH_MODELS}
    given = {name for name, value in options.items() if value}
    if given and (len(chosen.names) != 1 or not given <= set(taken.get(chosen.names[0], ()))):
        parser.error("--models goes with one name of " + ", ".join(WITH_MODELS) + "; the others with quantization")
    console = Console()
    for name in chosen.names or BENCHMARKS:
        console.print(f"{name}: {BENCHMARKS[name]}", highlight=False)
        if not chosen.list:
            importlib.import_module(f"tests.bench.{name}").main(
                console, quick=chosen.quick, **{option: options[option] for option in taken.get(name, ())}
            )


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
