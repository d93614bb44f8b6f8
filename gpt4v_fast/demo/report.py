"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

from . import data

SHOWN, SHOWN_WRONG = 16, 6
OURS, STOCK, INK, TARGET = "#2563eb", "#d97706", "#64748b", "#dc2626"

STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
margin: 0 auto; max-width: 62rem; padding: 2rem 1rem; color:
#0f172a; } h1 { font-size: 1.6rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { margin: .3rem 0; color: #334155 } img, svg { max-width: 100%; height: auto }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left }
th { color: #64748b; font-weight: 500 } td.n { text-align: right; font-variant-numeric: tabular-nums }
.pair { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)) }
.card { border: 1px solid #e2e8f0; border-left: 4px solid #16a34a; border-radius: .4rem; padding: .7rem }
.card.wrong { border-left-color: #dc2626 } .card img { height: 4rem; image-rendering: pixelated; margin-right:
.3rem } .card small { color: #64748b } .card b { display: block } footer { margin-top: 3rem; color: #64748b;
font-size: .85rem }
"""


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "gpt4v_fast", "font.size": 9, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "axes.edgecolor": INK})
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)


def _svg(figure: Any) -> str:
    from matplotlib import pyplot as plt

    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]


def _loss_curves(ours: list[float], stock: list[float]) -> str:
    figure, [[whole, start]] = _figure(9.5, 3.2, 2)
    whole.semilogy(ours, color=OURS, alpha=0.25, linewidth=0.8)
    window = max(1, min(25, len(ours) // 4))
    smooth = np.convolve(ours, np.ones(window) / window, mode="valid")
    whole.semilogy(np.arange(len(smooth)) + window - 1, smooth, color=OURS)
    whole.set(title="The whole run, our kernels", xlabel="step", ylabel="loss")
    count = len(stock)
    start.plot(ours[:count], color=OURS, linewidth=5, alpha=0.35, label="our kernels")
    start.plot(stock, color=STOCK, linewidth=1.2, linestyle="--", label="stock PyTorch")
    start.set(title=f"The first {count} steps of both, from one seed", xlabel="step")
    start.legend(frameon=False)
    return _svg(figure)


def _accuracy_bars(tasks: dict[str, Any], targets: dict[str, float]) -> str:
    figure, [[axis]] = _figure(5.0, 3.0)
    for shift, language, colour in ((-0.19, "en", OURS), (0.19, "zh", STOCK)):
        values = [100 * tasks[task][language]["accuracy"] for task in data.TASKS]
        label = {"en": "English", "zh": "Chinese"}[language]
        bars = axis.bar(np.arange(len(values)) + shift, values, 0.36, color=colour, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    for place, task in enumerate(data.TASKS):
        if task in targets:
            wanted = 100 * targets[task]
            axis.hlines(wanted, place - 0.42, place + 0.42, color=TARGET, linewidth=1.2)
            axis.annotate(
                f"target {wanted:.0f}%",
                (place, wanted),
                (0, -10),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color="white",
                backgroundcolor=TARGET,
            )
    axis.set(ylabel="right answers, %", ylim=(0, 112), xticks=range(len(data.TASKS)), xticklabels=data.TASKS)
    axis.plot([], [], color=TARGET, linewidth=1.2, label="target")
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
    return _svg(figure)


def _confusion(counts: list[list[int]]) -> str:
    figure, [[axis]] = _figure(4.2, 3.6)
    table = np.array(counts)
    axis.imshow(np.sqrt(table), cmap="Blues")
    for (row, column), value in np.ndenumerate(table):
        if value:
            colour = "white" if value > table.max() / 2 else "#b91c1c" if row != column else "black"
            axis.text(column, row, value, ha="center", va="center", fontsize=7, color=colour)
    axis.set(xlabel="answer", ylabel="digit", xticks=range(10), yticks=range(10))
    return _svg(figure)


def _picture(image: np.ndarray) -> str:
    file = io.BytesIO()
    data.picture(image).save(file, "PNG")
    return f'<img alt="digit" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def choose(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sixteen items: up to six wrong ones and right ones of every task and language, or more wrong ones."""
    wrong = [item for item in items if not item["right"]]
    spread = wrong[:: max(1, len(wrong) // SHOWN_WRONG)][:SHOWN_WRONG]
    shown = list(spread)
    kinds = [(task, language) for task in data.TASKS for language in data.LANGUAGES]
    right = {kind: [i for i in items if i["right"] and (i["task"], i["language"]) == kind] for kind in kinds}
    depth = 0
    while len(shown) < SHOWN and any(len(group) > depth for group in right.values()):
        for offset, group in enumerate(right.values()):
            if len(shown) < SHOWN and len(group) > depth:
                shown.append(group[(17 * offset + 31 * depth) % len(group)])
        depth += 1
    shown += [item for item in wrong if item not in spread][: SHOWN - len(shown)]
    return shown


def _said(text: str, empty: str) -> str:
    """A question or an answer; Chinese ones with their meaning, as not every machine has a font for them."""
    meaning = data.in_english(text)
    if meaning is None:
        return html.escape(text) or empty
    return f'<span lang="zh">{html.escape(text)}</span> <i>({html.escape(meaning)})</i>'


def _card(item: dict[str, Any], split: data.Digits) -> str:
    pictures = "".join(_picture(split.images[i]) for i in item["images"])
    expected = "" if item["right"] else f"<small>expected: {_said(item['expected'], '')}</small>"
    question = _said(item["question"], "<i>(image alone)</i>")
    return (
        f'<div class="card {"right" if item["right"] else "wrong"}">{pictures}<div><small>{question}</small>'
        f"<b>{_said(item['answer'], '(nothing)')}</b>{expected}</div></div>"
    )


def _score_table(tasks: dict[str, Any]) -> str:
    names = ("accuracy", "macro_precision", "macro_recall", "macro_f1", "bleu", "rouge_l")
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    rows = ""
    for task in data.TASKS:
        for language in data.LANGUAGES:
            scores = tasks[task][language]
            cells = (
                "" if name not in scores else f"{scores[name] * (1 if name in ('bleu', 'rouge_l') else 100):.1f}"
                for name in names
            )
            rows += f"<tr><td>{task}, {language}</td>" + "".join(f'<td class="n">{c}</td>' for c in cells) + "</tr>"
    return f"<table><tr><th>task</th>{head}</tr>{rows}</table>"


def write_report(path: Path, metrics: dict[str, Any], scores: dict[str, Any], losses: dict[str, list[float]]) -> None:
    """Writes the report.

    Args:
        path: the HTML file.
        metrics: what metrics.json holds.
        scores: what `evaluate` returned.
        losses: {"ours": each step, "stock": the first steps}.
    """
    split = data.load_digits()[1]
    step, accuracy = metrics["step_ms"], metrics["accuracy"]
    chosen = choose(scores["items"])
    cards = "".join(_card(item, split) for item in chosen)
    wrong = sum(not item["right"] for item in chosen)
    machine = {**metrics["machine"], **metrics["kernels"]}
    facts = ", ".join(f"{name.replace('_', ' ')} {html.escape(str(value))}" for name, value in machine.items())
    targets = ", ".join(f"{task} {100 * share:.0f}%" for task, share in metrics["targets"].items())
    shares = ", ".join(f"{task} {100 * accuracy[task]:.1f}%" for task in data.TASKS)
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>gpt4v_fast demo</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style>
<h1>A small GPT-4V reads digits</h1>
<p>{metrics["parameters"]:,} parameters, {metrics["steps"]} steps of {metrics["batch"]} questions in
{metrics["train_s"]:.0f} s; {metrics["questions"]} questions about 360 held-out digits, answered by
generation.</p> <p>Right answers: {shares}.</p>
<h2>Loss</h2>{_loss_curves(losses["ours"], losses["stock"])}
<p>Median step: {step["ours"]:.1f} ms with our kernels, {step["stock"]:.1f} ms with stock PyTorch
(scaled_dot_product_attention, Conv2d, F.cross_entropy), timed in turn. Largest difference of the losses over
{metrics["compared_steps"]} steps: {metrics["largest_loss_difference"]:.2g}.</p>
<div class="pair"><div><h2>Right answers by task</h2>{_accuracy_bars(scores["tasks"], metrics["targets"])}</div>
<div><h2>Which digit it reads</h2>{_confusion(scores["confusion"])}</div></div>
<p>Red lines: the targets, {targets}.</p>
<h2>All scores, in percent</h2>{_score_table(scores["tasks"])}
<h2>Sixteen questions about held-out images</h2><p>Wrong answers come first, on purpose: {wrong} of these {len(chosen)},
and {sum(not item["right"] for item in scores["items"]):,} of all {metrics["questions"]:,}. The right ones are of
every task and language.</p><div class="grid">{cards}</div>
<footer>{facts}; seed {metrics["seed"]}.</footer></html>
""",
        encoding="utf-8",
    )


__all__ = ["write_report"]
