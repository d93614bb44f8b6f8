"""`gpt4v-fast demo`: train, compare with stock PyTorch, save, examine, report, and ask in a new process."""

from __future__ import annotations

import copy
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpt4v_fast as gf
from gpt4v_fast._native import _C

from ..models.checkpoint import atomic_folder
from ..models.gpt4v import GPT4VForConditionalGeneration, GPT4VProcessor
from . import data
from .report import write_report
from .scoring import evaluate
from .train import Batch, Batches, Plan, Trainer, make_model

TARGETS = {"digit": 0.97, "parity": 0.97, "sum": 0.85}
COMPARED_STEPS, WARM_STEPS = 40, 5
QUESTION = "Which digit is this?"
STOCK = {"attn_implementation": "sdpa", "loss_implementation": "torch"}


def run_demo(args: Any = None) -> int:
    """The whole demo.

    Args:
        args: an object with any of the attributes out (folder, default "runs/demo"), steps, seed, limit (examine
            only so many held-out digits) and json (print the metrics as JSON, and nothing else, on stdout).
    Returns:
        0, or 1 when a full run misses one of `TARGETS`.
    """
    out = writable(Path(getattr(args, "out", None) or "runs/demo"))
    quiet = bool(getattr(args, "json", False))
    chosen = {name: getattr(args, name, None) for name in ("steps", "seed")}
    plan = Plan(**{name: value for name, value in chosen.items() if value is not None})

    def say(text: str) -> None:
        print(text, file=sys.stderr if quiet else sys.stdout, flush=True)

    model, processor = make_model(plan)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"gpt4v_fast demo: {parameters:,} parameters, {plan.steps} steps of {plan.batch} questions")
    batches = Batches(plan, processor, data.load_digits()[0])
    losses, step_ms, train_s = train_both(plan, model, batches)
    difference = float(np.abs(np.subtract(losses["ours"][: len(losses["stock"])], losses["stock"])).max())
    say(
        f"step: {step_ms['ours']:.1f} ms ours, {step_ms['stock']:.1f} ms stock PyTorch (sdpa, Conv2d, "
        "F.cross_entropy); "
        f"largest difference of the losses over {len(losses['stock'])} steps: {difference:.3g}"
    )
    save(model, processor, out / "checkpoint")
    scores = evaluate(str(out / "checkpoint"), limit=getattr(args, "limit", None), progress=True)
    metrics = {
        "accuracy": scores["accuracy"],
        "targets": TARGETS,
        "step_ms": step_ms,
        "largest_loss_difference": difference,
        "compared_steps": len(losses["stock"]),
        "final_loss": round(float(np.mean(losses["ours"][-20:])), 5),
        "tasks": scores["tasks"],
        "questions": scores["questions"],
        "parameters": parameters,
        "steps": plan.steps,
        "batch": plan.batch,
        "seed": plan.seed,
        "train_s": round(train_s, 1),
        "machine": machine(),
        "kernels": kernels(model),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(out / "report.html", metrics, scores, losses)
    (out / "checkpoint" / "README.md").write_text(model_card(metrics), encoding="utf-8")
    for task, share in scores["accuracy"].items():
        target = f" (target {100 * TARGETS[task]:.0f}%)" if task in TARGETS else ""
        say(f"{task:>8}: {100 * share:.2f}% right{target}")
    say(ask_in_a_new_process(out))
    say(f"wrote {out / 'metrics.json'}, {out / 'report.html'} and {out / 'checkpoint'}")
    if quiet:
        print(json.dumps(metrics, ensure_ascii=False))
    missed = [task for task, target in TARGETS.items() if scores["accuracy"][task] < target]
    if missed:
        say(f"missed the target of: {', '.join(missed)}")
    return int(bool(missed) and plan.steps >= Plan.steps)


def writable(out: Path) -> Path:
    """`out`, made if it is missing; raises where the results could not be written there, before anything is trained."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"--out must be a folder that can be written, got {out}: {error.strerror or error}") from error
    for name, wanted in (("checkpoint", Path.is_dir), ("metrics.json", Path.is_file), ("report.html", Path.is_file)):
        if (out / name).exists() and not wanted(out / name):
            raise OSError(f"--out must leave room for {name}, got {out} with another kind of thing of that name")
    return out


def train_both(
    plan: Plan, model: GPT4VForConditionalGeneration, batches: Batches
) -> tuple[dict[str, list[float]], dict[str, float], float]:
    """Trains `model`; in the first steps a stock twin from the same seed takes the same batches, in turn.

    Returns:
        losses {"ours", "stock"}, median milliseconds per step of the stretch they share, and the seconds of
        all.
    """
    from tqdm import tqdm

    twin, _ = make_model(plan, **STOCK)
    twin.config.vision_config.patch_embed_implementation = "conv"
    trainers = {"ours": Trainer(plan, model), "stock": Trainer(plan, twin)}
    losses: dict[str, list[float]] = {"ours": [], "stock": []}
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    compared = min(COMPARED_STEPS, plan.steps)

    def step(name: str, batch: Batch) -> None:
        begin = time.perf_counter()
        losses[name].append(trainers[name].step(batch))
        times[name].append(1000 * (time.perf_counter() - begin))

    begin = time.perf_counter()
    bar = tqdm(zip(range(plan.steps), batches, strict=False), total=plan.steps, desc="train", unit="step")
    for number, batch in bar:
        order = ("ours", "stock") if number % 2 else ("stock", "ours")  # neither always finds the caches warm
        for name in order if number < compared else ("ours",):
            step(name, batch)
        if number % 10 == 0:
            bar.set_postfix(loss=f"{losses['ours'][-1]:.3f}")
    seconds = time.perf_counter() - begin
    warm = min(WARM_STEPS, compared - 1)
    step_ms = {name: round(float(np.median(times[name][warm:compared])), 2) for name in times}
    return losses, step_ms, seconds


def save(model: GPT4VForConditionalGeneration, processor: GPT4VProcessor, folder: Path) -> None:
    """The checkpoint in bf16: model, tokenizer and image processor, or nothing at all."""
    with atomic_folder(folder) as fresh:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(fresh)
        processor.save_pretrained(fresh)


def ask_in_a_new_process(out: Path) -> str:
    """Asks the saved checkpoint about one held-out digit, as a user's program would."""
    split = data.load_digits()[1]
    picture = out / "digit.png"
    data.picture(split.images[0]).save(picture)
    code = "import sys; from gpt4v_fast.demo import ask; print(ask(sys.argv[1], sys.argv[2], sys.argv[3]))"
    command = [sys.executable, "-c", code, str(picture), QUESTION, str(out / "checkpoint")]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer = result.stdout.strip()
    return f"a new process reads {picture} (a {int(split.labels[0])}): {QUESTION} -> {answer}"


def machine() -> dict[str, str]:
    """What the times were taken on."""
    import transformers

    names = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    memory = re.search(r"MemTotal: +(\d+) kB", _read("/proc/meminfo"))
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "isa": _C.isa(),
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "unknown",
        "peak_memory": peak_memory(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpt4v_fast": gf.__version__,
    }


def peak_memory() -> str:
    """The most memory that this process has held so far."""
    try:
        import resource
    except ImportError:  # not on Windows
        return "unknown"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return f"{most / (2**10 if sys.platform == 'linux' else 2**20):.0f} MiB"


def kernels(model: GPT4VForConditionalGeneration) -> dict[str, str]:
    """Which kernel each op of a training step runs, as `gf.explain` says."""
    text, vision = model.config.text_config, model.config.vision_config
    states = torch.zeros(1, text.num_attention_heads, 8, text.head_dim, requires_grad=True)
    hidden = torch.zeros(8, text.hidden_size, requires_grad=True)
    pixels = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, dtype=torch.uint8)
    choices = {
        "attention": gf.explain(gf.attention, states, states, states, mask=gf.Mask(causal=True)),
        "loss": gf.explain(gf.linear_cross_entropy, hidden, model.lm_head.weight, torch.zeros(8, dtype=torch.long)),
        "patch embedding": gf.explain(gf.patch_embed, pixels, model.model.vision_tower.patch_embedding.weight),
    }
    return {name: f"{choice.kernel} on {choice.on}" for name, choice in choices.items()}


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.is_file() else ""


def model_card(metrics: dict[str, Any]) -> str:
    """The README of the checkpoint."""
    accuracy = ", ".join(f"{task} {100 * share:.1f}%" for task, share in metrics["accuracy"].items())
    return f"""# gpt4v_fast digits

A GPT-4V of {metrics["parameters"]:,} parameters (preset "tiny") that answers questions about handwritten
digits in English and Chinese: which digit, even or odd, the sum of two, a caption. Made by `gpt4v-fast demo`
with seed {metrics["seed"]} in {metrics["steps"]} steps from 1,437 of scikit-learn's 1,797 digits (UCI ML
hand-written digits, CC BY 4.0) and a few sentences of text.

On the 360 held-out digits, right answers by greedy generation: {accuracy}.

It knows nothing else. Weights: bf16, Apache-2.0.
"""


__all__ = ["run_demo"]
