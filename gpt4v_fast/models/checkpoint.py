"""Reading checkpoints with clear errors, and writing them so that a half-written one never replaces a good
one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

MODEL_TYPE = "gpt4v"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def check_folder(folder: str | os.PathLike, *needed: tuple[str, ...]) -> None:
    """Raise unless `folder` holds a checkpoint of this family.

    Args:
        folder: a path; a name that is no path (a hub id) is left to transformers.
        needed: file names, one tuple of alternatives per thing that must be there.
    Raises:
        FileNotFoundError: the folder, or one of the files, is missing; names what was expected and what is
            there.
        ValueError: config.json is not JSON, or of another model type.
    """
    path = Path(folder)
    if not path.is_dir():
        if path.is_file():
            raise ValueError(f"a checkpoint must be a folder, got the file {path}")
        if len(path.parts) != 2 or str(folder).startswith((".", "~", "/")):  # a hub id is owner/name
            raise FileNotFoundError(f"checkpoint folder not found: {path}")
        return
    for names in needed:
        if not any((path / name).is_file() for name in names):
            there = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
            raise FileNotFoundError(f"checkpoint {path}: expected {' or '.join(names)}, found {there}")
    config = path / "config.json"
    if config.is_file():
        try:
            came = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"checkpoint {path}: config.json must be a JSON object, got {error}") from error
        if came != MODEL_TYPE:
            raise ValueError(f"checkpoint {path}: expected model_type {MODEL_TYPE!r} in config.json, got {came!r}")


@contextmanager
def atomic_folder(target: str | os.PathLike, replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and vanishes
    otherwise.

    What `target` holds and the block did not write is kept, but for names that match a pattern of `replaces`.
    A reader sees the old folder or the new one; only between the two renames (microseconds) none stands
    there, and the old one waits under a name that starts with ".old-". A folder that cannot be renamed (a mount
    point, or where the process stands) gets the new files one by one, each of them whole.
    """
    target = Path(target).resolve()
    if target.is_file():
        raise NotADirectoryError(f"a checkpoint must be written to a folder, got the file {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".new-{target.name}-{uuid4().hex[:12]}"
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if not target.is_dir():
            fresh.rename(target)
        elif Path.cwd().is_relative_to(target) or not _swap(fresh, target, replaces):
            _replace_files(fresh, target, replaces)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, target: Path, replaces: tuple[str, ...]) -> bool:
    """Puts `fresh`, and what it lacks of `target`, in the place of `target`; False where that cannot be renamed."""
    for entry in target.iterdir():
        if (fresh / entry.name).exists() or any(entry.match(pattern) for pattern in replaces):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, fresh / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, fresh / entry.name)
    old = target.parent / f".old-{target.name}-{uuid4().hex[:12]}"
    try:
        target.rename(old)
    except OSError:
        return False
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return True


def _replace_files(fresh: Path, target: Path, replaces: tuple[str, ...]) -> None:
    for file in sorted(path for path in fresh.rglob("*") if path.is_file()):
        place = target / file.relative_to(fresh)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".new-{place.name}")
        shutil.copy2(file, partial)
        partial.replace(place)
    for entry in target.iterdir():
        if any(entry.match(pattern) for pattern in replaces) and not (fresh / entry.name).exists():
            entry.unlink()


class CheckedModel:
    """For models: `from_pretrained` refuses what is missing or foreign, `save_pretrained` is atomic."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, with errors in place of warnings.

        Raises:
            FileNotFoundError: no such folder, or no config.json or model.safetensors in it.
            ValueError: another model type, a damaged file, or weights that are missing, foreign or of another
                shape (`ignore_mismatched_sizes=True` allows the last, for a changed head).
        """
        where = pretrained_model_name_or_path
        part = kwargs.get("subfolder")
        check_folder(Path(where, part) if part else where, ("config.json",), WEIGHTS)
        wants_info = kwargs.pop("output_loading_info", False)
        lenient = kwargs.get("ignore_mismatched_sizes", False)
        try:
            load = super().from_pretrained  # type: ignore[misc]
            model, info = load(where, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"checkpoint {where}: the weights are damaged: {error}") from error
        for kind, meaning in (("missing_keys", "lacks"), ("unexpected_keys", "has the foreign")):
            names = sorted(info[kind])
            if names and not lenient:
                raise ValueError(
                    f"checkpoint {where} {meaning} weights {_some(names)}, expected those of {cls.__name__}"
                )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """transformers' `save_pretrained`, through a temporary folder."""
        if kwargs.get("push_to_hub"):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            return
        with atomic_folder(save_directory, replaces=("model*.safetensors", "model.safetensors.index.json")) as folder:
            super().save_pretrained(folder, *args, **kwargs)  # type: ignore[misc]


def _link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """A second name for the same file, since what is kept may be gigabytes; a copy where links are not possible."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
