"""The command line: `gpt4v-fast doctor | bench | demo | ask | evaluate`.

Everything heavy is imported by the command that needs it. What a user can get wrong ends in one line on the error
stream and exit code 2; `--traceback` shows where it came from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

# What bad input raises, in this package and in those below it; anything else is a bug and keeps its traceback.
BAD_INPUT = (ValueError, TypeError, IndexError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 where a check failed, 2 for bad input."""
    _write_any_text()
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a reader that has left is noticed
    except BrokenPipeError:  # `gpt4v-fast ... | head`: nobody reads on, which is no error
        _drop_output()
        return 0


def _run(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    args.command_line = shlex.join(["gpt4v-fast", *argv])
    try:
        return args.run(args)
    except BrokenPipeError:
        raise
    except BAD_INPUT as error:
        if args.traceback:
            raise
        print(f"gpt4v-fast {args.command}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gpt4v-fast {args.command}: interrupted", file=sys.stderr)
        return 130


def _write_any_text() -> None:
    """Where the output's encoding lacks a character (Chinese in a Latin locale), an escape stands for it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # a stream of somebody's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _drop_output() -> None:
    """Sends what is still buffered nowhere, so that the interpreter's last flush is quiet too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = "demo" if error.name.split(".")[0] in _DEMO_PACKAGES else "model"
        return f'{error.name} is not installed: pip install "gpt4v_fast[{extra}]"'
    return " ".join(str(error).split()) or type(error).__name__


_DEMO_PACKAGES = ("sklearn", "matplotlib", "tqdm", "sacrebleu", "rouge_score")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpt4v-fast", description="Fast attention, loss and patch embedding for vision-language models."
    )
    parser.add_argument("--version", action=_Version, help="print the versions of gpt4v_fast, torch and Python")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--traceback", action="store_true", help="on bad input, show where in the code")
        command.set_defaults(run=run)
        return command

    _json_flag(add("doctor", _doctor, "what this machine has, and which kernel every op runs on it"))

    from gpt4v_fast.benchmarks import command

    command.add_arguments(add("bench", _bench, "times the ops beside their peers, as a share of the machine's peak"))

    demo = add("demo", _demo, "trains a small model on scanned digits, then asks it about held-out ones")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="where results go (default: runs/demo)")
    demo.add_argument("--steps", type=_count, metavar="N", help="training steps (default: enough to learn, 700)")
    demo.add_argument("--seed", type=int, metavar="N", help="of the weights and the batches (default: 0)")
    _json_flag(demo)

    ask = add("ask", _ask, "answers a question about an image, or about two")
    ask.add_argument("image", nargs="+", metavar="IMAGE", help="image files, one or two; - reads the standard input")
    ask.add_argument("question", help='in English or Chinese; "" asks for a caption')
    _checkpoint_option(ask)
    ask.add_argument("--max-new-tokens", type=_count, default=32, metavar="N", help="longest answer (default: 32)")
    _json_flag(ask)

    evaluate = add("evaluate", _evaluate, "answers all questions about the held-out digits and scores the answers")
    _checkpoint_option(evaluate)
    evaluate.add_argument("--limit", type=_count, metavar="N", help="only the first N held-out digits")
    _json_flag(evaluate)
    return parser


class _Version(argparse.Action):
    """Prints the version and leaves; torch is imported only for this."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        import torch

        import gpt4v_fast as gf

        print(f"gpt4v-fast {gf.__version__} (torch {torch.__version__}, Python {sys.version.split()[0]})")
        parser.exit()


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to the standard output")


def _checkpoint_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", help="a folder that `demo` made (default: the shipped one)")


def _count(text: str) -> int:
    """An argument that counts something."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _doctor(args: argparse.Namespace) -> int:
    from gpt4v_fast import doctor

    found = doctor.report()
    print(_json(found) if args.json else doctor.text(found))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from gpt4v_fast.benchmarks import command

    return command.run_arguments(args, args.command_line)


def _demo(args: argparse.Namespace) -> int:
    from gpt4v_fast.demo import run_demo

    return run_demo(args)


def _ask(args: argparse.Namespace) -> int:
    from gpt4v_fast.demo import ask
    from gpt4v_fast.models.gpt4v.images_gpt4v import open_image

    # Before the model is loaded: a typo is told at once.
    images = [open_image(sys.stdin.buffer if path == "-" else path) for path in args.image]
    answer = ask(images, args.question, args.checkpoint, args.max_new_tokens)
    asked = {"images": args.image, "question": args.question, "checkpoint": args.checkpoint, "answer": answer}
    print(_json(asked) if args.json else answer)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from gpt4v_fast.demo import evaluate

    scores = evaluate(args.checkpoint, limit=args.limit, progress=True)
    del scores["items"]
    if args.json:
        print(_json(scores))
        return 0
    print(f"{scores['questions']} questions about held-out digits")
    for task, parts in scores["tasks"].items():
        for language, numbers in parts.items():
            print(
                f"{task:<8} {language:<4}",
                "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()),
            )
    return 0


def _json(value: Any) -> str:
    plain = "utf" not in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    return json.dumps(value, indent=1, ensure_ascii=plain)


if __name__ == "__main__":
    sys.exit(main())
