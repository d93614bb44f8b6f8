"""The demo: its data, its scores, a short run, and the checkpoint that ships with the package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt4v_fast.demo import ask, data, evaluate, run_demo, scoring
from gpt4v_fast.demo.report import choose
from gpt4v_fast.demo.run import TARGETS
from gpt4v_fast.demo.train import IGNORE, MIXTURE, Batches, Plan, Trainer, augment, make_model
from gpt4v_fast.models import digits_checkpoint

PLAN = Plan(steps=3, batch=8, warmup=2)


def test_the_split_is_fixed_and_disjoint():
    train, held_out = data.load_digits()
    assert (len(train.labels), len(held_out.labels)) == (1437, 360)
    assert held_out.labels[:8].tolist() == [7, 6, 3, 7, 7, 3, 2, 8]
    assert np.bincount(held_out.labels).min() >= 34
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in held_out.images)


def test_answers_are_right():
    assert data.answer("digit", "en", [7]) == "It is 7."
    assert data.answer("parity", "zh", [8]) == "8是偶数。"
    assert data.answer("sum", "en", [7, 5]) == "7 + 5 = 12."
    assert data.answer("sum", "zh", [9, 9]) == "9加9等于18。"
    assert data.answer("caption", "zh", [3]) == "手写的数字三，是奇数。"
    with pytest.raises(ValueError, match="task must be one of"):
        data.answer("colour", "en", [1])
    split = data.load_digits()[1]
    for item in scoring.exam(split):
        assert scoring.is_right(item, item.answer, split)
        assert item.prompt.count("<image>") == (2 if item.task == "sum" else 1)


@pytest.mark.parametrize(
    ("task", "text", "said"),
    [
        ("digit", "It is 7.", 7),
        ("sum", "7 + 5 = 12.", 12),
        ("sum", "9加9等于18。", 18),
        ("sum", "I do not know", -1),
        ("parity", "8 is even.", 0),
        ("parity", "7是奇数。", 1),
        ("parity", "", -1),
    ],
)
def test_verdicts(task, text, said):
    assert scoring.verdict(task, text) == said


def test_scores_of_captions_and_classes():
    chinese = scoring.caption_scores(["手写的数字三，是奇数。"], ["手写的数字三，是奇数。"], "zh")
    assert chinese == {"bleu": 100.0, "rouge_l": 100.0}
    worse = scoring.caption_scores(["手写的数字四，是偶数。"], ["手写的数字三，是奇数。"], "zh")
    assert 0 < worse["bleu"] < 100
    assert worse["rouge_l"] == pytest.approx(100 * 7 / 9, abs=0.01)
    scores = scoring.class_scores([0, 0, 1, 1], [0, 1, 1, -1])
    assert scores["accuracy"] == 0.5
    assert scores["macro_precision"] == 0.75
    assert scores["macro_recall"] == 0.5
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-4)


def test_batches_are_seeded_and_label_answers_only():
    _, processor = make_model(PLAN)
    split = data.load_digits()[0]
    first, second = (next(iter(Batches(PLAN, processor, split))) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert first.pixel_values.dtype == torch.uint8
    assert sum(MIXTURE.values()) == pytest.approx(1)
    row, end = first.input_ids[0], processor.tokenizer.eos_token_id
    kept = first.labels[0] != IGNORE
    assert torch.equal(first.labels[0][kept], row[kept])
    assert row[kept][-1] == end
    assert not (first.labels == processor.image_token_id).any()
    other = next(iter(Batches(Plan(seed=1, batch=8), processor, split)))
    assert first.input_ids.shape != other.input_ids.shape or not torch.equal(first.input_ids, other.input_ids)


def test_augmentation_keeps_the_kind_and_about_the_ink():
    _, processor = make_model(PLAN)
    pixels = data.pixels_of(data.load_digits()[0].images[:50], processor)
    moved = augment(pixels, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape
    assert moved.dtype == torch.uint8
    assert not torch.equal(moved, pixels)
    assert 0.75 < moved.float().mean() / pixels.float().mean() < 1.15


def test_training_is_bitwise_repeatable():
    def losses() -> list[float]:
        model, processor = make_model(PLAN)
        trainer, batches = Trainer(PLAN, model), iter(Batches(PLAN, processor, data.load_digits()[0]))
        return [trainer.step(next(batches)) for _ in range(PLAN.steps)]

    assert losses() == losses()


def test_a_short_run_writes_everything(tmp_path, capsys):
    out = tmp_path / "run"
    assert run_demo(SimpleNamespace(out=str(out), steps=3, limit=4, json=True)) == 0
    printed = json.loads(capsys.readouterr().out)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert printed == metrics
    assert set(metrics["accuracy"]) >= {"digit", "parity", "sum"}
    assert set(metrics["step_ms"]) == {"ours", "stock"}
    assert min(metrics["step_ms"].values()) > 0
    assert 0 <= metrics["largest_loss_difference"] < 1e-4  # fp32, three steps from one seed
    report = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#|data:)', report)  # nothing is fetched
    assert report.count('class="card') == 16
    assert report.count("<svg") == 3
    assert "Wrong answers come first, on purpose" in report
    assert all(f"{name} {100 * share:.0f}%" in report for name, share in TARGETS.items())
    assert set(metrics["kernels"]) == {"attention", "loss", "patch embedding"}
    assert all(kernel in report for kernel in metrics["kernels"].values())
    assert {"isa", "memory", "peak_memory"} <= set(metrics["machine"])
    for text in re.findall(r'<span lang="zh">.*?</span>(.{0,5})', report):
        assert text == " <i>("  # the meaning in English, for machines without a Chinese font
    assert isinstance(ask(out / "digit.png", "Is it even?", str(out / "checkpoint")), str)


def test_shown_items_hold_right_and_wrong_ones():
    def item(number: int, right: bool) -> dict[str, object]:
        task, language = data.TASKS[number % 4], data.LANGUAGES[number // 4 % 2]
        return {"task": task, "language": language, "right": right}

    shown = choose([item(i, i % 10 != 0) for i in range(400)])
    assert len(shown) == 16
    assert sum(not one["right"] for one in shown) == 6
    assert len({(one["task"], one["language"]) for one in shown if one["right"]}) == 8


def test_chinese_questions_and_answers_have_their_meaning():
    for task in data.TASKS:
        for question in data.QUESTIONS[task, "zh"]:
            meaning = data.in_english(question)
            assert meaning in data.QUESTIONS[task, "en"] and meaning
    for item in scoring.exam(data.load_digits()[1]):
        if item.language == "zh":
            digits = [int(data.load_digits()[1].labels[i]) for i in item.images]
            assert data.in_english(item.answer) == data.answer(item.task, "en", digits)
    assert data.in_english("7 + 5 = 12.") is None


# The checkpoint that ships


def test_the_shipped_checkpoint_is_small_and_whole():
    folder = Path(digits_checkpoint())
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    assert sum(sizes.values()) < 4_000_000
    names = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    assert names | {"tokenizer.json", "tokenizer_config.json", "README.md"} <= set(sizes)
    assert scoring.load()[0].config.dtype in (torch.float32, torch.bfloat16)


def test_the_shipped_checkpoint_reaches_the_targets():
    scores = evaluate(limit=120)
    assert scores["questions"] == 8 * 120
    assert len(scores["items"]) == 8 * 120
    for task, target in TARGETS.items():
        assert scores["accuracy"][task] >= target, task
    assert np.trace(scores["confusion"]) >= 0.97 * 240
    assert min(scores["tasks"]["caption"]["all"][name] for name in ("bleu", "rouge_l")) > 90


def test_ask_the_shipped_checkpoint(tmp_path):
    split = data.load_digits()[1]
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        data.picture(split.images[i]).save(path)
    first, second = (int(label) for label in split.labels[:2])
    assert ask(paths[0], "Which digit is this?") == f"It is {first}."
    assert ask(str(paths[1]), "这是哪个数字？") == f"是{second}。"
    assert ask([str(path) for path in paths], "Add the two digits.") == f"{first} + {second} = {first + second}."
    assert ask(paths[0]).startswith(f"A handwritten {data.WORDS['en'][first]}")
    with pytest.raises(ValueError, match="a question must be about at most 2 images, got 3"):
        ask([paths[0]] * 3, "Add the digits.")
    with pytest.raises(FileNotFoundError, match="image file not found"):
        ask(tmp_path / "none.png", "?")
    with pytest.raises(ValueError, match="for each of the 1 images, got 2"):
        ask(paths[0], "<image><image>?")
    with pytest.raises(FileNotFoundError, match="checkpoint folder not found"):
        ask(paths[0], "?", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        evaluate(limit=0)
