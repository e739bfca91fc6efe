"""Converts whole models between a Hugging Face folder and a Megatron checkpoint, one parameter in
memory at a time, and compares the two bit for bit.

    OUT/                   a checkpoint in Megatron's `torch_dist` format: loads at any layout
    OUT/hf/                config, tokenizer, processor, chat template of the Hugging Face folder
    OUT/hf/hf_layout.json  which file held which tensor, for the way back

A result is written beside its name and renamed when all of it is on disk.

Parallelism: every rank converts a run of parameters of about the same number of bytes, in the order
in which they lie in the files; the result is one checkpoint, or one folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.conversion_plan import (
    Parameter,
    Plan,
    check_hf,
    check_megatron,
    hf_infos,
    plan_of,
)
from megatron_mmr1.convert.hf_files import (
    HfFolderWriter,
    HfLayout,
    HfWeights,
    copy_model_files,
    finish_folder,
)
from megatron_mmr1.convert.safetensors_file import TensorInfo
from megatron_mmr1.convert.torch_dist import TorchDistReader
from megatron_mmr1.convert.torch_dist_writer import TorchDistWriter, write_metadata

_LAYOUT = "hf_layout.json"
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

OnProgress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Report:
    """What was converted or compared, over all ranks.

    Attributes:
        num_tensors: Hugging Face tensors.
        skipped: names in the Hugging Face folder that need no conversion.
        differing: names whose values are not the same on both sides.
    """

    num_tensors: int
    num_bytes: int
    skipped: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()


def convert_hf_to_megatron(hf: Path, out: Path, on_progress: OnProgress = _silent) -> Report:
    """Write a Hugging Face folder's model as a Megatron checkpoint; every rank calls.

    Args:
        on_progress: told this rank's bytes, done and in all.

    Raises:
        ValueError: the folder is no complete model of a known family, or `out` exists.
    """
    weights = HfWeights(hf, "--hf", is_read_once=True)
    plan = plan_of(hf, weights.tensors, are_equal=weights.are_equal)
    skipped = check_hf(plan, weights)
    infos = {name: weights.info(name) for name in plan.hf_names}
    order = sorted(plan.parameters, key=lambda p: weights.position(next(iter(p.hf_shapes))))
    with _new_folder(out) as partial:

        def write() -> TorchDistWriter:
            writer = TorchDistWriter(partial, dist.get_rank())
            if parallel.is_main():
                _write_common(partial, hf, weights, skipped)
                for key, value in {"common_state/shard_0_1": [{}], **plan.objects}.items():
                    writer.write_object(key, value)
            for parameter in _with_read_ahead(order, infos, weights, on_progress):
                writer.write(parameter.box, plan.read_merged(weights, parameter))
            writer.close()
            return writer

        entries = parallel.gather_over_world(_on_all_ranks(write).entries)
        if parallel.is_main():
            write_metadata(partial, entries)
    weights.close()
    return Report(len(infos), _total(infos), tuple(skipped))


def convert_megatron_to_hf(
    megatron: Path, out: Path, template: Path | None = None, on_progress: OnProgress = _silent
) -> Report:
    """Write a Megatron checkpoint's model as a Hugging Face folder; every rank calls.

    Args:
        megatron: a folder that `convert_hf_to_megatron` wrote, or RUN/checkpoints/step_N.
        template: the folder that config, tokenizer, processor and shard layout come from; None:
            what the checkpoint came from.

    Raises:
        ValueError: the checkpoint is not complete or not the template's, or `out` exists.
    """
    folder, template, key = _locate(megatron, template)
    checkpoint = TorchDistReader(folder)
    plan = plan_of(template, _file_names(template), key)
    check_megatron(plan, checkpoint)
    infos = hf_infos(plan, checkpoint)
    layout = _layout(template, infos)
    order = sorted(plan.parameters, key=lambda p: checkpoint.position(p.box))
    with _new_folder(out) as partial:
        if parallel.is_main():
            copy_model_files(template, partial)
            (partial / _LAYOUT).unlink(missing_ok=True)
            first = HfFolderWriter(partial, layout, infos, is_first=True)
            first.write_index()
            first.close()
        parallel.barrier()

        def write() -> HfFolderWriter:
            writer = HfFolderWriter(partial, layout, infos, is_first=False)
            for parameter in _with_read_ahead(order, infos, checkpoint, on_progress):
                whole = checkpoint.read(parameter.box).reshape(parameter.shape)
                parts = plan.split(parameter, whole)
                for name, part in zip(parameter.hf_shapes, parts, strict=True):
                    writer.write(name, part)
            writer.close()
            return writer

        written = parallel.gather_over_world(sorted(_on_all_ranks(write).written))
        assert sorted(written) == sorted(infos), "not every tensor was written exactly once"
    checkpoint.close()
    return Report(len(infos), _total(infos))


def verify(hf: Path, megatron: Path, on_progress: OnProgress = _silent) -> Report:
    """Compare a Hugging Face folder and a Megatron checkpoint, bit for bit; every rank calls.

    Raises:
        ValueError: one of them is not complete, or they are not of the same model.
    """
    checkpoint = TorchDistReader(_checkpoint_folder(megatron))
    weights = HfWeights(hf, "--hf", is_read_once=True)
    plan = plan_of(hf, weights.tensors, are_equal=weights.are_equal)
    skipped = check_hf(plan, weights)
    check_megatron(plan, checkpoint)
    infos = {name: weights.info(name) for name in plan.hf_names}
    order = sorted(plan.parameters, key=lambda p: weights.position(next(iter(p.hf_shapes))))

    def compare() -> list[str]:
        differing = []
        for parameter in _with_read_ahead(order, infos, weights, on_progress):
            ours = plan.read_merged(weights, parameter)
            theirs = checkpoint.read(parameter.box).reshape(parameter.shape)
            if not _are_same_bits(ours, theirs):
                differing += _differing_names(plan, parameter, ours, theirs)
        return differing

    differing = parallel.gather_over_world(_on_all_ranks(compare))
    weights.close()
    checkpoint.close()
    return Report(len(infos), _total(infos), tuple(skipped), tuple(differing))


def _write_common(partial: Path, hf: Path, weights: HfWeights, skipped: Sequence[str]) -> None:
    (partial / "hf").mkdir()
    copy_model_files(hf, partial / "hf")
    layout = weights.layout().only(weights.tensors.keys() - set(skipped))
    text = json.dumps(layout.to_json(), indent=1) + "\n"
    (partial / "hf" / _LAYOUT).write_text(text, encoding="utf-8")


def _checkpoint_folder(folder: Path) -> Path:
    return folder / "megatron" if (folder / "megatron" / "metadata.json").is_file() else folder


def _locate(megatron: Path, template: Path | None) -> tuple[Path, Path, str]:
    """Return the checkpoint's own folder, the template, and how to call that in messages."""
    if not megatron.is_dir():
        raise ValueError(f"--megatron={str(megatron)!r} is no folder; give a checkpoint")
    folder = _checkpoint_folder(megatron)
    if template is not None:
        return folder, template, "--template"
    if (folder / "hf" / "config.json").is_file():
        return folder, folder / "hf", "the checkpoint's hf"
    path = folder.parent / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"--megatron={str(megatron)!r} says nothing of its model (no hf/, no config.yaml); "
            "give the Hugging Face folder that it came from as --template"
        )
    try:
        model = Path(yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["path"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no model.path ({error!r}); give --template") from error
    if not model.is_dir():
        raise ValueError(
            f"{path}: model.path={str(model)!r} is no folder here; give the model as --template"
        )
    return folder, model, f"model.path in {path}"


def _file_names(template: Path) -> set[str]:
    """Return the names of the template's tensors; none if it holds no weights."""
    layout = _own_layout(template)
    return {name for held in layout.files.values() for name in held} if layout else set()


def _own_layout(template: Path) -> HfLayout | None:
    if (template / _LAYOUT).is_file():
        return HfLayout.from_json(template / _LAYOUT)
    if any((template / name).is_file() for name in _WEIGHT_FILES):
        weights = HfWeights(template)
        layout = weights.layout()
        weights.close()
        return layout
    return None


def _layout(template: Path, infos: dict[str, TensorInfo]) -> HfLayout:
    """Return the template's layout, if it has one; else the usual one."""
    layout = _own_layout(template)
    if layout is None:
        return HfLayout.by_size(infos)
    if not (template / _LAYOUT).is_file():
        layout = layout.only(infos)  # a model's files may hold what needs no conversion
    names = {name for held in layout.files.values() for name in held}
    if names != infos.keys():
        wrong = sorted(names ^ infos.keys())
        raise ValueError(
            f"{template} names other tensors than the checkpoint holds, as {wrong[0]}; give the "
            "folder of the checkpoint's own model as --template"
        )
    return layout


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that takes its name in the end, or is removed on a fault."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; nothing is written over: remove it, or name another")
    partial = out.with_name(out.name + ".partial")
    parallel.barrier()
    if parallel.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.barrier()
    try:
        yield partial
        parallel.barrier()
        if parallel.is_main():
            finish_folder(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    parallel.barrier()


def _on_all_ranks[T](work: Callable[[], T]) -> T:
    """Do this rank's share; a fault on one rank is raised on all, so that none waits for it."""
    result, fault = [], ""
    try:
        result.append(work())
    except (ValueError, OSError) as error:
        fault = str(error)
        if dist.get_world_size() == 1:
            raise
    faults = [f for f in parallel.gather_over_world([fault]) if f]
    if faults:
        raise ValueError(faults[0])
    return result[0]


def _with_read_ahead(
    order: Sequence[Parameter],
    infos: dict[str, TensorInfo],
    source: HfWeights | TorchDistReader,
    on_progress: OnProgress,
) -> Iterator[Parameter]:
    """Yield this rank's parameters, while the system reads the next one's bytes."""
    sizes = [sum(infos[name].num_bytes for name in p.hf_shapes) for p in order]
    total, world, rank = sum(sizes), dist.get_world_size(), dist.get_rank()
    mine: list[tuple[Parameter, int]] = []
    end = 0
    for parameter, size in zip(order, sizes, strict=True):
        if (end + size // 2) * world // max(total, 1) == rank:
            mine.append((parameter, size))
        end += size
    my_total, done = sum(size for _, size in mine), 0
    for index, (parameter, size) in enumerate(mine):
        if index + 1 < len(mine):
            following = mine[index + 1][0]
            if isinstance(source, HfWeights):
                for name in following.hf_shapes:
                    source.will_need(name)
            else:
                source.will_need(following.box)
        yield parameter
        done += size
        on_progress(done, my_total)


def _are_same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype:
        return False
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
    return torch.equal(*as_bytes)


def _differing_names(
    plan: Plan, parameter: Parameter, first: Tensor, second: Tensor
) -> Iterator[str]:
    pairs = zip(plan.split(parameter, first), plan.split(parameter, second), strict=True)
    for name, (a, b) in zip(parameter.hf_shapes, pairs, strict=True):
        if not _are_same_bits(a, b):
            yield name


def _total(infos: dict[str, TensorInfo]) -> int:
    return sum(info.num_bytes for info in infos.values())
